"""Whether a module computes what its layout says: it is run on random numbers beside the op.

Modules do not tell what their ``forward`` does with them. So a candidate is copied in float64 onto the CPU, with random
parameters and running statistics and without hooks, and run by its own ``forward`` in training and in inference; the op
that would replace it must make the same outputs and the same buffers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from densenet_fast import reference
from densenet_fast.conversion.fused import apply
from densenet_fast.conversion.layout import BlockLayout, Layout
from densenet_fast.nn import fusion

SPATIAL = {1: (7,), 2: (5, 4), 3: (3, 4, 2)}
TOLERANCE = 1e-8
"""Relative; what rounding makes in float64 is less, another eps or order of features more."""


def differs(module: nn.Module, layout: Layout) -> str | None:
    """Why ``module`` does not compute what ``layout`` says, or None if it does."""
    generator, state, threads = (
        torch.Generator("cpu").manual_seed(0),
        torch.default_generator.get_state(),
        torch.get_num_threads(),
    )
    units = layout.layers[0].units if isinstance(layout, BlockLayout) else [layout.unit]
    channels = fusion.child(module, units[0].conv).in_channels
    torch.set_num_threads(1)  # too little work to divide
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
            x = torch.randn(2, channels, *SPATIAL[layout.dims], generator=generator, dtype=torch.float64)
            clones = Clones(module, layout, generator)
            for training in (True, False):
                stock, ours = clones.make(training), clones.make(training)
                torch.default_generator.manual_seed(0)
                try:
                    expected = stock.forward(x.clone())
                except Exception as error:
                    return (
                        f"its forward failed on one tensor: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    )
                torch.default_generator.manual_seed(0)
                got = apply(ours, layout, x)
                pairs = zip([got, *ours.buffers()], [expected, *stock.buffers()])
                if not all(_same(a, b) for a, b in pairs):
                    return f"its forward computes something else{' in training' if training else ''}"
    finally:
        torch.default_generator.set_state(state)
        torch.set_num_threads(threads)
    return None


def _same(got: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or got.shape != expected.shape:
        return False
    if not got.dtype.is_floating_point:
        return got.equal(expected)
    return bool((got - expected).norm() <= TOLERANCE * expected.norm())


class Clones:
    """Copies of a module with the same random tensors, parameters shared and buffers their own, and without hooks."""

    def __init__(self, module: nn.Module, layout: Layout, generator: torch.Generator) -> None:
        self.module, self.layout, self.generator = module, layout, generator
        self.values: dict[int, Tensor] = {}

    def make(self, training: bool) -> nn.Module:
        """One copy, with dropout at a rate that shows."""
        clone = self._copy(self.module, {})
        for part in clone.modules():
            part.training = training
            if type(part) in fusion.SYNC_BATCH_NORMS:
                part.__class__ = reference.BATCH_NORMS[self.layout.dims]
        for layer in self.layout.layers if isinstance(self.layout, BlockLayout) else ():
            if layer.dropout is not None:
                fusion.child(clone, layer.dropout).p = 0.5
            elif layer.drop_rate is not None:
                setattr(fusion.child(clone, layer.path), layer.drop_rate, 0.5)
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
            self.values[id(tensor)] = _random(tensor, name, isinstance(module, _BatchNorm), self.generator)
        return None if tensor is None else self.values[id(tensor)]


def _random(tensor: Tensor, name: str, of_norm: bool, generator: torch.Generator) -> Tensor:
    if not tensor.dtype.is_floating_point:
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    if name == "running_var":
        return values.square() + 0.5
    if of_norm:
        return values + 1 if name == "weight" else values
    return values / max(tensor[:1].numel(), 1) ** 0.5
