"""Recomputation on stock layers, as torchvision's ``memory_efficient`` does it, but with running statistics updated
once. Also recomputation of the stem's convolution."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from densenet_fast.nn.memory_format import convolved
from densenet_fast.operands import active_transform
from densenet_fast.ops.op import saved_tensors_are_looked_at
from densenet_fast.ops.stage import autocast_dtype


def recomputable(inputs: Sequence[Tensor]) -> bool:
    """Whether a backward pass may recompute what is made of ``inputs``: where nothing is traced, compiled or
    transformed."""
    return (
        all(isinstance(x, Tensor) for x in inputs)
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in inputs)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and active_transform() is None
    )


def recomputed(function: Callable[..., Tensor], inputs: Sequence[Tensor], modules: Sequence[nn.Module]) -> Tensor:
    """Returns ``function(*inputs)``. It saves ``inputs`` alone and runs again in the backward pass, which leaves the
    buffers of ``modules`` as they are."""
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


@contextmanager
def convolution_recomputed(convolution: nn.Module, images: Tensor, made: Tensor) -> Iterator[None]:
    """A context in which no op keeps ``made`` for its backward pass. The plain ``convolution`` made it of ``images``.

    The backward pass makes it again, differentiably if it is differentiated itself.

    Raises:
        RuntimeError: in the backward pass, if the images or the convolution's parameters were exchanged or changed in
            place.
    """
    if saved_tensors_are_looked_at() or images.is_inference() or not (recomputable([made]) and type(images) is Tensor):
        yield
        return

    def sources() -> list[tuple[int, int]]:
        own = (images, convolution.weight, convolution.bias)
        return [(id(t), t._version) for t in own if t is not None]

    dtype, kind, before = autocast_dtype(images.device), images.device.type, sources()
    place, shape = made.data_ptr(), made.shape

    def again() -> Tensor:
        if sources() != before:
            raise RuntimeError(
                "the stem's images or its convolution's parameters have been modified by an inplace operation or "
                "exchanged since the forward pass, and memory_efficient recomputes the convolution from them"
            )
        known = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, dtype, enabled=dtype is not None) if known else nullcontext():
            return convolved(convolution, images)

    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: again if t.data_ptr() == place and t.shape == shape else t,
        lambda kept: again() if kept is again else kept,
    ):
        yield
