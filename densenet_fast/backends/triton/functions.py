"""The backend's functions: they allocate, choose a configuration and launch. Arguments and results as in ``aten``."""

import torch
from torch import Tensor

from densenet_fast.backends import aten
from densenet_fast.backends.affine import Affine
from densenet_fast.backends.triton import config
from densenet_fast.backends.triton.kernels import partials as partial_kernels
from densenet_fast.backends.triton.kernels.bn_relu import bn_relu as bn_relu_kernel
from densenet_fast.backends.triton.kernels.bn_relu_conv1x1 import bn_relu_conv1x1 as conv1x1_kernel
from densenet_fast.backends.triton.kernels.bn_relu_conv1x1_backward import (
    bn_relu_conv1x1_backward as conv1x1_backward_kernel,
)
from densenet_fast.backends.triton.kernels.bn_relu_conv3x3 import bn_relu_conv3x3 as conv3x3_kernel
from densenet_fast.backends.triton.kernels.bn_relu_conv3x3_backward import (
    bn_relu_conv3x3_grad_input,
    bn_relu_conv3x3_grad_weight,
)
from densenet_fast.backends.triton.kernels.bn_relu_pool_conv1x1 import bn_relu_pool_conv1x1 as pool_kernel
from densenet_fast.backends.triton.kernels.bn_relu_pool_conv1x1_backward import (
    bn_relu_pool_conv1x1_backward as pool_backward_kernel,
)
from densenet_fast.backends.triton.launch import launch, units

Statistics = tuple[Tensor, Tensor]


def bn_relu_conv1x1(
    x: Tensor, affine: Affine, weight: Tensor, bias: Tensor | None, statistics: bool
) -> tuple[Tensor, Statistics | None]:
    x, weight = _adjacent(x), weight.contiguous()
    (rows, channels), width = x.shape, weight.shape[0]
    tile = config.tile("bn_relu_conv1x1", config.device_of(x.device), x.dtype, width)
    columns = config.fit(width, tile.columns)
    tiles = _tiles(rows, tile.rows)
    z = x.new_empty(rows, width)
    partials = _float32(x, tiles if statistics else 0, 2, width)
    (c, c_unit), (ld_x, x_unit), (b, b_unit) = units(channels), units(x.stride(0)), units(width)
    launch(
        conv1x1_kernel,
        (tiles * _tiles(width, columns),),
        x,
        *affine,
        weight,
        weight if bias is None else bias,
        z,
        partials,
        rows,
        c,
        ld_x,
        b,
        tile=tile,
        C_UNIT=c_unit,
        X_UNIT=x_unit,
        B_UNIT=b_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=config.fit(channels, tile.inner),
        BIAS=bias is not None,
        STATISTICS=statistics,
        PRECISION=_dot(x.dtype),
    )
    return z, _combine_statistics(partials, rows, tile.rows) if statistics else None


