"""What the functions share: how partial results are combined, and the sizes of launches."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import aten, cuda_kernels
from densenet_fast.backends.affine import Affine, Completion, Job, Reader, Statistics, ThroughStatistics
from densenet_fast.backends.triton import config
from densenet_fast.backends.triton.kernels import partials as kernels
from densenet_fast.backends.triton.launch import launcher, units

launch_combine_statistics = launcher(kernels.combine_statistics)
launch_sum_partials = launcher(kernels.sum_partials)

Sums = tuple[Tensor, Tensor]


def combine_statistics(partials: Tensor, rows: int, tile_rows: int, out: Statistics) -> None:
    """``out`` [n] from the partial statistics [tiles, 2, n] of tiles of ``tile_rows`` rows each."""
    tiles, _, columns = partials.shape
    tile, (n, unit) = config.STATISTICS[config.device_of(partials.device).generation], units(columns)
    launch_combine_statistics(
        (tiles_of(columns, tile.columns),),
        tile,
        partials=partials,
        mean=out.mean,
        variance=out.var,
        rstd=out.rstd,
        tiles=tiles,
        n=n,
        M=rows,
        tile_rows=tile_rows,
        eps=out.eps,
        UNIT=unit,
        LANES=tile.rows,
        COLUMNS=tile.columns,
    )


class Product(NamedTuple):
    """A weight's gradient [k, taps, B] in parts: partial results [ranges, k * taps * B]. Their sum goes to ``out``, in
    its dtype and memory layout."""

    partials: Tensor
    out: Tensor
    taps: int


class Columns(NamedTuple):
    """What columns of a gradient are completed by, with the gradient [M, C] and x [M, C] that the sums are of."""

    grad: Tensor
    x: Tensor
    completion: Completion


def sum_partials(
    partials: Tensor,
    weight: Tensor | None,
    channels: int,
    affine: Affine | None = None,
    reader: Reader | None = None,
    other: Product | None = None,
    columns: Columns | None = None,
) -> Sums | None:
    """Adds up the rows of partials [tiles, n], in one launch.

    The sums of the first columns go to ``weight``. Those of the last 2 * ``channels`` are the sums of D and of
    D * (x - mean). They are returned or, if there is a ``reader``, given to it. The launch also adds up the ``other``
    product, and completes ``columns`` by what the reader gets.
    """
    tiles, length = partials.shape
    device = config.device_of(partials.device)
    few, many, completed = config.SUMS[device.generation]
    n_weight = length - 2 * channels
    programs = tiles_of(channels, few.columns) + tiles_of(n_weight, many.columns)
    raw = before = after = grad_norm_weight = grad_norm_bias = None
    if channels and reader is None:
        raw = float32(partials, 2, channels)
    elif channels:
        before, after, grad_norm_weight, grad_norm_bias = reader
    p, q = after or (partials, partials) if raw is None else raw.unbind()
    p_before, q_before = before or (partials, partials)
    mean, rstd, _, norm_weight = (None,) * 4 if affine is None else affine
    others = grad_other = None
    other_tiles = n_other = 0
    inputs = taps = tap_stride = channel_stride = 1
    if other is not None:
        others, grad_other, taps = other
        other_tiles, n_other = others.shape
        inputs = n_other // (grad_other.shape[0] * taps)
        tap_stride, channel_stride = _strides(grad_other, taps, inputs)
        programs += tiles_of(n_other, many.columns)
    grad = x = out = None
    first = width = rows = ld_grad = ld_x = ld_out = 0
    chunk_rows, count = 1, 1.0
    if columns is not None:
        grad, x, (span, through, out) = columns
        first, width, rows, count = span.start, span.stop - span.start, x.shape[0], float(through.count)
        ld_grad, ld_x, ld_out = grad.stride(0), x.stride(0), out.stride(0)
        column_tiles = tiles_of(width, completed.columns)
        parts, chunk_rows = config.chunks(device, rows, column_tiles)
        programs += parts * column_tiles
    unit, other_unit = math.gcd(length, n_weight, channels, 16), math.gcd(n_other, 16)
    matrix_unit = math.gcd(first, width, ld_grad, ld_x, ld_out, 16)
    launch_sum_partials(
        (programs,),
        few,
        partials=partials,
        grad_weight=or_unread(weight, partials),
        mean=or_unread(mean, partials),
        rstd=or_unread(rstd, partials),
        norm_weight=or_unread(norm_weight, partials),
        p_before=p_before,
        q_before=q_before,
        p=p,
        q=q,
        grad_norm_weight=or_unread(grad_norm_weight, partials),
        grad_norm_bias=or_unread(grad_norm_bias, partials),
        others=or_unread(others, partials),
        grad_other=or_unread(grad_other, partials),
        grad=or_unread(grad, partials),
        x=or_unread(x, partials),
        out=or_unread(out, partials),
        tiles=tiles,
        length=length // unit,
        n_weight=n_weight // unit,
        C=channels // unit,
        other_tiles=other_tiles,
        n_other=n_other // other_unit,
        B=inputs,
        taps=taps,
        tap_stride=tap_stride,
        channel_stride=channel_stride,
        first_column=first // matrix_unit,
        n_columns=width // matrix_unit,
        M=rows,
        chunk_rows=chunk_rows,
        ld_grad=ld_grad // matrix_unit,
        ld_x=ld_x // matrix_unit,
        ld_out=ld_out // matrix_unit,
        count=count,
        UNIT=unit,
        OTHER_UNIT=other_unit,
        MATRIX_UNIT=matrix_unit,
        WEIGHTED=norm_weight is not None,
        BEFORE=before is not None,
        THROUGH=after is not None,
        GRAD_NORM_WEIGHT=grad_norm_weight is not None,
        GRAD_NORM_BIAS=grad_norm_bias is not None,
        RAW=raw is not None,
        LANES=few.rows,
        COLUMNS=few.columns,
        WIDE_LANES=many.rows,
        WIDE=many.columns,
        COMPLETED_LANES=completed.rows,
        COMPLETED=completed.columns,
        ROWS=config.COMPLETION.rows,
    )
    return None if raw is None else raw.unbind()


def _strides(weight: Tensor, taps: int, inputs: int) -> tuple[int, int]:
    """Elements from tap to tap and from channel to channel of a convolution's weight [k, B, 3, 3] or [k, B, 1, 1]."""
    if taps == 1:
        return inputs, 1
    return weight.stride(3), weight.stride(1)


