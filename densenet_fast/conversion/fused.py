"""The class of a converted module: its ``forward`` runs one op where it can, else the original class's ``forward``.

The class is a subclass of the original one and is created here. Pickles and copies name the original class, and create
the subclass again.
"""

import copyreg
import functools
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast import functional
from densenet_fast.conversion.expected import RECOMPUTATION_FLAGS, STATE
from densenet_fast.conversion.layout import BlockLayout, Layout, current_rate, obstacle, replaced
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
    """The mixin of a converted module's class; the original class is the other base."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(max(protocol, 2))
        if reduced[0] is not copyreg.__newobj__:
            raise TypeError(
                f"densenet_fast.restore() the model first: {type(self).__name__} pickles in a way of its own"
            )
        return _new, (original_class(self), mixin(self)), *reduced[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by ``torch.jit.script``.

        Raises:
            NotImplementedError: always; the message says what to use instead.
        """
        raise NotImplementedError(
            "torch.jit.script: expected stock modules, got a converted model, whose fused ops have no TorchScript; "
            "script densenet_fast.restore(model) or densenet_fast.reference's network, or use "
            "torch.jit.trace(model, args), torch.export.export(model, args) or "
            "torch.onnx.export(model, args, dynamo=True)"
        )


class Fused(Converted):
    """A converted dense block, transition or stem."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reason, operands = self._examine_call(args, kwargs)
        calls.note(self, reason, operands)
        if reason is not None:
            return super().forward(*args, **kwargs)
        return run_alone(args[0], operands, self.__dict__[STATE])

    def _examine_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found:
        layout = self.__dict__.get(STATE)
        if layout is None:
            return Found("it was not converted", None)
        if kwargs or len(args) != 1:
            return Found("it was called with more than one tensor", None)
        return examine_call(self, layout, args[0])


def examine_call(module: nn.Module, layout: Layout, x: Any) -> Found:
    """The operands for a call of ``module`` with ``x``, or the reason why it cannot run as one op."""
    reason = call_obstacle(x, layout)
    return examine_structure(module, layout) if reason is None else Found(reason, None)


def examine_structure(module: nn.Module, layout: Layout) -> Found:
    """The operands for any call of ``module``, or the reason why none can run as one op."""
    reason = replaced(layout)
    return _memory(module) if reason is None else Found(reason, None)


def _examine(module: nn.Module) -> Found:
    layout = vars(module)[STATE]
    reason = obstacle(module, layout)
    return Found(reason, operands_of(module, layout) if reason is None else None)


_memory = Memory(_examine, all_below, constant_names=[STATE])


def run_alone(x: Tensor, operands: Operands, layout: Layout) -> Tensor:
    """Runs the part with this ``layout`` as one op on ``x``, outside a chain of fused parts.

    The result has the dtype and the memory format of the stock result. The caller may change it in place: it is a copy
    if the backward pass needs the op's output, or if that has more channels.
    """

    def part(x: Tensor) -> Tensor:
        channels_last = output_channels_last(operands, is_channels_last(x))
        output = apply(operands, x)[0]
        returned = returned_part(output, x, layout)
        if returned is not output:
            return copied(returned, channels_last)
        return to_stock_format(output, result_dtype(x.dtype, x.device, layout), channels_last, keeps_output(operands))

    return fusion.run(part, x)


def to_stock_format(x: Tensor, dtype: torch.dtype, channels_last: bool, kept: bool) -> Tensor:
    """``x`` in the stock result's ``dtype`` and memory format, for a reader that is no fused part.

    ``kept``: see :func:`densenet_fast.nn.memory_format.handed_out`.
    """
    if x.dtype != dtype:
        return x.to(dtype, memory_format=torch.preserve_format if channels_last else torch.contiguous_format)
    return handed_out(x, channels_last, kept) if x.dim() > 2 else x


def keeps_output(operands: Operands) -> bool:
    """Whether the backward pass of the op with these ``operands`` needs the op's output unchanged."""
    return isinstance(operands, BlockOperands)


def output_channels_last(operands: Operands, input_channels_last: bool) -> bool:
    """Whether the stock layers would return channels last, given whether their input is."""
    return input_channels_last if isinstance(operands, BlockOperands) else operands.channels_last(input_channels_last)


