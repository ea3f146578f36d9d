"""A feature map as a matrix: one row per pixel, one column per channel (channels last memory)."""

import itertools
import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format of feature maps and weights by their dimensions; there is none with one spatial dimension."""


def is_channels_last(x: Tensor) -> bool:
    """Whether torch's convolutions and normalisations take ``x`` for channels last, also where it is a part of a larger
    tensor. Where sizes of one leave it open the strides decide, as in c10's ``is_channels_last_strides``."""
    if x.dim() not in CHANNELS_LAST:
        return False
    shape, strides = x.shape, x.stride()
    if strides[1] == 0:
        return False
    least = 0
    for dim in (1, *range(len(shape) - 1, 1, -1), 0):
        size, stride = shape[dim], strides[dim]
        if size == 0 or stride < least or (dim == 0 and least == strides[1]):
            return False
        least = stride * size
    return True


def is_dense(x: Tensor) -> bool:
    """Whether ``x`` is contiguous, or channels last where there is such a format."""
    last = CHANNELS_LAST.get(x.dim())
    return x.is_contiguous() or (last is not None and x.is_contiguous(memory_format=last))


def are_dense(tensors: Sequence[Tensor]) -> bool:
    """Whether all of hundreds of tensors are dense, as :func:`is_dense` says of one."""
    others = itertools.compress(tensors, map(operator.not_, map(Tensor.is_contiguous, tensors)))
    return all(t.is_contiguous(memory_format=CHANNELS_LAST.get(t.dim(), torch.contiguous_format)) for t in others)


def to_matrix(x: Tensor) -> Tensor:
    """[N, C, *spatial] as [M, C] with adjacent columns; a view if the memory is channels last, else a copy."""
    matrix = x.movedim(1, -1).flatten(0, -2)
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def to_image(matrix: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[M, C] as [N, C, *spatial] with grid = (N, *spatial); a view."""
    return matrix.view(*grid, matrix.shape[1]).movedim(-1, 1)


def empty_image(
    like: Tensor,
    grid: tuple[int, ...],
    channels: int,
    empty: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor] = Tensor.new_empty_strided,
) -> Tensor:
    """An uninitialised [N, channels, *spatial], channels last in memory and not a view, that ``empty`` allocates."""
    pixel_strides = [math.prod(grid[i + 1 :]) * channels for i in range(len(grid))]
    strides = (pixel_strides[0], 1, *pixel_strides[1:])
    return empty(like, (grid[0], channels, *grid[1:]), strides)


def as_output(view: Tensor, strides: tuple[int, ...] | None = None) -> Tensor:
    """Returns the memory of ``view`` as a tensor that is not a view.

    Callers may not change a view in place if a custom op returned it. ``strides`` may differ from the view's where a
    size is one.
    """
    return view.new_empty(0).set_(view.untyped_storage(), view.storage_offset(), view.shape, strides or view.stride())
