"""The contract's ``bn_relu_conv3x3`` and its backward pass: by CUDA C++, Triton or torch's convolution, as config says.

CUDA C++ makes relu(bn(x)) in shared memory. Triton stores it once, because the taps read it nine times. The backward
pass makes it again on the way to the input's gradient.
"""

import torch
from torch import Tensor

from densenet_fast.backends import aten, cuda_conv3x3
from densenet_fast.backends.affine import Affine, Reader, Statistics, ThroughStatistics, Unfinished
from densenet_fast.backends.spatial import convolve
from densenet_fast.backends.triton import config
from densenet_fast.backends.triton.kernels import bn_relu as rectification
from densenet_fast.backends.triton.kernels import bn_relu_conv3x3 as forward
from densenet_fast.backends.triton.kernels import bn_relu_conv3x3_backward as backward
from densenet_fast.backends.triton.launch import launcher, units
from densenet_fast.backends.triton.shared import (
    Product,
    Sums,
    adjacent,
    append_features,
    combine_statistics,
    dot_precision,
    evenly_laid,
    float32,
    or_unread,
    sum_partials,
    tiles_of,
)

launch_bn_relu = launcher(rectification.bn_relu)
launch_forward = launcher(forward.bn_relu_conv3x3)
launch_grad_input = launcher(backward.bn_relu_conv3x3_grad_input)
launch_grad_weight = launcher(backward.bn_relu_conv3x3_grad_weight)


