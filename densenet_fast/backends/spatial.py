"""Convolution and pooling by torch operations, for the backends that leave them to torch.

These are the 3x3 convolution, the 2x2 mean and the maximum over windows of 3, in 1, 2 or 3 dimensions. They alone have
to know that the rows of a matrix are the pixels of images: ``grid`` is (N, *spatial).
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_fast.backends.affine import accumulation_dtype
from densenet_fast.backends.layout import to_image, to_matrix


def convolve(a: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, ...]) -> Tensor:
    """conv3x3(a [M, B], weight [k, B, 3, ...], padding=1) + bias [k]: [N, k, *spatial]."""
    ones = [1] * (len(grid) - 1)
    return torch.convolution(to_image(a, grid), weight, bias, ones, ones, ones, False, [0], 1)


def convolve_backward(
    grad: Tensor, a: Tensor, weight: Tensor, grid: tuple[int, ...], need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients of a [M, B], dense, and of the weight, for grad [M, k]. One that is not needed is None."""
    ones = [1] * (len(grid) - 1)
    needs = [need_input, need_weight, False]
    grad_a, grad_weight, _ = torch.ops.aten.convolution_backward(
        to_image(grad, grid), to_image(a, grid), weight, None, ones, ones, ones, False, [0], 1, needs
    )
    return to_matrix(grad_a).contiguous() if need_input else None, grad_weight if need_weight else None


def pool(a: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Means over windows of 2 of a [M, C]: [M', C]; an odd last row or column is dropped."""
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(grid) - 2]
    return to_matrix(average(to_image(a.to(accumulation_dtype(a.dtype)), grid), 2)).to(a.dtype)


def unpool(grad: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Returns the gradient [M, C] of :func:`pool`'s input, from that of its result [M', C]. It is zero where a pixel
    was dropped."""
    batch, *spatial = grid
    pooled = to_image(grad, (batch, *(size // 2 for size in spatial)))
    spread = F.interpolate(pooled, scale_factor=2, mode="nearest") / 2 ** len(spatial)
    padding = [amount for size in reversed(spatial) for amount in (0, size % 2)]
    return to_matrix(F.pad(spread, padding)).contiguous()


def max_pool(a: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns the maxima of a [M, C] over windows of 3 at distance 2, padded by 1, and their positions: [M', C] each.

    A position is uint8; it counts within its window, from 0.
    """
    batch, *spatial = grid
    maximum = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(spatial) - 1]
    out, index = maximum(to_image(a, grid), 3, 2, 1, return_indices=True)
    position = torch.zeros_like(index)
    for dim, size in enumerate(spatial):
        stride = math.prod(spatial[dim + 1 :])
        output = torch.arange(out.shape[2 + dim], device=a.device).view(-1, *[1] * (len(spatial) - 1 - dim))
        position = 3 * position + (index // stride % size - (2 * output - 1))
    return to_matrix(out), to_matrix(position.to(torch.uint8)).contiguous()


def max_unpool(grad: Tensor, position: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Returns the gradient [M, C] of :func:`max_pool`'s input, from that of its result [M', C].

    Input u of a dimension is at place i of output o's window where u = 2 * o - 1 + i.
    """
    batch, *spatial = grid
    pooled = pooled_sizes(spatial)
    grad, position = (to_image(t, (batch, *pooled)) for t in (grad, position))
    padded = grad.new_zeros(batch, grad.shape[1], *(2 * size + 1 for size in pooled))
    for k, place in enumerate(itertools.product(range(3), repeat=len(spatial))):
        window = tuple(slice(i, i + 2 * size - 1, 2) for i, size in zip(place, pooled))
        padded[(..., *window)] += grad * (position == k)
    return to_matrix(padded[(..., *(slice(1, 1 + size) for size in spatial))]).contiguous()


def pooled_sizes(spatial: Sequence[int]) -> list[int]:
    """The spatial sizes of :func:`max_pool`'s result."""
    return [(size + 1) // 2 for size in spatial]
