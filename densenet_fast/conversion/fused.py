"""What a converted module does when called: one op where it can, its own class's forward where it cannot.

A converted module's class is a subclass of its own, made here, that differs in ``forward``; pickles and copies make it
again from the original class.
"""

import copyreg
import functools
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast import functional
from densenet_fast.conversion.expected import RECOMPUTATION_FLAGS, STATE
from densenet_fast.conversion.layout import BlockLayout, Layout, obstacle, rate_now, replaced
from densenet_fast.conversion.stem import HeadOperands, StemOperands
from densenet_fast.conversion.transition import TransitionOperands
from densenet_fast.functional import BatchStatistics, Updates
from densenet_fast.nn import calls, fusion
from densenet_fast.nn.memory_format import copied, handed_out, is_channels_last
from densenet_fast.nn.snapshot import Found, Memory, all_below
from densenet_fast.operands import BlockOperands
from densenet_fast.ops.stage import autocast_dtype

Operands = BlockOperands | TransitionOperands | StemOperands | HeadOperands


class Converted(nn.Module):
    """Mixed into a converted module's class, before the class it had."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(max(protocol, 2))
        if reduced[0] is not copyreg.__newobj__:
            raise TypeError(
                f"densenet_fast.restore() the model first: {type(self).__name__} pickles in a way of its own"
            )
        return _new, (own_class(self), mixin(self)), *reduced[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` calls first.

        Raises:
            NotImplementedError: always, and says what to use instead.
        """
        raise NotImplementedError(
            "torch.jit.script: expected stock modules, got a converted model, whose fused ops have no TorchScript; "
            "script densenet_fast.restore(model) or densenet_fast.reference's network, or use "
            "torch.jit.trace(model, args), torch.export.export(model, args) or "
            "torch.onnx.export(model, args, dynamo=True)"
        )


class Fused(Converted):
    """A dense block, a transition or a stem."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reason, operands = self._found(args, kwargs)
        calls.note(self, reason, operands)
        if reason is not None:
            return super().forward(*args, **kwargs)
        return alone(args[0], operands, self.__dict__[STATE])

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
        layout = self.__dict__.get(STATE)
        if layout is None:
            return Found("it was not converted", None)
        if kwargs or len(args) != 1:
            return Found("it was called with more than one tensor", None)
        return found(self, layout, args[0])


def found(module: nn.Module, layout: Layout, x: Any) -> Found:
    """Why a call of ``module`` with ``x`` cannot run as one op, or its operands."""
    reason = call_obstacle(x, layout)
    return structure(module, layout) if reason is None else Found(reason, None)


def structure(module: nn.Module, layout: Layout) -> Found:
    """Why no call of ``module`` can run as one op, or its operands."""
    reason = replaced(layout)
    return _memory(module) if reason is None else Found(reason, None)


def _examined(module: nn.Module) -> Found:
    layout = vars(module)[STATE]
    reason = obstacle(module, layout)
    return Found(reason, gathered(module, layout) if reason is None else None)


_memory = Memory(_examined, all_below, known=[STATE])


def alone(x: Tensor, operands: Operands, layout: Layout) -> Tensor:
    """The part that ``layout`` describes as one op on ``x``: in the memory format that stock's result would have, and a
    copy if it is kept for the backward pass and may be changed in place, or a part of what the op makes."""

    def part(x: Tensor) -> Tensor:
        channels_last = after(operands, is_channels_last(x))
        made = apply(operands, x)[0]
        returned = wanted(made, x, layout)
        if returned is not made:
            return copied(returned, channels_last)
        return handed_over(made, result_dtype(x.dtype, x.device, layout), channels_last, keeps_output(operands))

    return fusion.run(part, x)


def handed_over(x: Tensor, dtype: torch.dtype, channels_last: bool, kept: bool) -> Tensor:
    """``x`` for who is no fused part, in the dtype and the memory format that stock's would have; ``kept`` as in
    :func:`handed_out`."""
    if x.dtype != dtype:
        return x.to(dtype, memory_format=torch.preserve_format if channels_last else torch.contiguous_format)
    return handed_out(x, channels_last, kept) if x.dim() > 2 else x


def keeps_output(operands: Operands) -> bool:
    """Whether the backward pass needs the output of the op that takes ``operands`` unchanged."""
    return isinstance(operands, BlockOperands)


def after(operands: Operands, before: bool) -> bool:
    """Whether stock's output would be channels last, if its input is so ``before``."""
    return before if isinstance(operands, BlockOperands) else operands.channels_last(before)


