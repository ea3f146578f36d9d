"""The backend in Triton, for float16, bfloat16 and float32 on NVIDIA GPUs of compute capability 8.0 and up.

What is shaped like a matrix product is a kernel here (``kernels/``, launched by the modules beside it). What is bound
by bandwidth alone is ``aten``'s. Triton itself is imported by the first call. With the environment variable
TRITON_INTERPRET=1 the kernels run on CPU tensors, in Triton's interpreter: slow, for tests.
"""

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Collection
from typing import Any

import torch

from densenet_fast.backends import nvidia
from densenet_fast.backends.aten import Aten
from densenet_fast.backends.triton import config, launch

MINIMUM_CAPABILITY = (8, 0)


class Launched:
    """A function of the contract that a module of this package has. The module is imported when the function is first
    asked for; the backend keeps the function."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, backend: object | None, owner: type) -> Callable[..., Any]:
        function = getattr(importlib.import_module(f"{__name__}.{self.module}"), self.name)
        if backend is not None:
            vars(backend)[self.name] = function
        return function


class Triton(Aten):
    """In Triton."""

    name = "triton"
    TAPS_FIRST = True

    interpreted = staticmethod(config.interpreted)

    @functools.cache  # noqa: B019
    def unavailable(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install 'densenet_fast[gpu]')"
        if self.interpreted():
            return None
        return nvidia.unavailable(MINIMUM_CAPABILITY)

    def describe(self) -> str:
        """Names the version, the devices that are left to another backend, and those with another's configurations."""
        version = f"Triton {importlib.metadata.version('triton')}"
        if self.interpreted():
            return f"{version}, interpreted"
        devices = [why or config.borrowed(i) for i, why in enumerate(nvidia.obstacles(MINIMUM_CAPABILITY))]
        return "; ".join([version, *filter(None, devices)])

    def dtypes(self, device_type: str) -> Collection[torch.dtype]:
        """Those of the meta device are there where launches are planned."""
        if device_type == "cpu":
            return (torch.float32, torch.float16) if self.interpreted() else ()
        served = device_type == "cuda" or (device_type == "meta" and launch.is_planning())
        return (torch.float32, torch.float16, torch.bfloat16) if served else ()

    def supports(self, device: torch.device, dtype: torch.dtype) -> bool:
        device = nvidia.meant(device)
        if dtype not in self.dtypes(device.type):
            return False
        return device.type != "cuda" or nvidia.serves(device, MINIMUM_CAPABILITY)

    bn_relu_conv1x1 = Launched("bn_relu_conv1x1")
    bn_relu_conv1x1_backward = Launched("bn_relu_conv1x1")
    bn_relu_conv3x3 = Launched("bn_relu_conv3x3")
    bn_relu_conv3x3_backward = Launched("bn_relu_conv3x3")
    bn_relu_pool_conv1x1 = Launched("bn_relu_pool_conv1x1")
    bn_relu_pool_conv1x1_backward = Launched("bn_relu_pool_conv1x1")


triton = Triton()