def evenly_laid(like: Tensor | None) -> Tensor | None:
    """``like``, a convolution's weight, if its memory is contiguous or channels last; else None."""
    if like is None or like.is_contiguous():
        return like
    return like if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) else None


def weight_gradient(like: Tensor | None, width: int, channels: int, values: Tensor) -> Tensor:
    """An uninitialised gradient of a 1x1 convolution's weight. It is ``like`` the weight, if that is given and its
    memory is evenly laid, else [width, channels] in the dtype of ``values``."""
    like = evenly_laid(like)
    return values.new_empty(width, channels) if like is None else torch.empty_like(like)


def append_features(
    new: Tensor, out: Tensor, statistics: Statistics | None, mask: Tensor | None, keep_scale: float
) -> None:
    _bound_by_bandwidth(new).append_features(new, out, statistics, mask, keep_scale)


def finalise_gradient(grad: Tensor, through: ThroughStatistics, out: Tensor) -> Tensor:
    return _bound_by_bandwidth(grad).finalise_gradient(grad, through, out)


def prepare(jobs: Sequence[Job]) -> None:
    _bound_by_bandwidth(jobs[0].target).prepare(jobs)


def _bound_by_bandwidth(x: Tensor) -> ModuleType:
    """The backend whose kernels that are bound by bandwidth serve x: those in CUDA C++, if they do."""
    return cuda_kernels if cuda_kernels.serve(x) else aten


def or_unread(tensor: Tensor | None, other: Tensor) -> Tensor:
    """``tensor``, or where there is none ``other``, which the kernel then does not read or write.

    Triton wants a valid address for every pointer of a launch. A compile-time flag of the kernel, such as BIAS, KEEP or
    WEIGHTED, keeps it from being used.
    """
    return other if tensor is None else tensor


def adjacent(matrix: Tensor) -> Tensor:
    """``matrix``, copied if its columns are not adjacent."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def tiles_of(size: int, side: int) -> int:
    return -(-size // side)


def float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def dot_precision(dtype: torch.dtype) -> str:
    """The precision of a product as Triton names it. Half precision has one alone."""
    found = config.precision(dtype)
    return "ieee" if found == "half" else found
