"""The class of a converted nn.Sequential: its ``forward`` runs its children in turn, fused where they can be.

The children keep their classes. Some consecutive children run as one op: a stem, a head, or the layers of a dense block
without a module around them. Between two fused parts, feature maps stay channels last, and their batch statistics are
passed on. Every other child gets the same input as in the stock network.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from densenet_fast import reference
from densenet_fast.conversion import fused, layout
from densenet_fast.conversion.expected import STATE
from densenet_fast.conversion.fused import Converted, Fused, Operands
from densenet_fast.conversion.layout import BlockLayout, Layout, is_norm
from densenet_fast.conversion.stem import StemLayout, StemOperands
from densenet_fast.functional import Updates
from densenet_fast.nn import calls, fusion
from densenet_fast.nn.memory_format import copied, is_channels_last
from densenet_fast.nn.snapshot import Found, Memory
from densenet_fast.operands import BlockOperands


class Segment(NamedTuple):
    """Consecutive children of an nn.Sequential that run as one op."""

    names: tuple[str, ...]
    layout: Layout
    """Its paths start at the nn.Sequential."""


class SequentialSlice(nn.Sequential):
    """Some children of ``module`` as an nn.Sequential. ``module`` does not contain it."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._modules.update({name: module._modules[name] for name in names})
        self.training = module.training


class FusedSequential(Converted):
    """A converted nn.Sequential: it contains converted parts, or has a tuple of :class:`Segment` in its state."""

    def forward(self, input: Any) -> Any:
        if fusion.chain_obstacle(input) is None:
            return _run(input, _steps(self))
        for step in _steps(self, nested=False):
            input = step.run_alone(input)
        return input


class Step:
    """One child of an nn.Sequential."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layout: Layout | None = vars(module).get(STATE) if isinstance(module, Fused) else None

    def found(self) -> Found:
        """Its operands, or the reason why it cannot run as one op."""
        if self.layout is None or fusion.has_hooks(self.module):
            return Found("it is a part of its own", None)
        return fused.examine_structure(self.module, self.layout)

    def obstacle(self, x: Any) -> str | None:
        """Why it cannot run as one op on ``x``, or None."""
        return fusion.input_obstacle(x, self.layout.dims) or fused.autocast_obstacle(x.dtype, x.device, self.layout)

    def only_reads(self) -> bool:
        """Whether it never changes its input in place."""
        return is_norm(self.module) and not fusion.has_hooks(self.module)

    def returns_all(self) -> bool:
        """Whether it returns all channels of its op's output."""
        return not (isinstance(self.layout, BlockLayout) and self.layout.new_only)

    def run_alone(self, x: Any) -> Any:
        """Runs it outside a chain of fused parts."""
        return self.module(x)

    stock = run_alone

    def note(self, reason: str | None, operands: Operands | None) -> None:
        """Records that it ran as one op. Otherwise its module is called, which records the ``reason`` itself."""
        if reason is None:
            calls.note(self.module, None, operands)


class SegmentStep(Step):
    """The children of a segment.

    Args:
        owner: the nn.Sequential.
        segment: one of its segments.
        index: its index among them.
        convolution: for a stem, the plain convolution before it, if there is one.
    """

    def __init__(self, owner: nn.Module, segment: Segment, index: int, convolution: nn.Module | None) -> None:
        self.owner, self.segment, self.index, self.convolution = owner, segment, index, convolution
        self.layout = segment.layout

    def found(self) -> Found:
        if self.convolution is not None and fusion.has_hooks(self.convolution):
            return Found("its convolution has a hook or a forward of its own", None)
        reason, operands = layout.replaced(self.layout), None
        if reason is None:
            reason, operands = _memory(self.owner).operands[self.index]
        if reason is None and self.convolution is not None:
            operands = StemOperands(self.convolution, operands.operands)
        return Found(reason, operands)

    def only_reads(self) -> bool:
        return False

    def run_alone(self, x: Any) -> Any:
        reason, operands = fusion.environment_obstacle(x), None
        if reason is None:
            reason = self.obstacle(x)
        if reason is None:
            reason, operands = self.found()
        self.note(reason, operands)
        return self.stock(x) if reason is not None else fused.run_alone(x, operands, self.layout)

    def stock(self, x: Any) -> Any:
        if self.convolution is not None:
            x = self.convolution(x)
        for name in self.segment.names:
            x = self.owner._modules[name](x)
        return x

    def note(self, reason: str | None, operands: Operands | None) -> None:
        calls.note(self.owner, reason, operands, self.segment.names[0])


def _steps(module: nn.Module, nested: bool = True) -> list[Step]:
    """The children of an nn.Sequential in order, each segment as one step.

    With ``nested``, a converted nn.Sequential among the children is replaced by its own steps.
    """
    first = {segment.names[0]: (index, segment) for index, segment in enumerate(segments_of(module))}
    names, i = list(module._modules), 0
    steps: list[Step] = []
    while i < len(names):
        index, segment = first.get(names[i], (0, None))
        if segment is not None and names[i : i + len(segment.names)] == [*segment.names]:
            has_convolution = bool(steps) and type(steps[-1]) is Step and _precedes(steps[-1].module, segment)
            steps.append(SegmentStep(module, segment, index, steps.pop().module if has_convolution else None))
            i += len(segment.names)
            continue
        child = module._modules[names[i]]
        steps += _steps(child) if nested and _only_runs_children(child) else [Step(child)]
        i += 1
    return steps