def bn_relu_conv1x1_backward(
    grad: Tensor, x: Tensor, affine: Affine, weight: Tensor, grad_x: Tensor | None, need_weight: bool, need_sums: bool
) -> tuple[Tensor | None, Statistics | None]:
    need_input = need_sums or grad_x is not None
    if not need_input and not need_weight:
        return None, None
    grad, x, weight = _adjacent(grad), _adjacent(x), weight.contiguous()
    (rows, channels), width = x.shape, weight.shape[0]
    device = config.device_of(x.device)
    tile = config.tile("bn_relu_conv1x1_backward", device, x.dtype, width)
    block, columns = config.fit(width, tile.inner), config.fit(channels, tile.columns)
    wide, column_tiles = width > block, _tiles(channels, columns)
    ranges, range_rows = config.ranges(device, rows, tile.rows, column_tiles)
    weight_rows = width if need_weight else 0
    partials = _float32(x, ranges, weight_rows + (2 if need_input else 0), channels)
    target = x if grad_x is None else grad_x
    (c, c_unit), (b, b_unit) = units(channels), units(width)
    (ld_grad, grad_unit), (ld_x, x_unit), (ld_target, target_unit) = (units(t.stride(0)) for t in (grad, x, target))

    def run(with_input: bool, with_weight: bool, blocks: int) -> None:
        launch(
            conv1x1_backward_kernel,
            (column_tiles, ranges, blocks),
            grad,
            x,
            *affine,
            weight,
            target,
            partials,
            rows,
            c,
            b,
            ld_grad,
            ld_x,
            ld_target,
            range_rows,
            partials.shape[1],
            weight_rows,
            tile=tile,
            C_UNIT=c_unit,
            B_UNIT=b_unit,
            GRAD_UNIT=grad_unit,
            X_UNIT=x_unit,
            GRAD_X_UNIT=target_unit,
            ROWS=tile.rows,
            CHANNELS=columns,
            WIDTH=block,
            INPUT=with_input,
            UPDATE=with_input and grad_x is not None,
            WEIGHT=with_weight,
            WIDE=with_input and wide,
            PRECISION=_dot(x.dtype),
        )

    if not wide:
        run(need_input, need_weight, 1)
    else:
        if need_input:
            run(True, False, 1)
        if need_weight:
            run(False, True, _tiles(width, block))
    grad_weight, sums = _sum_partials(partials.flatten(1), x.new_empty(weight_rows, channels))
    return grad_weight if need_weight else None, sums.view(2, channels).unbind() if need_input else None


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
    if config.convolution_by_torch(grid, x.dtype):
        return aten.bn_relu_conv3x3(x, affine, weight, bias, grid, out, mask, keep_scale, statistics)
    a, weight = _bn_relu(x, affine), _taps_first(weight)
    (rows, channels), width = a.shape, weight.shape[0]
    tile = config.tile("bn_relu_conv3x3", config.device_of(x.device), x.dtype, width)
    columns = config.fit(width, tile.columns)
    tiles = _tiles(rows, tile.rows)
    partials = _float32(x, tiles if statistics else 0, 2, width)
    (b, b_unit), (ld_out, out_unit) = units(channels), units(out.stride(0))
    launch(
        conv3x3_kernel,
        (tiles * _tiles(width, columns),),
        a,
        weight,
        weight if bias is None else bias,
        weight if mask is None else mask,
        out,
        partials,
        rows,
        b,
        width,
        *grid[1:],
        ld_out,
        9,
        *((0, 0, 0, 0) if mask is None else mask.stride()),
        keep_scale,
        tile=tile,
        B_UNIT=b_unit,
        OUT_UNIT=out_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=config.fit(channels, tile.inner),
        BIAS=bias is not None,
        KEEP=mask is not None,
        STATISTICS=statistics,
        PRECISION=_dot(x.dtype),
    )
    return _combine_statistics(partials, rows, tile.rows) if statistics else None


def bn_relu_conv3x3_backward(
    grad: Tensor, x: Tensor, affine: Affine, weight: Tensor, grid: tuple[int, ...], need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None, Statistics | None]:
    if config.convolution_by_torch(grid, x.dtype):
        return aten.bn_relu_conv3x3_backward(grad, x, affine, weight, grid, need_input, need_weight)
    grad = _adjacent(grad)
    scaled = a = sums = grad_weight = None
    if need_input:
        scaled, a, sums = _conv3x3_grad_input(grad, _adjacent(x), affine, _taps_first(weight), grid, need_weight)
    elif need_weight:
        a = _bn_relu(x, affine)
    if need_weight:
        grad_weight = _conv3x3_grad_weight(grad, a, grid)
    return scaled, grad_weight, sums


def _conv3x3_grad_input(
    grad: Tensor, z: Tensor, affine: Affine, weight: Tensor, grid: tuple[int, ...], keep_a: bool
) -> tuple[Tensor, Tensor | None, Statistics]:
    """scale * D, relu(bn(z)) if asked for, and D's column sums; ``weight`` [k, 3, 3, B]."""
    (rows, channels), outputs = z.shape, grad.shape[1]
    tile = config.tile("bn_relu_conv3x3_grad_input", config.device_of(z.device), z.dtype, channels)
    columns = config.fit(channels, tile.columns)
    tiles = _tiles(rows, tile.rows)
    scaled = z.new_empty(rows, channels)
    a = torch.empty_like(scaled) if keep_a else None
    partials = _float32(z, tiles, 2, channels)
    (b, b_unit), (ld_grad, grad_unit), (ld_z, z_unit) = units(channels), units(grad.stride(0)), units(z.stride(0))
    launch(
        bn_relu_conv3x3_grad_input,
        (tiles * _tiles(channels, columns),),
        grad,
        z,
        *affine,
        weight,
        scaled,
        scaled if a is None else a,
        partials,
        rows,
        b,
        outputs,
        *grid[1:],
        ld_grad,
        ld_z,
        9,
        tile=tile,
        B_UNIT=b_unit,
        GRAD_UNIT=grad_unit,
        Z_UNIT=z_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=config.fit(outputs, tile.inner),
        KEEP_A=keep_a,
        PRECISION=_dot(z.dtype),
    )
    _, sums = _sum_partials(partials.flatten(1), z.new_empty(0))
    return scaled, a, sums.view(2, channels).unbind()


