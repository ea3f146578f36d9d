"""Tests whether a module computes what its layout says, by running it and the op on the same random numbers.

A module's children do not show what its ``forward`` does with them. So the module is copied to the CPU in float64, with
random parameters and running statistics and without hooks. The copy runs its own ``forward``, in training and in
inference. The op that would replace it must return the same output and update the buffers in the same way.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from densenet_fast import reference
from densenet_fast.conversion.fused import apply, operands_of, returned_part
from densenet_fast.conversion.layout import BlockLayout, Layout, module_at
from densenet_fast.nn import fusion

SPATIAL = {1: (7,), 2: (5, 4), 3: (3, 4, 2)}
STEM_SPATIAL = {1: (19,), 2: (13, 16), 3: (9, 8, 11)}
TOLERANCE = 1e-8
"""Relative. Rounding in float64 stays below it; another eps or another order of features exceeds it."""

DROP_RATES = (0.5, 0.25)
"""Behind the first and behind the last unit of a layer. They differ, so that an exchange of the two is noticed."""


def differs(module: nn.Module, layout: Layout, modes: Sequence[bool] = (True, False)) -> str | None:
    """How ``module`` differs from ``layout`` in these ``modes``, training (True) and inference (False), or None."""
    generator, state, threads = (
        torch.Generator("cpu").manual_seed(0),
        torch.default_generator.get_state(),
        torch.get_num_threads(),
    )
    sizes = (STEM_SPATIAL if layout.kind == "Stem" else SPATIAL)[layout.dims]
    torch.set_num_threads(1)  # the work is too small to divide
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            x = torch.randn(2, layout.channels(module), *sizes, generator=generator, dtype=torch.float64)
            clones = Clones(module, layout, generator)
            for training in modes:
                runs = _Runs(clones, x, training, DROP_RATES)
                if runs.error is not None:
                    return f"its forward failed on one tensor: {runs.error}"
                if not runs.agree():
                    difference, advice = _difference(runs, clones)
                    return f"its forward {difference}{' in training' if training else ''}{advice}"
    finally:
        torch.default_generator.set_state(state)
        torch.set_num_threads(threads)
    return None


class _Runs:
    """The results on ``x`` of a copy of the module and of a copy that runs as the op, with the same dropout masks."""

    def __init__(self, clones: "Clones", x: Tensor, training: bool, drop_rates: Sequence[float]) -> None:
        self.x, self.training, self.error = x, training, None
        stock, fused = clones.make(training, drop_rates), clones.make(training, drop_rates)
        torch.default_generator.manual_seed(0)
        try:
            self.expected = stock.forward(x.clone())
        except Exception as error:
            self.error = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return
        torch.default_generator.manual_seed(0)
        self.got = returned_part(apply(operands_of(fused, clones.layout), x)[0], x, clones.layout)
        self.buffers = list(zip(fused.buffers(), stock.named_buffers()))

    def agree(self) -> bool:
        """Whether both have the same output and the same buffers."""
        return self.error is None and _same(self.got, self.expected) and self.different_buffer() is None

    def different_buffer(self) -> str | None:
        """The name of a buffer that differs, or None."""
        return next((name for fused, (name, stock) in self.buffers if not _same(fused, stock)), None)


def _difference(runs: _Runs, clones: "Clones") -> tuple[str, str]:
    """How the module's forward differs from the op, and how to change it."""
    got, expected = runs.got, runs.expected
    if not isinstance(expected, Tensor):
        return f"returns a {type(expected).__name__}, not a feature map", ""
    block = isinstance(clones.layout, BlockLayout)
    if _same(got, expected):
        return f"updates {runs.different_buffer()} otherwise", ""
    if _Runs(clones, runs.x, runs.training, (0.0, 0.0)).agree():
        places = PLACES if block else PLACE
        return ("drops out in another place or in another way", places) if runs.training else ("drops out", INFERENCE)
    if block and _is_reordered(clones, runs):
        return "orders the features otherwise", ORDERS
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return f"returns {_kind(expected)} where {_kind(got)} was expected", ""
    return "computes something else", "" if block else COMPUTED[clones.layout.kind]


ORDERS = (
    ": let every layer make torch.cat([x, new], 1), or every one torch.cat([new, x], 1), and return the last of these, "
    "or of its channels those that are new"
)
PLACE = ": let it stand between the convolution and the pool"
COMPUTED = {
    "Transition": ": let it be batch normalisation, ReLU, a 1x1 convolution and an average over 2, in this order",
    "BNReLUConv1x1": ": let it be batch normalisation, ReLU and a 1x1 convolution, in this order",
    "Stem": ": let it be a convolution, batch normalisation, ReLU and a maximum over 3, in this order",
    "Head": ": let it be batch normalisation, ReLU, a mean over all pixels and a flattening, in this order",
}
INFERENCE = " in inference too: hand training=self.training to its dropout"
PLACES = ": let it stand behind convolutions, before the concatenation, at the same places in all layers"


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of {tensor.dtype}"


