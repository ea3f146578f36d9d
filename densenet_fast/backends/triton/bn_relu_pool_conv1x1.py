"""The contract's ``bn_relu_pool_conv1x1``, the transition, and its backward pass, by Triton or by torch."""

from torch import Tensor

from densenet_fast.backends import aten
from densenet_fast.backends.affine import Affine, Job, Reader, Statistics
from densenet_fast.backends.triton import config
from densenet_fast.backends.triton.bn_relu_conv1x1 import product_over_rows
from densenet_fast.backends.triton.kernels import bn_relu_pool_conv1x1 as forward
from densenet_fast.backends.triton.kernels import bn_relu_pool_conv1x1_backward as backward
from densenet_fast.backends.triton.launch import launcher, units
from densenet_fast.backends.triton.shared import (
    Product,
    Sums,
    adjacent,
    combine_statistics,
    dot_precision,
    float32,
    or_unread,
    prepare,
    sum_partials,
    tiles_of,
    weight_gradient,
)

launch_forward = launcher(forward.bn_relu_pool_conv1x1)
launch_backward = launcher(backward.bn_relu_pool_conv1x1_backward)


def bn_relu_pool_conv1x1(
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, ...],
    statistics: Statistics | None,
) -> Tensor:
    if config.pooling_by_torch(grid):
        return aten.bn_relu_pool_conv1x1(x, affine, weight, bias, grid, statistics)
    x, weight = adjacent(x), weight.contiguous()
    channels, width, windows = x.shape[1], weight.shape[0], _windows(grid)
    tile = config.tile("bn_relu_pool_conv1x1", config.device_of(x.device), x.dtype, width)
    columns = config.fit(width, tile.columns)
    tiles = tiles_of(windows, tile.rows)
    out = x.new_empty(windows, width)
    partials = float32(x, 0 if statistics is None else tiles, 2, width)
    (c, c_unit), (ld_x, x_unit), (k, k_unit) = units(channels), units(x.stride(0)), units(width)
    launch_forward(
        (tiles * tiles_of(width, columns),),
        tile,
        x=x,
        mean=affine.mean,
        rstd=affine.rstd,
        norm_bias=affine.bias,
        norm_weight=or_unread(affine.weight, affine.mean),
        weight=weight,
        bias=or_unread(bias, weight),
        out=out,
        partials=partials,
        M=windows,
        C=c,
        ld_x=ld_x,
        K=k,
        H=grid[1],
        W=grid[2],
        C_UNIT=c_unit,
        X_UNIT=x_unit,
        K_UNIT=k_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=config.fit(channels, tile.inner),
        BIAS=bias is not None,
        STATISTICS=statistics is not None,
        WEIGHTED=affine.weight is not None,
        PRECISION=dot_precision(x.dtype),
    )
    if statistics is not None:
        combine_statistics(partials, windows, tile.rows, statistics)
    return out


def bn_relu_pool_conv1x1_backward(
    grad: Tensor,
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    grid: tuple[int, ...],
    *,
    need_input: bool,
    need_weight: bool,
    reader: Reader | None = None,
    like: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Sums | None]:
    if config.pooling_by_torch(grid):
        return aten.bn_relu_pool_conv1x1_backward(
            grad, x, affine, weight, grid, need_input=need_input, need_weight=need_weight, reader=reader, like=like
        )
    if not need_input and not need_weight:
        return None, None, None
    grad, x, weight = adjacent(grad), adjacent(x), weight.contiguous()
    (rows, channels), width, windows = x.shape, weight.shape[0], _windows(grid)
    tile = config.tile("bn_relu_pool_conv1x1_backward", config.device_of(x.device), x.dtype, channels)
    columns = config.fit(channels, tile.columns)
    tiles = tiles_of(windows, tile.rows)
    scaled = x.new_empty(rows if need_input else 0, channels)
    if need_input and (grid[1] % 2 or grid[2] % 2):
        prepare([Job("zero", scaled)])
    pooled = x.new_empty(windows if need_weight else 0, channels)
    partials = float32(x, tiles, 2 * channels if need_input else 0)
    (c, c_unit), (k, k_unit) = units(channels), units(width)
    (ld_grad, grad_unit), (ld_x, x_unit) = units(grad.stride(0)), units(x.stride(0))
    launch_backward(
        (tiles * tiles_of(channels, columns),),
        tile,
        grad=grad,
        x=x,
        mean=affine.mean,
        rstd=affine.rstd,
        norm_bias=affine.bias,
        norm_weight=or_unread(affine.weight, affine.mean),
        weight=weight,
        scaled=scaled,
        pooled=pooled,
        partials=partials,
        M=windows,
        C=c,
        K=k,
        ld_grad=ld_grad,
        ld_x=ld_x,
        H=grid[1],
        W=grid[2],
        C_UNIT=c_unit,
        K_UNIT=k_unit,
        GRAD_UNIT=grad_unit,
        X_UNIT=x_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=config.fit(width, tile.inner),
        INPUT=need_input,
        POOLED=need_weight,
        WEIGHTED=affine.weight is not None,
        PRECISION=dot_precision(x.dtype),
    )
    product = None
    if need_weight:
        product = Product(product_over_rows(grad, pooled), weight_gradient(like, width, channels, x), 1)
    sums = sum_partials(partials, None, channels if need_input else 0, affine, reader, product)
    return scaled if need_input else None, None if product is None else product.out, sums


def _windows(grid: tuple[int, ...]) -> int:
    """Rows M' after the 2x2 pooling."""
    return grid[0] * (grid[1] // 2) * (grid[2] // 2)