def _precedes(module: nn.Module, segment: Segment) -> bool:
    """Whether ``segment`` is a stem, and ``module`` a plain convolution that can run in one call with it."""
    if not isinstance(segment.layout, StemLayout):
        return False
    return type(module) is reference.CONVOLUTIONS[segment.layout.dims] and not fusion.has_hooks(module)


def _only_runs_children(module: nn.Module) -> bool:
    """Whether ``module`` is a converted nn.Sequential without hooks or another forward."""
    is_sequential = isinstance(module, FusedSequential) and type(module).forward is FusedSequential.forward
    return is_sequential and not fusion.has_hooks(module)


def segments_of(module: nn.Module) -> tuple[Segment, ...]:
    """The segments of an nn.Sequential; none if it is not converted."""
    return vars(module).get(STATE, ()) if isinstance(module, FusedSequential) else ()


def follow_each_other(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether ``names`` are consecutive children of ``module``."""
    children = list(module._modules)
    start = children.index(names[0]) if names[0] in children else 0
    return children[start : start + len(names)] == [*names]


def segment_obstacle(module: nn.Module, segment: Segment) -> str | None:
    """Why the children of ``segment`` cannot run as one op, or None."""
    if not follow_each_other(module, segment.names):
        return f"its children {', '.join(segment.names)} do not follow each other any more"
    return layout.obstacle(SequentialSlice(module, segment.names), segment.layout)


def _examine(module: nn.Module) -> Found:
    found: list[Found] = []
    for segment in segments_of(module):
        reason = segment_obstacle(module, segment)
        body = None if reason is not None else SequentialSlice(module, segment.names)
        found.append(Found(reason, None if body is None else fused.operands_of(body, segment.layout)))
    return Found(next((f.obstacle for f in found if f.obstacle is not None), None), found)


def _segment_modules(module: nn.Module) -> list[nn.Module]:
    """The modules in all segments of ``module``."""
    children = [module._modules[name] for segment in segments_of(module) for name in segment.names]
    return [part for child in children for part in child.modules()]


_memory = Memory(_examine, _segment_modules, constant_names=[STATE])


def _run(x: Any, steps: Sequence[Step]) -> Any:
    if torch.compiler.is_compiling():
        return _run_chain(x, steps, None)
    updates = Updates()
    try:
        return _run_chain(x, steps, updates)
    finally:
        updates.make()


def _run_chain(x: Any, steps: Sequence[Step], updates: Updates | None) -> Any:
    """The result of ``steps`` on ``x``."""
    channels_last = kept = fused_output = False  # fused_output: whether a fused part made x
    dtype = statistics = next_found = None
    remaining = [*reversed(steps)]
    while remaining:
        step = remaining.pop()
        reason, operands = next_found or step.found()
        if reason is None:
            reason = (None if fused_output else fusion.chain_obstacle(x)) or step.obstacle(x)
        step.note(reason, operands)
        if reason is not None:
            if updates is not None:
                updates.make()
            if fused_output:
                x = fused.to_stock_format(x, dtype, channels_last, kept and not step.only_reads())
            x = step.stock(x)
            fused_output, statistics, next_found = False, None, None
            continue
        channels_last = fused.output_channels_last(operands, channels_last if fused_output else is_channels_last(x))
        dtype = fused.result_dtype(dtype if fused_output else x.dtype, x.device, step.layout)
        next_found = remaining[-1].found() if remaining else None
        if _can_run(next_found) and step.returns_all() and remaining[-1].obstacle(x) is None:
            later = remaining[-2].found() if len(remaining) > 1 else None
            both = fused.apply_both(operands, next_found.operands, x, statistics, _reads_statistics(later), updates)
            if both is not None:
                reader = remaining.pop()
                reader.note(None, next_found.operands)
                dtype = fused.result_dtype(dtype, x.device, reader.layout)
                channels_last = fused.output_channels_last(next_found.operands, channels_last)
                x, statistics = both
                fused_output, kept, next_found = True, False, later
                continue
        if updates is not None:
            updates.room.reader = _block_operands(next_found)
        output, statistics = fused.apply(operands, x, statistics, _reads_statistics(next_found), updates)
        returned = fused.returned_part(output, x, step.layout)
        kept = fused.keeps_output(operands) and returned is output
        if returned is not output:
            returned, statistics = copied(returned, channels_last or _can_run(next_found)), None
        x, fused_output = returned, True
    return fused.to_stock_format(x, dtype, channels_last, kept) if fused_output else x


def _can_run(found: Found | None) -> bool:
    """Whether there is a step, and it can run as one op."""
    return found is not None and found.obstacle is None


def _block_operands(found: Found | None) -> BlockOperands | None:
    """The operands of the step if it is a dense block that can run as one op, else None."""
    return found.operands if _can_run(found) and isinstance(found.operands, BlockOperands) else None


def _reads_statistics(found: Found | None) -> bool:
    """Whether there is a step that can run as one op and reads the statistics of its input."""
    return _can_run(found) and found.operands.reads_statistics