def _is_reordered(clones: "Clones", runs: _Runs) -> bool:
    """Whether the module makes the same features as the op, but returns them in another order.

    Only for layouts that append new features. The block's input may also be between the new features. If the layers
    read their features in another order, they make other features, and the answer is False.
    """
    layout, expected, widths = clones.layout, runs.expected, clones.widths()
    if layout.prepend or layout.new_only or expected.dtype != runs.got.dtype or expected.dim() != runs.got.dim():
        return False
    width, channels = widths[0], expected.shape[1]
    if any(_same(runs.x, expected[:, start : start + width]) for start in range(1, channels - width)):
        return True
    parts, start = list(runs.got.split(widths, 1)), 0
    if channels == sum(widths[1:]):
        del parts[0]
    while parts:
        found = next((i for i, p in enumerate(parts) if _same(p, expected[:, start : start + p.shape[1]])), None)
        if found is None:
            return False
        start += parts.pop(found).shape[1]
    return start == channels


def _same(got: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if not got.dtype.is_floating_point:
        return got.equal(expected)
    return bool((got - expected).norm() <= TOLERANCE * expected.norm())


class Clones:
    """Copies of a module without hooks. They share random parameters; each has its own copy of random buffers."""

    def __init__(self, module: nn.Module, layout: Layout, generator: torch.Generator) -> None:
        self.module, self.layout, self.generator = module, layout, generator
        self.values: dict[int, Tensor] = {}

    def widths(self) -> list[int]:
        """The number of channels of a block's input, then the number that each layer makes."""
        convs = [[fusion.child(self.module, unit.conv) for unit in layer.units] for layer in self.layout.layers]
        return [convs[0][0].in_channels, *(layer[-1].out_channels for layer in convs)]

    def make(self, training: bool, drop_rates: Sequence[float]) -> nn.Module:
        """A copy with these dropout rates behind the first and the last unit of each layer."""
        clone = self._copy(self.module, {})
        for part in clone.modules():
            part.training = training
            if type(part) in fusion.SYNC_BATCH_NORMS:
                part.__class__ = reference.BATCH_NORMS[self.layout.dims]
            elif isinstance(part, nn.SyncBatchNorm) and training and torch.distributed.is_initialized():
                part.__class__ = _local_norm(self.layout.dims)
        block = isinstance(self.layout, BlockLayout)
        for dropout in () if block else self.layout.dropouts():
            setattr(module_at(clone, dropout.path), dropout.rate, drop_rates[0])
        for layer in self.layout.layers if block else ():
            for dropout, rate in zip(reversed(layer.dropouts), reversed(drop_rates)):
                if dropout is not None:
                    setattr(module_at(clone, dropout.path), dropout.rate, rate)
        return clone

    def _copy(self, module: nn.Module, copies: dict[int, nn.Module]) -> nn.Module:
        if id(module) in copies:
            return copies[id(module)]
        clone = copies[id(module)] = type(module).__new__(type(module))
        clone.__dict__.update(vars(module))
        clone.__dict__.update(vars(nn.Module()))
        for name, parameter in module._parameters.items():
            clone._parameters[name] = self._value(module, name, parameter)
        for name, buffer in module._buffers.items():
            value = self._value(module, name, buffer)
            clone._buffers[name] = None if value is None else value.clone()
        for name, child in module._modules.items():
            clone._modules[name] = None if child is None else self._copy(child, copies)
        return clone

    def _value(self, module: nn.Module, name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and id(tensor) not in self.values:
            self.values[id(tensor)] = _random(tensor, name, _is_norm(module), self.generator)
        return None if tensor is None else self.values[id(tensor)]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) or fusion.is_frozen_norm(module)


@functools.cache
def _local_norm(dims: int) -> type[nn.Module]:
    """A class of batch normalisations that are not synchronised. They apply their children, such as an activation, too.

    It replaces subclasses of ``nn.SyncBatchNorm``, which refuse CPU tensors in a process group.
    """

    class LocalNorm(reference.BATCH_NORMS[dims]):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            for child in self._modules.values():
                x = child(x)
            return x

    return LocalNorm


def _random(tensor: Tensor, name: str, of_norm: bool, generator: torch.Generator) -> Tensor:
    """Random float64 values for the parameter or buffer ``name``, in the range of a trained network."""
    if not tensor.dtype.is_floating_point:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if name == "running_var":
        return values.square() + 0.5
    if of_norm:
        return values + 1 if name == "weight" else values
    return values / max(tensor[:1].numel(), 1) ** 0.5