def apply(
    operands: Operands,
    x: Tensor,
    statistics: BatchStatistics | None = None,
    describe: bool = False,
    updates: Updates | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    """The op that takes ``operands``, with its result's statistics if it is to be described and they are known."""
    if isinstance(operands, BlockOperands):
        return functional.run_dense_block(x, operands, statistics, describe, updates)
    return operands.run(x, statistics, describe, updates)


def apply_both(
    block: Operands,
    reader: Operands,
    x: Tensor,
    statistics: BatchStatistics | None,
    describe: bool,
    updates: Updates | None,
) -> tuple[Tensor, BatchStatistics | None] | None:
    """A dense block and what reads its result as one call, from which :func:`apply` would return that of the second;
    None where they are not that, or have to be called one after the other."""
    behind = None if isinstance(reader, BlockOperands) else reader.reads_block()
    if updates is None or behind is None or not isinstance(block, BlockOperands):
        return None
    return functional.run_dense_block_and_reader(x, block, behind, statistics, describe, updates)


def wanted(made: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Of what the op ``made`` of ``x`` that which the module returns."""
    if not isinstance(layout, BlockLayout) or not layout.new_only:
        return made
    start, count = 0 if layout.prepend else x.shape[1], made.shape[1] - x.shape[1]
    return made.narrow(1, start, count)


def gathered(module: nn.Module, layout: Layout) -> Operands:
    """What the op that ``layout`` says ``module`` is takes: its tensors, modes and rates as they are now."""
    if not isinstance(layout, BlockLayout):
        return layout.gathered(module)
    dropouts = [dropout for layer in layout.layers for dropout in layer.dropouts]
    if not any(layer.dropouts[:-1] != (None,) * (len(layer.units) - 1) for layer in layout.layers):
        dropouts = [layer.dropouts[-1] for layer in layout.layers]  # none behind the 1x1 convolutions
    return BlockOperands(
        [[fusion.unit(module, unit.norm, unit.conv) for unit in layer.units] for layer in layout.layers],
        [rate_now(module, dropout) for dropout in dropouts],
        _recomputes(module, layout),
        any(dropout is not None and dropout.whole_channels for dropout in dropouts),
        layout.prepend,
    )


def _recomputes(block: nn.Module, layout: BlockLayout) -> list[bool]:
    """Of each layer, whether it or the block asks for its bottleneck to be recomputed in the backward pass."""
    whole = _asks(block)
    return [whole or _asks(fusion.child(block, layer.path)) for layer in layout.layers]


def _asks(holder: nn.Module) -> bool:
    return any(holder.__dict__.get(flag) for flag in RECOMPUTATION_FLAGS)


def call_obstacle(x: Any, layout: Layout) -> str | None:
    """Why a call with ``x`` cannot run as one op whatever the module's structure, or None."""
    reason = fusion.call_obstacle(x, layout.dims)
    if reason is not None:
        return reason
    return autocast_obstacle(x.dtype, x.device, layout)


def autocast_obstacle(given: torch.dtype, device: torch.device, layout: Layout) -> str | None:
    """Why autocast, if it is on, keeps a call with a tensor of dtype ``given`` from running as one op, or None."""
    dtype = autocast_dtype(device)
    if dtype in (None, given) or given == torch.float64 or layout.kind in ("Stem", "Head"):
        return None
    widened = layout.dims == 3 and device.type == "cpu" and given == torch.float32
    return None if widened else f"under autocast stock keeps what is in {given}"


def result_dtype(given: torch.dtype, device: torch.device, layout: Layout) -> torch.dtype:
    """The dtype of stock's result for a tensor of dtype ``given``. Under autocast on CPUs it pools volumes in float32,
    and concatenates in the widest dtype."""
    dtype = autocast_dtype(device)
    if dtype is None or given == torch.float64:
        return given
    if pools_volumes(layout) and device.type == "cpu":
        return torch.float32
    makes_all = layout.new_only if isinstance(layout, BlockLayout) else convolves(layout)
    return dtype if makes_all else given


def convolves(layout: Layout) -> bool:
    """Whether the result's dtype is that of a convolution. A block's is that of its input."""
    return not isinstance(layout, BlockLayout) and layout.convolves


def pools_volumes(layout: Layout) -> bool:
    """Whether it ends with a pool of volumes."""
    return not isinstance(layout, BlockLayout) and layout.pools and layout.dims == 3


def change_class(module: nn.Module, mixed_in: type[Converted], state: Any = None) -> None:
    """Makes ``module`` a converted one, in place, which keeps ``state``, if it is given."""
    module.__class__ = _subclass(mixed_in, type(module))
    if state is not None:
        vars(module)[STATE] = state


def revert(module: nn.Module) -> None:
    """Gives a converted module its own class back, in place."""
    module.__class__ = own_class(module)
    vars(module).pop(STATE, None)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a converted module had."""
    return type(module).__bases__[1]


def mixin(module: nn.Module) -> type[Converted]:
    """What makes its class a converted module's."""
    return type(module).__bases__[0]


def is_converted(module: nn.Module) -> bool:
    """Whether its class was made here, and has not been changed since."""
    return isinstance(module, Converted) and mixin(module) in Converted.__subclasses__()


@functools.cache
def _subclass(mixed_in: type[Converted], own: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own)(own.__name__, (mixed_in, own), names)


def _new(own: type[nn.Module], mixed_in: type[Converted]) -> nn.Module:
    made = _subclass(mixed_in, own)
    return made.__new__(made)