def apply(
    operands: Operands,
    x: Tensor,
    statistics: BatchStatistics | None = None,
    return_statistics: bool = False,
    updates: Updates | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    """Runs the op with these ``operands`` on ``x``, whose ``statistics`` are given if they are known.

    If asked to return the statistics of its result, it does so where the op computes them; else None.
    """
    if isinstance(operands, BlockOperands):
        return functional.run_dense_block(x, operands, statistics, return_statistics, updates)
    return operands.run(x, statistics, return_statistics, updates)


def apply_both(
    block: Operands,
    reader: Operands,
    x: Tensor,
    statistics: BatchStatistics | None,
    return_statistics: bool,
    updates: Updates | None,
) -> tuple[Tensor, BatchStatistics | None] | None:
    """Runs a dense block and the part that reads its result in one call, and returns what the reader returns.

    None if ``block`` is no dense block, or if the two have to be called one after the other.
    """
    second = None if isinstance(reader, BlockOperands) else reader.reads_block()
    if updates is None or second is None or not isinstance(block, BlockOperands):
        return None
    return functional.run_dense_block_and_reader(x, block, second, statistics, return_statistics, updates)


def returned_part(output: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """The channels of the op's ``output`` on ``x`` that the module returns."""
    if not isinstance(layout, BlockLayout) or not layout.new_only:
        return output
    start, count = 0 if layout.prepend else x.shape[1], output.shape[1] - x.shape[1]
    return output.narrow(1, start, count)


def operands_of(module: nn.Module, layout: Layout) -> Operands:
    """The operands of the op for ``module``: its current tensors, modes and rates."""
    if not isinstance(layout, BlockLayout):
        return layout.operands_of(module)
    dropouts = [dropout for layer in layout.layers for dropout in layer.dropouts]
    if not any(layer.dropouts[:-1] != (None,) * (len(layer.units) - 1) for layer in layout.layers):
        dropouts = [layer.dropouts[-1] for layer in layout.layers]  # no dropout behind 1x1 convolutions
    return BlockOperands(
        [[fusion.unit(module, unit.norm, unit.conv) for unit in layer.units] for layer in layout.layers],
        [current_rate(module, dropout) for dropout in dropouts],
        _recomputes(module, layout),
        any(dropout is not None and dropout.whole_channels for dropout in dropouts),
        layout.prepend,
    )


def _recomputes(block: nn.Module, layout: BlockLayout) -> list[bool]:
    """For each layer, whether a flag of the layer or of the block makes the backward pass recompute its bottleneck."""
    all_layers = _requests_recomputation(block)
    return [all_layers or _requests_recomputation(fusion.child(block, layer.path)) for layer in layout.layers]


def _requests_recomputation(module: nn.Module) -> bool:
    return any(module.__dict__.get(flag) for flag in RECOMPUTATION_FLAGS)


def call_obstacle(x: Any, layout: Layout) -> str | None:
    """Why a call with ``x`` cannot run as one op, whatever the module's children, or None."""
    reason = fusion.call_obstacle(x, layout.dims)
    if reason is not None:
        return reason
    return autocast_obstacle(x.dtype, x.device, layout)


def autocast_obstacle(input_dtype: torch.dtype, device: torch.device, layout: Layout) -> str | None:
    """Why a call with a tensor of dtype ``input_dtype`` cannot run as one op under autocast, or None."""
    dtype = autocast_dtype(device)
    if dtype in (None, input_dtype) or input_dtype == torch.float64 or layout.kind in ("Stem", "Head"):
        return None
    widened = layout.dims == 3 and device.type == "cpu" and input_dtype == torch.float32
    return None if widened else f"under autocast stock keeps what is in {input_dtype}"


def result_dtype(input_dtype: torch.dtype, device: torch.device, layout: Layout) -> torch.dtype:
    """The dtype of the stock result for an input of dtype ``input_dtype``.

    Under autocast, stock pools volumes on CPUs in float32, and concatenates in the widest dtype.
    """
    dtype = autocast_dtype(device)
    if dtype is None or input_dtype == torch.float64:
        return input_dtype
    if pools_volumes(layout) and device.type == "cpu":
        return torch.float32
    convolutions_only = layout.new_only if isinstance(layout, BlockLayout) else convolves(layout)
    return dtype if convolutions_only else input_dtype


def convolves(layout: Layout) -> bool:
    """Whether the result has the dtype of a convolution. A dense block's result has that of its input."""
    return not isinstance(layout, BlockLayout) and layout.convolves


def pools_volumes(layout: Layout) -> bool:
    """Whether the part ends with pooling of volumes."""
    return not isinstance(layout, BlockLayout) and layout.pools and layout.dims == 3


def change_class(module: nn.Module, mixed_in: type[Converted], state: Any = None) -> None:
    """Converts ``module`` in place, and stores ``state`` in it, if given."""
    module.__class__ = _subclass(mixed_in, type(module))
    if state is not None:
        vars(module)[STATE] = state


def revert(module: nn.Module) -> None:
    """Gives a converted module its original class back, in place."""
    module.__class__ = original_class(module)
    vars(module).pop(STATE, None)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a converted module before the conversion."""
    return type(module).__bases__[1]


def mixin(module: nn.Module) -> type[Converted]:
    """The subclass of :class:`Converted` that is a base of a converted module's class."""
    return type(module).__bases__[0]


def is_converted(module: nn.Module) -> bool:
    """Whether the class of ``module`` is one that :func:`change_class` sets, and was not changed again."""
    return isinstance(module, Converted) and mixin(module) in Converted.__subclasses__()


@functools.cache
def _subclass(mixed_in: type[Converted], original: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    return type(original)(original.__name__, (mixed_in, original), names)


def _new(original: type[nn.Module], mixed_in: type[Converted]) -> nn.Module:
    subclass = _subclass(mixed_in, original)
    return subclass.__new__(subclass)
