"""Every launch of a training step, counted, for a GPU that need not be there: the network runs on the meta device.

What torch launches besides is not among them: the first convolution, the classifier, the loss. ``torch_counts`` has the
least that the first two take.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import densenet_fast
from densenet_fast import backends, operands
from densenet_fast.backends.triton import config, launch
from densenet_fast.benchmarking.traffic import training_step
from launches.counts import Counts
from launches.stand_in import StandIn

__all__ = ["counted_step", "meta_network", "torch_counts"]

META = torch.device("meta")


def meta_network(arguments: dict[str, Any], dtype: torch.dtype, memory_efficient: bool = False) -> nn.Module:
    """``DenseNet(**arguments)`` as it trains under autocast to ``dtype``. Autocast knows no meta device: torch's own
    layers are in ``dtype``."""
    with META:
        model = densenet_fast.DenseNet(**arguments, memory_efficient=memory_efficient)
    model.features.conv0.to(dtype), model.classifier.to(dtype)
    return model.to(memory_format=torch.channels_last)


def counted_step(
    model: nn.Module, batch: int, size: int, dtype: torch.dtype, device: config.Device, native: bool = True
) -> list[Counts]:
    """The counts of each launch of a training step of a :func:`meta_network`, in order, without the optimizer's.

    Args:
        batch, size: of the images, [batch, 3, size, size].
        dtype: float16 or bfloat16, or float32 with TF32.
        device: that the launches are configured for.
        native: whether the 3x3 kernels are those in CUDA C++, where they serve, else Triton's.

    Raises:
        ValueError: products in full float32, which torch's libraries make.
    """
    if config.precision(dtype) == "ieee":
        raise ValueError("dtype: expected 16 bits, or TF32 for convolutions, got float32: torch's libraries convolve")
    from densenet_fast.backends.triton import shared

    stand_in = StandIn(device, native)
    images = torch.empty(batch, 3, size, size, dtype=dtype, device=META).to(memory_format=torch.channels_last)
    with (
        replaced(backends, "BACKENDS", (stand_in,)),
        replaced(shared, "_bound_by_bandwidth", lambda x: stand_in),
        replaced(operands, "autocast_dtype", lambda device: None if dtype == torch.float32 else dtype),
        config.assume(device),
        launch.planning(stand_in.take),
        torch.enable_grad(),
    ):
        model(images).sum().backward()
    return stand_in.counts


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` meanwhile."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def torch_counts(arguments: dict[str, Any], batch: int, size: int, itemsize: int, generation: int) -> list[Counts]:
    """What the first convolution and the classifier move and multiply at least: torch's libraries run them."""
    calls = training_step(arguments, batch, size, itemsize)
    instruction = "wgmma" if generation >= 90 else "mma"
    return [
        Counts(f"torch: {call.kernel}", call.part, read=call.bytes, asked=call.bytes, **{instruction: call.products})
        for call in calls
        if call.kernel.startswith(("conv0", "classifier"))
    ]
