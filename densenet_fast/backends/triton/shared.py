"""What the functions share: partial results combined, and the sizes of launches."""

from types import ModuleType

import torch
from torch import Tensor

from densenet_fast.backends import aten, cuda_kernels
from densenet_fast.backends.affine import Statistics, ThroughStatistics
from densenet_fast.backends.triton import config
from densenet_fast.backends.triton.kernels import partials as kernels
from densenet_fast.backends.triton.launch import launch, units

Sums = tuple[Tensor, Tensor]


def combine_statistics(partials: Tensor, rows: int, tile_rows: int, out: Statistics) -> None:
    """The statistics [n] from the partial ones [tiles, 2, n] of tiles of ``tile_rows`` rows."""
    tiles, _, columns = partials.shape
    tile, (n, unit) = config.STATISTICS, units(columns)
    launch(
        kernels.combine_statistics,
        (tiles_of(columns, tile.columns),),
        partials,
        *out[:3],
        tiles,
        n,
        rows,
        tile_rows,
        out.eps,
        tile=tile,
        UNIT=unit,
        LANES=tile.rows,
        COLUMNS=tile.columns,
    )


def sum_partials(partials: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over the rows of partials [tiles, n]: of the first columns in ``first``, of the others in float32."""
    tiles, columns = partials.shape
    tile = config.sums_tile(config.device_of(partials.device), columns)
    rest = float32(partials, columns - first.numel())
    (n, unit), (n_first, first_unit) = units(columns), units(first.numel())
    launch(
        kernels.sum_partials,
        (tiles_of(columns, tile.columns),),
        partials,
        first,
        rest,
        tiles,
        n,
        n_first,
        tile=tile,
        UNIT=unit,
        FIRST_UNIT=first_unit,
        LANES=tile.rows,
        COLUMNS=tile.columns,
    )
    return first, rest


def append_features(
    new: Tensor, out: Tensor, statistics: Statistics | None, mask: Tensor | None, keep_scale: float
) -> None:
    _bound_by_bandwidth(new).append_features(new, out, statistics, mask, keep_scale)


def finalise_gradient(grad: Tensor, through: ThroughStatistics, out: Tensor) -> Tensor:
    return _bound_by_bandwidth(grad).finalise_gradient(grad, through, out)


def _bound_by_bandwidth(x: Tensor) -> ModuleType:
    """Where such kernels for x are: in CUDA C++ if it serves x."""
    return cuda_kernels if cuda_kernels.serve(x) else aten


def adjacent(matrix: Tensor) -> Tensor:
    """``matrix`` with adjacent columns."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def tiles_of(size: int, side: int) -> int:
    return -(-size // side)


def float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def dot_precision(dtype: torch.dtype) -> str:
    """The precision of a product as Triton names it; half precision has but one."""
    found = config.precision(dtype)
    return "ieee" if found == "half" else found
