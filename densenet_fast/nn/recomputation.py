"""Recomputation on stock layers: what torchvision's ``memory_efficient`` does, with running statistics updated once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densenet_fast.operands import active_transform


def recomputable(inputs: Sequence[Tensor]) -> bool:
    """Whether a backward pass through what is made of ``inputs`` may compute it again: where nothing is traced,
    compiled or transformed."""
    return (
        all(isinstance(x, Tensor) for x in inputs)
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in inputs)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and active_transform() is None
    )


def recomputed(function: Callable[..., Tensor], inputs: Sequence[Tensor], modules: Sequence[nn.Module]) -> Tensor:
    """``function(*inputs)``, which saves ``inputs`` alone and runs again in the backward pass; the buffers of
    ``modules`` stay then as they are."""
    return checkpoint(
        function, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _buffers_unchanged(modules))
    )


@contextmanager
def _buffers_unchanged(modules: Sequence[nn.Module]) -> Iterator[None]:
    own = [(part, dict(part._buffers)) for module in modules for part in module.modules()]
    for part, buffers in own:
        part._buffers.update((name, None if b is None else b.clone()) for name, b in buffers.items())
    try:
        yield
    finally:
        for part, buffers in own:
            part._buffers.update(buffers)