def bn_relu_conv3x3(
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
    if config.convolution_in_cuda(x, weight.shape[0], grid):
        return cuda_conv3x3.bn_relu_conv3x3(
            adjacent(x),
            affine,
            _taps_first(weight),
            bias,
            grid,
            out,
            mask=mask,
            keep_scale=keep_scale,
            statistics=statistics,
            processors=config.device_of(x.device).processors,
        )
    a = x.contiguous() if affine is None else _bn_relu(x, affine)
    if config.convolution_by_torch(grid, x.dtype):
        return append_features(convolve(a, weight, bias, grid), out, statistics, mask, keep_scale)
    weight = _taps_first(weight)
    (rows, channels), width = a.shape, weight.shape[0]
    tile = config.tile("bn_relu_conv3x3", config.device_of(x.device), x.dtype, width)
    columns = config.fit(width, tile.columns)
    tiles = tiles_of(rows, tile.rows)
    partials = float32(x, 0 if statistics is None else tiles, 2, width)
    (b, b_unit), (k, k_unit), (ld_out, out_unit) = units(channels), units(width), units(out.stride(0))
    keep_n, keep_k, keep_h, keep_w = (0,) * 4 if mask is None else mask.stride()
    launch_forward(
        (tiles * tiles_of(width, columns),),
        tile,
        a=a,
        weight=weight,
        bias=or_unread(bias, weight),
        keep=or_unread(mask, weight),
        out=out,
        partials=partials,
        M=rows,
        B=b,
        k=k,
        H=grid[1],
        W=grid[2],
        ld_out=ld_out,
        taps=9,
        keep_n=keep_n,
        keep_k=keep_k,
        keep_h=keep_h,
        keep_w=keep_w,
        keep_scale=keep_scale,
        B_UNIT=b_unit,
        K_UNIT=k_unit,
        OUT_UNIT=out_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=config.fit(channels, tile.inner),
        BIAS=bias is not None,
        KEEP=mask is not None,
        STATISTICS=statistics is not None,
        PRECISION=dot_precision(x.dtype),
    )
    if statistics is not None:
        combine_statistics(partials, rows, tile.rows, statistics)


def bn_relu_conv3x3_backward(
    grad: Tensor,
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    grid: tuple[int, ...],
    out: Tensor | None,
    *,
    need_weight: bool,
    reader: Reader | None = None,
    unfinished: Unfinished | None = None,
    like: Tensor | None = None,
    source: Tensor | None = None,
) -> tuple[Tensor | None, Sums | None]:
    if source is not None:
        scaled = torch.empty_like(x, memory_format=torch.contiguous_format)
        made = bn_relu_conv3x3_backward(
            grad,
            x,
            affine,
            weight,
            grid,
            scaled,
            need_weight=need_weight,
            reader=reader,
            unfinished=unfinished,
            like=like,
        )
        torch.add(source, scaled, out=out)
        return made
    if config.convolution_by_torch(grid, x.dtype):
        return aten.bn_relu_conv3x3_backward(
            grad, x, affine, weight, grid, out, need_weight=need_weight, reader=reader, like=like
        )
    grad, x, like = adjacent(grad), adjacent(x), evenly_laid(like)
    in_cuda, processors = config.convolution_in_cuda(x, grad.shape[1], grid), config.device_of(x.device).processors
    a = sums = None
    if out is not None:
        if in_cuda:
            partials = cuda_conv3x3.grad_input(grad, x, affine, _taps_first(weight), grid, out, processors)
        else:
            a, partials = _conv3x3_grad_input(grad, x, affine, _taps_first(weight), grid, out, need_weight)
        sums = sum_partials(partials, None, x.shape[1], affine, reader)
    if not need_weight:
        return None, sums
    through = None
    if unfinished is not None and out is not None and unfinished.through is not None:
        through, unfinished.through = unfinished.through, None
    if in_cuda:
        partials = cuda_conv3x3.grad_weight(grad, x, affine, grid, through, out, processors)
        product = _product(partials, grad.shape[1], x, like)
    else:
        product = _conv3x3_grad_weight(grad, _bn_relu(x, affine) if a is None else a, grid, like, through, out)
    if unfinished is None or like is None:
        sum_partials(float32(x, 0, 0), None, 0, other=product)
    else:
        unfinished.sums.append(product)
    return product.out, sums


def _conv3x3_grad_input(
    grad: Tensor,
    z: Tensor,
    affine: Affine,
    weight: Tensor,
    grid: tuple[int, ...],
    scaled: Tensor,
    keep_a: bool,
) -> tuple[Tensor | None, Tensor]:
    """``scaled`` becomes scale * D, from ``weight`` [k, 3, 3, B]. Returns relu(bn(z)), if ``keep_a``, and partial
    results [row tiles, 2 * B] of D's column sums."""
    (rows, channels), outputs = z.shape, grad.shape[1]
    tile = config.tile("bn_relu_conv3x3_grad_input", config.device_of(z.device), z.dtype, channels)
    columns = config.fit(channels, tile.columns)
    tiles = tiles_of(rows, tile.rows)
    a = z.new_empty(rows, channels) if keep_a else None
    partials = float32(z, tiles, 2 * channels)
    (b, b_unit), (k, k_unit), (ld_scaled, scaled_unit) = units(channels), units(outputs), units(scaled.stride(0))
    (ld_grad, grad_unit), (ld_z, z_unit) = units(grad.stride(0)), units(z.stride(0))
    launch_grad_input(
        (tiles * tiles_of(channels, columns),),
        tile,
        grad=grad,
        z=z,
        mean=affine.mean,
        rstd=affine.rstd,
        norm_bias=affine.bias,
        norm_weight=or_unread(affine.weight, affine.mean),
        weight=weight,
        scaled=scaled,
        a=or_unread(a, scaled),
        partials=partials,
        M=rows,
        B=b,
        k=k,
        H=grid[1],
        W=grid[2],
        ld_grad=ld_grad,
        ld_z=ld_z,
        ld_scaled=ld_scaled,
        taps=9,
        B_UNIT=b_unit,
        K_UNIT=k_unit,
        GRAD_UNIT=grad_unit,
        Z_UNIT=z_unit,
        SCALED_UNIT=scaled_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=config.fit(outputs, tile.inner),
        KEEP_A=keep_a,
        WEIGHTED=affine.weight is not None,
        PRECISION=dot_precision(z.dtype),
    )
    return a, partials


def _conv3x3_grad_weight(
    grad: Tensor,
    a: Tensor,
    grid: tuple[int, ...],
    like: Tensor | None,
    through: ThroughStatistics | None,
    dz: Tensor | None,
) -> Product:
    """dW2 in parts, as :func:`_product` returns it, from dY [M, k] and A [M, B]. Completes dz on the way, if it is to
    go ``through`` statistics."""
    (rows, channels), outputs = a.shape, grad.shape[1]
    device = config.device_of(a.device)
    tile = config.tile("bn_relu_conv3x3_grad_weight", device, a.dtype, channels)
    block, width = config.fit(channels, tile.columns), config.fit(outputs, tile.inner)
    programs = 3 * tiles_of(channels, block) * tiles_of(outputs, width)
    ranges, range_rows = config.ranges(device, rows, tile.rows, programs)
    partials = float32(a, ranges, outputs * 9 * channels)
    (b, b_unit), (k, k_unit), (ld_grad, grad_unit) = units(channels), units(outputs), units(grad.stride(0))
    completion, completed = config.COMPLETION, config.fit(channels, config.COMPLETION.columns)
    z, mean, p, q, count = (None, None, None, None, 1) if through is None else through
    z, dz, more, chunk_rows = or_unread(z, a), a if through is None else dz, 0, 1
    if through is not None:
        column_tiles = tiles_of(channels, completed)
        parts, chunk_rows = config.chunks(device, rows, column_tiles)
        more = tiles_of(parts * column_tiles, programs)
    (ld_z, z_unit), (ld_dz, dz_unit) = units(z.stride(0)), units(dz.stride(0))
    launch_grad_weight(
        (programs, ranges + more),
        tile,
        grad=grad,
        a=a,
        partials=partials,
        z=z,
        dz=dz,
        mean=or_unread(mean, partials),
        p=or_unread(p, partials),
        q=or_unread(q, partials),
        M=rows,
        B=b,
        k=k,
        H=grid[1],
        W=grid[2],
        ld_grad=ld_grad,
        range_rows=range_rows,
        ranges=ranges,
        ld_z=ld_z,
        ld_dz=ld_dz,
        chunk_rows=chunk_rows,
        count=float(count),
        B_UNIT=b_unit,
        K_UNIT=k_unit,
        GRAD_UNIT=grad_unit,
        ROWS=tile.rows,
        BLOCK=block,
        WIDTH=width,
        Z_UNIT=z_unit,
        DZ_UNIT=dz_unit,
        COMPLETED_ROWS=completion.rows,
        COMPLETED=completed,
        PRECISION=dot_precision(a.dtype),
    )
    return _product(partials, outputs, a, like)


def _product(partials: Tensor, outputs: int, a: Tensor, like: Tensor | None) -> Product:
    """dW2 [k, B, 3, 3] in parts. Its sum has the dtype and the memory layout of the parameter ``like``, if that is
    given, else those of ``a`` with channels last."""
    channels = a.shape[1]
    out = a.new_empty(outputs, 3, 3, channels).permute(0, 3, 1, 2) if like is None else torch.empty_like(like)
    return Product(partials, out, 9)


def _bn_relu(x: Tensor, affine: Affine) -> Tensor:
    """relu(bn(x)) [M, C], dense."""
    x = adjacent(x)
    rows, channels = x.shape
    tile = config.BN_RELU
    out = x.new_empty(rows, channels)
    (c, c_unit), (ld_x, x_unit) = units(channels), units(x.stride(0))
    columns = config.fit(channels, tile.columns)
    launch_bn_relu(
        (tiles_of(rows, tile.rows) * tiles_of(channels, columns),),
        tile,
        x=x,
        mean=affine.mean,
        rstd=affine.rstd,
        norm_bias=affine.bias,
        norm_weight=or_unread(affine.weight, affine.mean),
        out=out,
        M=rows,
        C=c,
        ld_x=ld_x,
        C_UNIT=c_unit,
        X_UNIT=x_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        WEIGHTED=affine.weight is not None,
    )
    return out


def _taps_first(weight: Tensor) -> Tensor:
    """[k, B, 3, 3] as [k, 3, 3, B]; no copy if the memory is channels last."""
    return weight.permute(0, 2, 3, 1).contiguous()
