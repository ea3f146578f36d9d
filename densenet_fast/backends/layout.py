"""A feature map as a matrix: one row per pixel, one column per channel (channels last memory)."""

import math

from torch import Tensor


def to_matrix(x: Tensor) -> Tensor:
    """[N, C, *spatial] as [M, C]; a view if the memory is channels last, else a copy."""
    return x.movedim(1, -1).reshape(math.prod(x.shape[:1] + x.shape[2:]), x.shape[1])


def to_image(matrix: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[M, C] as [N, C, *spatial] with grid = (N, *spatial)."""
    return matrix.view(*grid, matrix.shape[1]).movedim(-1, 1)


def empty_image(like: Tensor, grid: tuple[int, ...], channels: int) -> Tensor:
    """An uninitialised [N, channels, *spatial], channels last in memory."""
    return like.new_empty(*grid, channels).movedim(-1, 1)
