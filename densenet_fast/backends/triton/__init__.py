"""The kernels in Triton, for float16, bfloat16 and float32 on NVIDIA GPUs of compute capability 8.0 and up.

Functions, arguments and results are those of ``aten``. What is shaped like a matrix product is a kernel here
(``kernels/``, launched by the modules beside it); what is bound by bandwidth alone is ``aten``'s. Triton itself is
imported by the first call. With the environment variable TRITON_INTERPRET=1 the kernels run on CPU tensors, in Triton's
interpreter: slow, for tests.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from densenet_fast.backends import nvidia
from densenet_fast.backends.aten import (
    append_features,
    bn_relu_global_avgpool,
    bn_relu_global_avgpool_backward,
    bn_relu_maxpool,
    bn_relu_maxpool_backward,
    channel_statistics,
    finalise_gradient,
    prepare,
    update_running_statistics,
)
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.config import interpreted

__all__ = [
    "TAPS_FIRST",
    "append_features",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_backward",
    "bn_relu_conv3x3",
    "bn_relu_conv3x3_backward",
    "bn_relu_global_avgpool",
    "bn_relu_global_avgpool_backward",
    "bn_relu_maxpool",
    "bn_relu_maxpool_backward",
    "bn_relu_pool_conv1x1",
    "bn_relu_pool_conv1x1_backward",
    "channel_statistics",
    "describe",
    "finalise_gradient",
    "name",
    "prepare",
    "supports",
    "unavailable",
    "update_running_statistics",
]

name = "triton"

TAPS_FIRST = True

MINIMUM_CAPABILITY = (8, 0)

MODULES = {
    "bn_relu_conv1x1": "conv1x1",
    "bn_relu_conv1x1_backward": "conv1x1",
    "bn_relu_conv3x3": "conv3x3",
    "bn_relu_conv3x3_backward": "conv3x3",
    "bn_relu_pool_conv1x1": "transition",
    "bn_relu_pool_conv1x1_backward": "transition",
}
"""Where each function is, imported when it is first asked for."""


@functools.cache
def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'densenet_fast[gpu]')"
    if interpreted():
        return None
    return nvidia.unavailable(MINIMUM_CAPABILITY)


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this backend has kernels for ``dtype`` on ``device``; on the meta device, where launches are planned."""
    device = nvidia.meant(device)
    if device.type == "cpu":
        return interpreted() and dtype in (torch.float32, torch.float16)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    return launch.is_planning() if device.type == "meta" else nvidia.serves(device, MINIMUM_CAPABILITY)


def describe() -> str:
    """What the kernels are made of, the devices they leave to another backend, and what is configured for another."""
    version = f"Triton {importlib.metadata.version('triton')}"
    if interpreted():
        return f"{version}, interpreted"
    devices = [why or config.borrowed(i) for i, why in enumerate(nvidia.obstacles(MINIMUM_CAPABILITY))]
    return "; ".join([version, *filter(None, devices)])


def __getattr__(attribute: str) -> Callable[..., Any]:
    if attribute not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")
    function = getattr(importlib.import_module(f"{__name__}.{MODULES[attribute]}"), attribute)
    globals()[attribute] = function
    return function
