"""What a converted module does when called: one op where it can, its own class's forward where it cannot.

A converted module's class is a subclass of its own, made here, that differs in ``forward``; pickles and copies make it
again from the original class.
"""

import copyreg
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from densenet_fast import functional
from densenet_fast.conversion.expected import RECOMPUTATION_FLAGS, STATE
from densenet_fast.conversion.layout import BlockLayout, Dropout, Layout, TransitionLayout, at, obstacle, replaced
from densenet_fast.nn import calls, fusion
from densenet_fast.nn.memory_format import copied, handed_out, is_channels_last
from densenet_fast.nn.snapshot import Found, Memory, all_below
from densenet_fast.operands import BlockOperands, ConvOperands
from densenet_fast.ops.stage import autocast_dtype

Operands = BlockOperands | ConvOperands


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
    """A dense block or a transition."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reason, operands = self._found(args, kwargs)
        calls.note(self, reason, operands)
        if reason is not None:
            return super().forward(*args, **kwargs)
        return run(self, args[0], operands=operands, contiguous=not is_channels_last(args[0]), kept=_keeps_output(self))

    def _found(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Found[Operands]:
        layout = self.__dict__.get(STATE)
        if layout is None:
            return Found("it was not converted", None)
        if kwargs or len(args) != 1:
            return Found("it was called with more than one tensor", None)
        return found(self, layout, args[0])


class FusedSequential(Converted):
    """A Sequential of blocks and transitions: between two that both run as ops, feature maps stay channels last; behind
    the last they have the memory format that the first one's input had."""

    def forward(self, input: Any) -> Any:
        modules, contiguous = list(self._modules.values()), None
        following = _operands(modules[0], input) if modules else None
        for module, follower in zip(modules, [*modules[1:], None]):
            operands = following
            if operands is None:
                input = module(input)
                following = _operands(follower, input)
                continue
            if contiguous is None:
                contiguous = not is_channels_last(input)
            following = _operands(follower, input)
            fused = following is not None
            calls.note(module, None, operands)
            read_only = fused or (isinstance(follower, _BatchNorm) and not fusion.has_hooks(follower))
            kept = _keeps_output(module) and not read_only
            input = run(module, input, operands=operands, contiguous=contiguous and not fused, kept=kept)
            if not fused:
                contiguous = None
        return input


def _operands(module: nn.Module | None, x: Any) -> Operands | None:
    """The operands of ``module``, if calling it on ``x`` is nothing but :func:`run`."""
    layout = module.__dict__.get(STATE) if isinstance(module, Fused) else None
    return None if layout is None or fusion.has_hooks(module) else found(module, layout, x).operands


def found(module: nn.Module, layout: Layout, x: Any) -> Found[Operands]:
    """Why a call of ``module`` with ``x`` cannot run as one op, or its operands."""
    reason = call_obstacle(x, layout) or replaced(layout)
    return _memory(module) if reason is None else Found(reason, None)


def _examined(module: nn.Module) -> Found[Operands]:
    layout = vars(module)[STATE]
    reason = obstacle(module, layout)
    return Found(reason, gathered(module, layout) if reason is None else None)


_memory = Memory(_examined, all_below, known=[STATE])


def run(module: nn.Module, x: Tensor, *, operands: Operands, contiguous: bool, kept: bool) -> Tensor:
    """``module`` as one op on ``x``; the result contiguous or else channels last in memory, and a copy if it is
    ``kept`` for the backward pass and may be changed in place, or a part of what the op makes."""
    layout = module.__dict__[STATE]

    def part(x: Tensor) -> Tensor:
        made = apply(operands, x)
        returned = wanted(made, x, layout)
        if returned is made:
            return handed_out(made, not contiguous, kept)
        return copied(returned, not contiguous)

    return fusion.run(part, x)


def _keeps_output(module: nn.Module) -> bool:
    return isinstance(module.__dict__[STATE], BlockLayout)


def apply(operands: Operands, x: Tensor) -> Tensor:
    """The op that takes ``operands``."""
    if isinstance(operands, BlockOperands):
        return functional.run_dense_block(x, operands)[0]
    return functional.run_bn_relu_conv1x1_avgpool(x, operands)[0]


def wanted(made: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """Of what the op ``made`` of ``x`` that which the module returns."""
    if not isinstance(layout, BlockLayout) or not layout.new_only:
        return made
    start, count = 0 if layout.prepend else x.shape[1], made.shape[1] - x.shape[1]
    return made.narrow(1, start, count)


def gathered(module: nn.Module, layout: Layout) -> Operands:
    """What the op that ``layout`` says ``module`` is takes: its tensors, modes and rates as they are now."""
    if isinstance(layout, TransitionLayout):
        return ConvOperands(fusion.unit(module, layout.unit.norm, layout.unit.conv))
    dropouts = [dropout for layer in layout.layers for dropout in layer.dropouts]
    if not any(layer.dropouts[:-1] != (None,) * (len(layer.units) - 1) for layer in layout.layers):
        dropouts = [layer.dropouts[-1] for layer in layout.layers]  # none behind the 1x1 convolutions
    return BlockOperands(
        [[fusion.unit(module, unit.norm, unit.conv) for unit in layer.units] for layer in layout.layers],
        [_rate(module, dropout) for dropout in dropouts],
        _recomputes(module, layout),
        any(dropout is not None and dropout.whole_channels for dropout in dropouts),
        layout.prepend,
    )


def _rate(block: nn.Module, dropout: Dropout | None) -> float:
    """The rate of a dropout in ``block`` now."""
    if dropout is None:
        return 0.0
    holder = at(block, dropout.path)
    return max(float(getattr(holder, dropout.rate)), 0.0) if holder.training else 0.0


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
    if dtype is None or given == torch.float64:
        return None
    if given != dtype:
        return f"under autocast stock keeps what is in {given}"
    if isinstance(layout, TransitionLayout) and layout.dims == 3 and device.type == "cpu":
        return "under autocast on CPUs stock pools volumes in float32"
    return None


def change_class(module: nn.Module, mixed_in: type[Converted], layout: Layout | None = None) -> None:
    """Makes ``module`` a converted one, in place."""
    module.__class__ = _subclass(mixed_in, type(module))
    if layout is not None:
        vars(module)[STATE] = layout


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
    return isinstance(module, Converted) and mixin(module) in (Fused, FusedSequential)


@functools.cache
def _subclass(mixed_in: type[Converted], own: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own)(own.__name__, (mixed_in, own), names)


def _new(own: type[nn.Module], mixed_in: type[Converted]) -> nn.Module:
    made = _subclass(mixed_in, own)
    return made.__new__(made)
