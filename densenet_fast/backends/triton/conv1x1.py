"""``aten.bn_relu_conv1x1`` and its backward pass: launches of two kernels and of the reductions behind them."""

import torch
from torch import Tensor

from densenet_fast.backends.affine import Affine, Statistics, ThroughStatistics
from densenet_fast.backends.triton import config
from densenet_fast.backends.triton.kernels.bn_relu_conv1x1 import bn_relu_conv1x1 as conv1x1_kernel
from densenet_fast.backends.triton.kernels.bn_relu_conv1x1_backward import (
    bn_relu_conv1x1_backward as conv1x1_backward_kernel,
)
from densenet_fast.backends.triton.launch import launch, units
from densenet_fast.backends.triton.shared import (
    Sums,
    adjacent,
    combine_statistics,
    dot_precision,
    finalise_gradient,
    float32,
    sum_partials,
    tiles_of,
)


def bn_relu_conv1x1(
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    statistics: Statistics | None,
    then: Affine | None = None,
) -> None:
    x, weight = adjacent(x), weight.contiguous()
    (rows, channels), width = x.shape, weight.shape[0]
    tile = config.tile("bn_relu_conv1x1", config.device_of(x.device), x.dtype, width)
    columns = config.fit(width, tile.columns)
    tiles = tiles_of(rows, tile.rows)
    partials = float32(x, 0 if statistics is None else tiles, 2, width)
    (c, c_unit), (b, b_unit) = units(channels), units(width)
    (ld_x, x_unit), (ld_out, out_unit) = units(x.stride(0)), units(out.stride(0))
    launch(
        conv1x1_kernel,
        (tiles * tiles_of(width, columns),),
        x,
        *affine,
        weight,
        weight if bias is None else bias,
        *(affine if then is None else then),
        out,
        partials,
        rows,
        c,
        ld_x,
        b,
        ld_out,
        tile=tile,
        C_UNIT=c_unit,
        X_UNIT=x_unit,
        B_UNIT=b_unit,
        Z_UNIT=out_unit,
        ROWS=tile.rows,
        COLUMNS=columns,
        INNER=config.fit(channels, tile.inner),
        BIAS=bias is not None,
        THEN=then is not None,
        STATISTICS=statistics is not None,
        PRECISION=dot_precision(x.dtype),
    )
    if statistics is not None:
        combine_statistics(partials, rows, tile.rows, statistics)


def bn_relu_conv1x1_backward(
    grad: Tensor,
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    grad_x: Tensor | None,
    need_weight: bool,
    need_sums: bool,
    through: ThroughStatistics | None = None,
    source: Tensor | None = None,
) -> tuple[Tensor | None, Sums | None]:
    need_input = need_sums or grad_x is not None
    if not need_input and not need_weight:
        return None, None
    if source is not None and grad_x is not None:
        grad_x.copy_(source)
    if through is not None:
        grad = finalise_gradient(grad, through, torch.empty_like(grad))
    grad, x, weight = adjacent(grad), adjacent(x), weight.contiguous()
    (rows, channels), width = x.shape, weight.shape[0]
    device = config.device_of(x.device)
    tile = config.tile("bn_relu_conv1x1_backward", device, x.dtype, width)
    block, columns = config.fit(width, tile.inner), config.fit(channels, tile.columns)
    wide, column_tiles = width > block, tiles_of(channels, columns)
    ranges, range_rows = config.ranges(device, rows, tile.rows, column_tiles)
    weight_rows = width if need_weight else 0
    partials = float32(x, ranges, weight_rows + (2 if need_input else 0), channels)
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
            PRECISION=dot_precision(x.dtype),
        )

    if not wide:
        run(need_input, need_weight, 1)
    else:
        if need_input:
            run(True, False, 1)
        if need_weight:
            run(False, True, tiles_of(width, block))
    grad_weight, sums = sum_partials(partials.flatten(1), x.new_empty(weight_rows, channels))
    return grad_weight if need_weight else None, sums.view(2, channels).unbind() if need_input else None
