"""The backend in CUDA C++ for NVIDIA GPUs: what is bound by bandwidth, and the 3x3 convolution in half precision.

The other products are Triton's where it serves the device and the dtype, else ``aten``'s. Triton's functions launch the
3x3 convolution in CUDA C++ (``cuda_bn_relu_conv3x3``) where it is the faster.
"""

import functools
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends import cuda_bn_relu_conv3x3, cuda_kernels
from densenet_fast.backends.affine import DTYPES, Affine, Statistics
from densenet_fast.backends.aten import Aten, aten
from densenet_fast.backends.contract import Backend
from densenet_fast.backends.triton import triton


def _products(x: Tensor) -> Aten:
    """The backend whose products serve x."""
    return triton if triton.unavailable() is None and triton.supports(x.device, x.dtype) else aten


def _product(name: str) -> Callable[..., Any]:
    """The function of this name as the backend has it whose products serve the first argument."""

    def run(self: Aten, x: Tensor, *arguments: Any, **options: Any) -> Any:
        return getattr(_products(x), name)(x, *arguments, **options)

    return functools.update_wrapper(run, getattr(Backend, name), updated=())


class Cuda(Aten):
    """In CUDA C++."""

    name = "cuda"
    TAPS_FIRST = True

    unavailable = staticmethod(cuda_kernels.unavailable)
    supports = staticmethod(cuda_kernels.supports)

    def describe(self) -> str:
        """Names what makes the products."""
        kernels = "CUDA C++, emulated" if cuda_kernels.emulated() else "CUDA C++"
        others = triton.describe() if triton.unavailable() is None else "torch operations"
        return f"{kernels}; products by {others}"

    def dtypes(self, device_type: str) -> Collection[torch.dtype]:
        return DTYPES if device_type == "cuda" or (device_type == "cpu" and cuda_kernels.emulated()) else ()

    def has(self, function: str, dtype: torch.dtype, beside: Collection[Backend]) -> bool:
        """The 3x3 convolution is launched by Triton's functions."""
        if function.startswith("bn_relu_conv3x3"):
            return dtype in cuda_bn_relu_conv3x3.DTYPES and triton in beside
        return "conv" not in function and super().has(function, dtype, beside)

    channel_statistics = staticmethod(cuda_kernels.channel_statistics)
    append_features = staticmethod(cuda_kernels.append_features)
    finalise_gradient = staticmethod(cuda_kernels.finalise_gradient)
    bn_relu_maxpool = staticmethod(cuda_kernels.bn_relu_maxpool)
    bn_relu_maxpool_backward = staticmethod(cuda_kernels.bn_relu_maxpool_backward)
    bn_relu_global_avgpool = staticmethod(cuda_kernels.bn_relu_global_avgpool)
    bn_relu_global_avgpool_backward = staticmethod(cuda_kernels.bn_relu_global_avgpool_backward)
    prepare = staticmethod(cuda_kernels.prepare)
    update_running_statistics = staticmethod(cuda_kernels.update_running_statistics)

    bn_relu_conv1x1 = _product("bn_relu_conv1x1")
    bn_relu_conv1x1_backward = _product("bn_relu_conv1x1_backward")
    bn_relu_conv3x3_backward = _product("bn_relu_conv3x3_backward")
    bn_relu_pool_conv1x1 = _product("bn_relu_pool_conv1x1")
    bn_relu_pool_conv1x1_backward = _product("bn_relu_pool_conv1x1_backward")

    def bn_relu_conv3x3(
        self,
        x: Tensor,
        affine: Affine | None,
        weight: Tensor,
        bias: Tensor | None,
        grid: tuple[int, ...],
        out: Tensor,
        *,
        mask: Tensor | None = None,
        keep_scale: float = 1.0,
        statistics: Statistics | None = None,
    ) -> None:
        """Where torch convolves, dropout and statistics are still one pass of our own over what it made."""
        products: Any = triton if _products(x) is triton else super()
        products.bn_relu_conv3x3(
            x, affine, weight, bias, grid, out, mask=mask, keep_scale=keep_scale, statistics=statistics
        )


cuda = Cuda()