def _conv3x3_grad_weight(grad: Tensor, a: Tensor, grid: tuple[int, ...]) -> Tensor:
    """dW2 [k, B, 3, 3] from dY [M, k] and A [M, B]."""
    (rows, channels), outputs = a.shape, grad.shape[1]
    device = config.device_of(a.device)
    tile = config.tile("bn_relu_conv3x3_grad_weight", device, a.dtype, channels)
    block, width = config.fit(channels, tile.columns), config.fit(outputs, tile.inner)
    programs = 3 * _tiles(channels, block) * _tiles(outputs, width)
    ranges, range_rows = config.ranges(device, rows, tile.rows, programs)
    partials = _float32(a, ranges, outputs, 9 * channels)
    (b, b_unit), (ld_grad, grad_unit) = units(channels), units(grad.stride(0))
    launch(
        bn_relu_conv3x3_grad_weight,
        (programs, ranges),
        grad,
        a,
        partials,
        rows,
        b,
        outputs,
        *grid[1:],
        ld_grad,
        range_rows,
        tile=tile,
        B_UNIT=b_unit,
        GRAD_UNIT=grad_unit,
        ROWS=tile.rows,
        BLOCK=block,
        WIDTH=width,
        PRECISION=_dot(a.dtype),
    )
    grad_weight, _ = _sum_partials(partials.flatten(1), a.new_empty(outputs, 3, 3, channels))
    return grad_weight.permute(0, 3, 1, 2)


def bn_relu_pool_conv1x1(
    x: Tensor, affine: Affine, weight: Tensor, bias: Tensor | None, grid: tuple[int, ...]
) -> Tensor:
    if config.pooling_by_torch(grid):
        return aten.bn_relu_pool_conv1x1(x, affine, weight, bias, grid)
    x, weight = _adjacent(x), weight.contiguous()
    channels, width, windows = x.shape[1], weight.shape[0], _windows(grid)
    tile = config.tile("bn_relu_pool_conv1x1", config.device_of(x.device), x.dtype, width)
    columns = config.fit(width, tile.columns)
    out = x.new_empty(windows, width)
    (c, c_unit), (ld_x, x_unit), (k, k_unit) = units(channels), units(x.stride(0)), units(width)
    launch(
        pool_kernel,
        (_tiles(windows, tile.rows) * _tiles(width, columns),),
        x,
        *affine,
        weight,
        weight if bias is None else bias,
        out,
        windows,
        c,
        ld_x,
        k,
        *grid[1:],
        tile=tile,
        C_UNIT=c_unit,
        X_UNIT=x_unit,
        K_UNIT=k_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=config.fit(channels, tile.inner),
        BIAS=bias is not None,
        PRECISION=_dot(x.dtype),
    )
    return out


