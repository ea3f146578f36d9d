"""The kernels for NVIDIA GPUs: those of ``cuda_kernels`` for what is bound by bandwidth; for the products
Triton's where it serves the device and dtype, else ``aten``'s, dropout and statistics in one pass over what they made.
Functions, arguments and results are those of ``aten``.
"""

from types import ModuleType
from typing import Any

from torch import Tensor

from densenet_fast.backends import aten, cuda_kernels, triton
from densenet_fast.backends.affine import Affine, Statistics, bn_relu
from densenet_fast.backends.cuda_kernels import (
    append_features,
    bn_relu_global_avgpool,
    bn_relu_global_avgpool_backward,
    bn_relu_maxpool,
    bn_relu_maxpool_backward,
    channel_statistics,
    finalise_gradient,
    prepare,
    supports,
    unavailable,
    update_running_statistics,
)
from densenet_fast.backends.spatial import convolve

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

name = "cuda"

TAPS_FIRST = True


def describe() -> str:
    """What the kernels are made of."""
    kernels = "CUDA C++, emulated" if cuda_kernels.emulated() else "CUDA C++"
    products = f"products by {triton.describe()}" if triton.unavailable() is None else "products by torch operations"
    return f"{kernels}; {products}"


def _products(x: Tensor) -> ModuleType:
    return triton if triton.unavailable() is None and triton.supports(x.device, x.dtype) else aten


def bn_relu_conv1x1(x: Tensor, *arguments: Any, **options: Any) -> Any:
    return _products(x).bn_relu_conv1x1(x, *arguments, **options)


def bn_relu_conv1x1_backward(grad: Tensor, *arguments: Any, **options: Any) -> Any:
    return _products(grad).bn_relu_conv1x1_backward(grad, *arguments, **options)


def bn_relu_conv3x3(
    x: Tensor,
    affine: Affine | None,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, ...],
    out: Tensor,
    mask: Tensor | None,
    keep_scale: float,
    statistics: Statistics | None,
) -> None:
    if _products(x) is triton:
        return triton.bn_relu_conv3x3(x, affine, weight, bias, grid, out, mask, keep_scale, statistics)
    y = convolve(x if affine is None else bn_relu(x, affine), weight, bias, grid)
    append_features(y, out, statistics, mask, keep_scale)


def bn_relu_conv3x3_backward(grad: Tensor, *arguments: Any, **options: Any) -> Any:
    return _products(grad).bn_relu_conv3x3_backward(grad, *arguments, **options)


def bn_relu_pool_conv1x1(x: Tensor, *arguments: Any, **options: Any) -> Any:
    return _products(x).bn_relu_pool_conv1x1(x, *arguments, **options)


def bn_relu_pool_conv1x1_backward(grad: Tensor, *arguments: Any, **options: Any) -> Any:
    return _products(grad).bn_relu_pool_conv1x1_backward(grad, *arguments, **options)
