"""A Sequential of converted parts: what it does when called.

Its children keep their classes. Some of them that follow each other may run as one op: the layers of a dense block that
has no module of its own, a stem, a head. Between parts that both run as ops feature maps stay channels last, and their
batch statistics are handed on; every other child gets and returns what it would in the stock network.
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
    """Children of a Sequential that follow each other and run as one op."""

    names: tuple[str, ...]
    layout: Layout
    """What they are; paths from the Sequential."""


class Stretch(nn.Sequential):
    """Some children of ``module`` as a Sequential of their own, which is registered nowhere."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self._modules.update({name: module._modules[name] for name in names})
        self.training = module.training


class FusedSequential(Converted):
    """A Sequential that holds converted parts, or keeps :class:`Segment` s."""

    def forward(self, input: Any) -> Any:
        if fusion.chain_obstacle(input) is None:
            return _through(input, _steps(self))
        for step in _steps(self, within=False):
            input = step.alone(input)
        return input


class Step:
    """One child of a Sequential."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.layout: Layout | None = vars(module).get(STATE) if isinstance(module, Fused) else None

    def found(self) -> Found:
        """Why it is not one op, or its operands."""
        if self.layout is None or fusion.has_hooks(self.module):
            return Found("it is a part of its own", None)
        return fused.structure(self.module, self.layout)

    def obstacle(self, x: Any) -> str | None:
        """Why it cannot run as its op on ``x``, or None."""
        return fusion.input_obstacle(x, self.layout.dims) or fused.autocast_obstacle(x.dtype, x.device, self.layout)

    def only_reads(self) -> bool:
        """Whether it leaves its input as it is in memory."""
        return is_norm(self.module) and not fusion.has_hooks(self.module)

    def returns_all(self) -> bool:
        """Whether it returns all that its op makes."""
        return not (isinstance(self.layout, BlockLayout) and self.layout.new_only)

    def alone(self, x: Any) -> Any:
        """As stock has it, or as a call of its own."""
        return self.module(x)

    stock = alone

    def note(self, reason: str | None, operands: Operands | None) -> None:
        """Remembers that it ran as one op; else the module is called, and says so itself."""
        if reason is None:
            calls.note(self.module, None, operands)


class SegmentStep(Step):
    """The children of a segment, the ``place``-th of the Sequential ``owner``; those of a stem with the ``convolution``
    before them, if it is a plain one."""

    def __init__(self, owner: nn.Module, segment: Segment, place: int, convolution: nn.Module | None) -> None:
        self.owner, self.segment, self.place, self.convolution = owner, segment, place, convolution
        self.layout = segment.layout

    def found(self) -> Found:
        if self.convolution is not None and fusion.has_hooks(self.convolution):
            return Found("its convolution has a hook or a forward of its own", None)
        reason, operands = layout.replaced(self.layout), None
        if reason is None:
            reason, operands = _memory(self.owner).operands[self.place]
        if reason is None and self.convolution is not None:
            operands = StemOperands(self.convolution, operands.operands)
        return Found(reason, operands)

    def only_reads(self) -> bool:
        return False

    def alone(self, x: Any) -> Any:
        reason, operands = fusion.environment_obstacle(x), None
        if reason is None:
            reason = self.obstacle(x)
        if reason is None:
            reason, operands = self.found()
        self.note(reason, operands)
        return self.stock(x) if reason is not None else fused.alone(x, operands, self.layout)

    def stock(self, x: Any) -> Any:
        if self.convolution is not None:
            x = self.convolution(x)
        for name in self.segment.names:
            x = self.owner._modules[name](x)
        return x

    def note(self, reason: str | None, operands: Operands | None) -> None:
        calls.note(self.owner, reason, operands, self.segment.names[0])


def _steps(module: nn.Module, within: bool = True) -> list[Step]:
    """The children of a Sequential in order, those of a segment as one; and instead of Sequentials among them, if asked
    to look ``within`` them, their children."""
    first = {segment.names[0]: (place, segment) for place, segment in enumerate(segments_of(module))}
    names, i = list(module._modules), 0
    steps: list[Step] = []
    while i < len(names):
        place, segment = first.get(names[i], (0, None))
        if segment is not None and names[i : i + len(segment.names)] == [*segment.names]:
            behind = bool(steps) and type(steps[-1]) is Step and _precedes(steps[-1].module, segment)
            steps.append(SegmentStep(module, segment, place, steps.pop().module if behind else None))
            i += len(segment.names)
            continue
        child = module._modules[names[i]]
        steps += _steps(child) if within and _is_chained(child) else [Step(child)]
        i += 1
    return steps


def _precedes(module: nn.Module, segment: Segment) -> bool:
    """Whether ``segment`` is a stem, and ``module`` a plain convolution that its op can start with."""
    if not isinstance(segment.layout, StemLayout):
        return False
    return type(module) is reference.CONVOLUTIONS[segment.layout.dims] and not fusion.has_hooks(module)


def _is_chained(module: nn.Module) -> bool:
    """Whether calling ``module`` is nothing but calling its children in turn, as :class:`FusedSequential` has it."""
    is_one = isinstance(module, FusedSequential) and type(module).forward is FusedSequential.forward
    return is_one and not fusion.has_hooks(module)


def segments_of(module: nn.Module) -> tuple[Segment, ...]:
    """Those that a Sequential keeps."""
    return vars(module).get(STATE, ()) if isinstance(module, FusedSequential) else ()


def follow_each_other(module: nn.Module, names: Sequence[str]) -> bool:
    """Whether the children ``names`` of ``module`` are there, one behind the other."""
    found = list(module._modules)
    start = found.index(names[0]) if names[0] in found else 0
    return found[start : start + len(names)] == [*names]


def segment_obstacle(module: nn.Module, segment: Segment) -> str | None:
    """Why the children of ``segment`` cannot run as one op, or None."""
    if not follow_each_other(module, segment.names):
        return f"its children {', '.join(segment.names)} do not follow each other any more"
    return layout.obstacle(Stretch(module, segment.names), segment.layout)


def _examined(module: nn.Module) -> Found:
    found: list[Found] = []
    for segment in segments_of(module):
        reason = segment_obstacle(module, segment)
        body = None if reason is not None else Stretch(module, segment.names)
        found.append(Found(reason, None if body is None else fused.gathered(body, segment.layout)))
    return Found(next((f.obstacle for f in found if f.obstacle is not None), None), found)


def _below(module: nn.Module) -> list[nn.Module]:
    """The modules of all segments."""
    children = [module._modules[name] for segment in segments_of(module) for name in segment.names]
    return [part for child in children for part in child.modules()]


_memory = Memory(_examined, _below, known=[STATE])


def _through(x: Any, steps: Sequence[Step]) -> Any:
    if torch.compiler.is_compiling():
        return _chained(x, steps, None)
    updates = Updates()
    try:
        return _chained(x, steps, updates)
    finally:
        updates.make()


def _chained(x: Any, steps: Sequence[Step], updates: Updates | None) -> Any:
    channels_last = kept = inside = False
    dtype = statistics = following = None
    left = [*reversed(steps)]
    while left:
        step = left.pop()
        reason, operands = following or step.found()
        if reason is None:
            reason = (None if inside else fusion.chain_obstacle(x)) or step.obstacle(x)
        step.note(reason, operands)
        if reason is not None:
            if updates is not None:
                updates.make()
            if inside:
                x = fused.handed_over(x, dtype, channels_last, kept and not step.only_reads())
            x = step.stock(x)
            inside, statistics, following = False, None, None
            continue
        channels_last = fused.after(operands, channels_last if inside else is_channels_last(x))
        dtype = fused.result_dtype(dtype if inside else x.dtype, x.device, step.layout)
        following = left[-1].found() if left else None
        if _runs(following) and step.returns_all() and left[-1].obstacle(x) is None:
            beyond = left[-2].found() if len(left) > 1 else None
            both = fused.apply_both(operands, following.operands, x, statistics, _is_described(beyond), updates)
            if both is not None:
                reader = left.pop()
                reader.note(None, following.operands)
                dtype = fused.result_dtype(dtype, x.device, reader.layout)
                channels_last = fused.after(following.operands, channels_last)
                x, statistics = both
                inside, kept, following = True, False, beyond
                continue
        if updates is not None:
            updates.room.reader = _block(following)
        made, statistics = fused.apply(operands, x, statistics, _is_described(following), updates)
        returned = fused.wanted(made, x, step.layout)
        kept = fused.keeps_output(operands) and returned is made
        if returned is not made:
            returned, statistics = copied(returned, channels_last or _runs(following)), None
        x, inside = returned, True
    return fused.handed_over(x, dtype, channels_last, kept) if inside else x


def _runs(found: Found | None) -> bool:
    """Whether there is a step, and it can run as one op."""
    return found is not None and found.obstacle is None


def _block(found: Found | None) -> BlockOperands | None:
    """The step's operands, if there is one, and it can run as one op and is a dense block."""
    return found.operands if _runs(found) and isinstance(found.operands, BlockOperands) else None


def _is_described(found: Found | None) -> bool:
    """Whether the step, if there is one, reads the statistics of its input."""
    return _runs(found) and found.operands.reads_statistics