def bn_relu_pool_conv1x1_backward(
    grad: Tensor, x: Tensor, affine: Affine, weight: Tensor, grid: tuple[int, ...], need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None, Statistics | None]:
    if config.pooling_by_torch(grid):
        return aten.bn_relu_pool_conv1x1_backward(grad, x, affine, weight, grid, need_input, need_weight)
    if not need_input and not need_weight:
        return None, None, None
    grad, x, weight = _adjacent(grad), _adjacent(x), weight.contiguous()
    (rows, channels), width, windows = x.shape, weight.shape[0], _windows(grid)
    tile = config.tile("bn_relu_pool_conv1x1_backward", config.device_of(x.device), x.dtype, channels)
    columns = config.fit(channels, tile.columns)
    tiles = _tiles(windows, tile.rows)
    allocate = x.new_zeros if grid[1] % 2 or grid[2] % 2 else x.new_empty
    scaled = allocate(rows if need_input else 0, channels)
    pooled = x.new_empty(windows if need_weight else 0, channels)
    partials = _float32(x, tiles if need_input else 0, 2, channels)
    (c, c_unit), (k, k_unit) = units(channels), units(width)
    (ld_grad, grad_unit), (ld_x, x_unit) = units(grad.stride(0)), units(x.stride(0))
    launch(
        pool_backward_kernel,
        (tiles * _tiles(channels, columns),),
        grad,
        x,
        *affine,
        weight,
        scaled,
        pooled,
        partials,
        windows,
        c,
        k,
        ld_grad,
        ld_x,
        *grid[1:],
        tile=tile,
        C_UNIT=c_unit,
        K_UNIT=k_unit,
        GRAD_UNIT=grad_unit,
        X_UNIT=x_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=config.fit(width, tile.inner),
        INPUT=need_input,
        POOLED=need_weight,
        PRECISION=_dot(x.dtype),
    )
    grad_weight = grad.t() @ pooled if need_weight else None
    if not need_input:
        return None, grad_weight, None
    _, sums = _sum_partials(partials.flatten(1), x.new_empty(0))
    return scaled, grad_weight, sums.view(2, channels).unbind()


def _bn_relu(x: Tensor, affine: Affine) -> Tensor:
    """relu(bn(x)) [M, C], dense."""
    x = _adjacent(x)
    rows, channels = x.shape
    tile = config.BN_RELU
    out = x.new_empty(rows, channels)
    (c, c_unit), (ld_x, x_unit) = units(channels), units(x.stride(0))
    columns = config.fit(channels, tile.columns)
    launch(
        bn_relu_kernel,
        (_tiles(rows, tile.rows) * _tiles(channels, columns),),
        x,
        *affine,
        out,
        rows,
        c,
        ld_x,
        tile=tile,
        C_UNIT=c_unit,
        X_UNIT=x_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
    )
    return out


def _combine_statistics(partials: Tensor, rows: int, tile_rows: int) -> Statistics:
    """Mean and biased variance [n] from the partial ones [tiles, 2, n] of tiles of ``tile_rows`` rows."""
    tiles, _, n = partials.shape
    tile = config.STATISTICS
    mean, variance = _float32(partials, 2, n).unbind()
    launch(
        partial_kernels.combine_statistics,
        (_tiles(n, tile.columns),),
        partials,
        mean,
        variance,
        tiles,
        n,
        rows,
        tile=tile,
        TILE_ROWS=tile_rows,
        LANES=tile.rows,
        COLUMNS=tile.columns,
    )
    return mean, variance


def _sum_partials(partials: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over the rows of partials [tiles, n]: of the first columns in ``first``, of the others in float32."""
    tiles, n = partials.shape
    tile = config.sums_tile(config.device_of(partials.device), n)
    rest = _float32(partials, n - first.numel())
    launch(
        partial_kernels.sum_partials,
        (_tiles(n, tile.columns),),
        partials,
        first,
        rest,
        tiles,
        n,
        first.numel(),
        tile=tile,
        LANES=tile.rows,
        COLUMNS=tile.columns,
    )
    return first, rest


def _adjacent(matrix: Tensor) -> Tensor:
    """``matrix`` with adjacent columns."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _taps_first(weight: Tensor) -> Tensor:
    """[k, B, 3, 3] as [k, 3, 3, B]; no copy if the memory is channels last."""
    return weight.permute(0, 2, 3, 1).contiguous()


def _windows(grid: tuple[int, ...]) -> int:
    """Rows M' after the 2x2 pooling."""
    return grid[0] * (grid[1] // 2) * (grid[2] // 2)


def _tiles(size: int, side: int) -> int:
    return -(-size // side)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _dot(dtype: torch.dtype) -> str:
    """The precision of a product as Triton names it; half precision has but one."""
    found = config.precision(dtype)
    return "ieee" if found == "half" else found
