"""The kernels in C++ (csrc/cpu), over row tiles that stay in a core's cache, for float32 and bfloat16 on CPUs.

Functions, arguments and results are those of ``aten``. Equal inputs give bitwise equal results for a given number of
threads; another number divides the rows otherwise, and rounds otherwise.
"""

import torch
from torch import Tensor

from densenet_fast.backends import extension
from densenet_fast.backends.affine import Affine
from densenet_fast.backends.spatial import convolve, convolve_backward

name = "cpu"

Statistics = tuple[Tensor, Tensor]

kernels = torch.ops.densenet_fast


def unavailable() -> str | None:
    """Why this backend cannot run here, or None."""
    return extension.unavailable()


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this backend has kernels for ``dtype`` on ``device``."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def describe() -> str:
    """What the kernels are made of: the instruction set in use."""
    return f"C++, {kernels.cpu_capability()}"


def channel_statistics(x: Tensor) -> Statistics:
    return kernels.cpu_statistics(x)


def append_features(new: Tensor, out: Tensor, statistics: bool) -> Statistics | None:
    rows = new.movedim(1, -1)
    out.view(rows.shape).copy_(rows)
    return kernels.cpu_statistics(out) if statistics else None


def bn_relu_conv1x1(
    x: Tensor, affine: Affine, weight: Tensor, bias: Tensor | None, statistics: bool
) -> tuple[Tensor, Statistics | None]:
    z, mean, var = kernels.cpu_bn_relu_conv1x1(x, *affine, weight.contiguous(), statistics and bias is None)
    if bias is not None:
        z.add_(bias)
        return z, channel_statistics(z) if statistics else None
    return z, (mean, var) if statistics else None


def bn_relu_conv1x1_backward(
    grad: Tensor, x: Tensor, affine: Affine, weight: Tensor, grad_x: Tensor | None, need_weight: bool, need_sums: bool
) -> tuple[Tensor | None, Statistics | None]:
    grad_weight, sums = kernels.cpu_bn_relu_conv1x1_backward(
        grad, x, *affine, weight.contiguous(), grad_x, need_weight, need_sums
    )
    have_sums = need_sums or grad_x is not None
    return grad_weight if need_weight else None, (sums[0], sums[1]) if have_sums else None


def bn_relu_conv3x3(
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, ...],
    out: Tensor,
    mask: Tensor | None,
    keep_scale: float,
    statistics: bool,
) -> Statistics | None:
    y = convolve(kernels.cpu_bn_relu(x, *affine), weight, bias, grid)
    if mask is not None:
        y = y.mul_(mask).mul_(keep_scale)
    return append_features(y, out, statistics)


def bn_relu_conv3x3_backward(
    grad: Tensor, x: Tensor, affine: Affine, weight: Tensor, grid: tuple[int, ...], need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None, Statistics | None]:
    a = kernels.cpu_bn_relu(x, *affine)
    input_gradient, weight_gradient = convolve_backward(grad, a, weight, grid, need_input, need_weight)
    if not need_input:
        return None, weight_gradient, None
    sums = kernels.cpu_mask_(input_gradient, x, *affine)
    return input_gradient, weight_gradient, (sums[0], sums[1])


def finalise_gradient(grad: Tensor, x: Tensor, mean: Tensor, p: Tensor, q: Tensor, count: Tensor | int) -> Tensor:
    return kernels.cpu_finalise(grad, x, mean, p, q, float(count))


def bn_relu_pool_conv1x1(
    x: Tensor, affine: Affine, weight: Tensor, bias: Tensor | None, grid: tuple[int, ...]
) -> Tensor:
    a = kernels.cpu_bn_relu_pool(x, *affine, grid)
    return a @ weight.t() if bias is None else torch.addmm(bias, a, weight.t())


def bn_relu_pool_conv1x1_backward(
    grad: Tensor, x: Tensor, affine: Affine, weight: Tensor, grid: tuple[int, ...], need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None, Statistics | None]:
    weight_gradient = grad.t() @ kernels.cpu_bn_relu_pool(x, *affine, grid) if need_weight else None
    if not need_input:
        return None, weight_gradient, None
    input_gradient, sums = kernels.cpu_bn_relu_pool_backward(grad @ weight, x, *affine, grid)
    return input_gradient, weight_gradient, (sums[0], sums[1])


def bn_relu_maxpool(x: Tensor, affine: Affine, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return kernels.cpu_bn_relu_maxpool(x, *affine, grid)


def bn_relu_maxpool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, affine: Affine, grid: tuple[int, ...]
) -> tuple[Tensor, Statistics]:
    scaled, sums = kernels.cpu_bn_relu_maxpool_backward(grad, argmax, x, *affine, grid)
    return scaled, (sums[0], sums[1])


def bn_relu_global_avgpool(x: Tensor, affine: Affine, grid: tuple[int, ...]) -> Tensor:
    return kernels.cpu_bn_relu_global_avgpool(x, *affine, grid[0])


def bn_relu_global_avgpool_backward(
    grad: Tensor, x: Tensor, affine: Affine, grid: tuple[int, ...]
) -> tuple[Tensor, Statistics]:
    scaled, sums = kernels.cpu_bn_relu_global_avgpool_backward(grad, x, *affine)
    return scaled, (sums[0], sums[1])
