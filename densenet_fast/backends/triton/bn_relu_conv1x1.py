"""The contract's ``bn_relu_conv1x1`` and its backward pass: two kernels and the reductions behind them."""

from torch import Tensor

from densenet_fast.backends.affine import Affine, Completion, Reader, Statistics, Unfinished
from densenet_fast.backends.triton import config
from densenet_fast.backends.triton.kernels import bn_relu_conv1x1 as forward
from densenet_fast.backends.triton.kernels import bn_relu_conv1x1_backward as backward
from densenet_fast.backends.triton.launch import launcher, units
from densenet_fast.backends.triton.shared import (
    Columns,
    Sums,
    adjacent,
    combine_statistics,
    dot_precision,
    finalise_gradient,
    float32,
    or_unread,
    sum_partials,
    tiles_of,
    weight_gradient,
)

launch_forward = launcher(forward.bn_relu_conv1x1)
launch_backward = launcher(backward.bn_relu_conv1x1_backward)


def bn_relu_conv1x1(
    x: Tensor,
    affine: Affine,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    statistics: Statistics | None,
    *,
    then: Affine | None = None,
) -> None:
    x, weight = adjacent(x), weight.contiguous()
    (rows, channels), width = x.shape, weight.shape[0]
    tile = config.tile("bn_relu_conv1x1", config.device_of(x.device), x.dtype, width)
    columns = config.fit(width, tile.columns)
    tiles = tiles_of(rows, tile.rows)
    partials = float32(x, 0 if statistics is None else tiles, 2, width)
    if then is not None and (then.weight is None) != (affine.weight is None):
        affine, then = (Affine(a.mean, a.scale, a.bias) for a in (affine, then))
    behind = affine if then is None else then
    (c, c_unit), (b, b_unit) = units(channels), units(width)
    (ld_x, x_unit), (ld_out, out_unit) = units(x.stride(0)), units(out.stride(0))
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
        then_mean=behind.mean,
        then_rstd=behind.rstd,
        then_bias=behind.bias,
        then_weight=or_unread(behind.weight, behind.mean),
        z=out,
        partials=partials,
        M=rows,
        C=c,
        ld_x=ld_x,
        B=b,
        ld_z=ld_out,
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
        WEIGHTED=affine.weight is not None,
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
    *,
    need_weight: bool,
    need_sums: bool,
    source: Tensor | None = None,
    reader: Reader | None = None,
    completion: Completion | None = None,
    unfinished: Unfinished | None = None,
    like: Tensor | None = None,
) -> tuple[Tensor | None, Sums | None]:
    other = unfinished.sums.pop() if unfinished is not None and unfinished.sums else None
    need_input = need_sums or grad_x is not None
    if not need_input and not need_weight:
        if other is not None:
            sum_partials(float32(x, 0, 0), None, 0, other=other)
        return None, None
    if unfinished is not None and unfinished.through is not None:
        grad = finalise_gradient(grad, unfinished.through, grad)
    grad, x, weight = adjacent(grad), adjacent(x), weight.contiguous()
    channels, width = x.shape[1], weight.shape[0]
    partials = _partials(grad, x, affine, weight, grad_x if source is None else source, grad_x, need_input, need_weight)
    grad_weight = weight_gradient(like, width, channels, x) if need_weight else None
    columns = None
    if completion is not None and reader is not None and reader.after is not None:
        columns, completion = Columns(grad_x, x, completion), None
    sums = sum_partials(partials, grad_weight, channels if need_input else 0, affine, reader, other, columns)
    if completion is not None:
        finalise_gradient(grad_x[:, completion.columns], completion.through, completion.out)
    return grad_weight, sums


def product_over_rows(grad: Tensor, x: Tensor) -> Tensor:
    """Partial results [ranges, K * C] of grad^T @ x for grad [M, K] and x [M, C]."""
    return _partials(grad, x, None, x, None, None, False, True)


def _partials(
    grad: Tensor,
    x: Tensor,
    affine: Affine | None,
    weight: Tensor,
    source: Tensor | None,
    grad_x: Tensor | None,
    need_input: bool,
    need_weight: bool,
) -> Tensor:
    """Updates grad_x, if there is one, and returns partial results [ranges, n].

    Their first B * C columns are dW's, if the weight is needed. The next are C of sum D and C of sum D * (x - mean), if
    the input is needed. Without an affine dW is the product of grad and x itself.
    """
    (rows, channels), width = x.shape, grad.shape[1]
    device = config.device_of(x.device)
    few = width if affine is not None else min(width, 128)  # one kernel for the plain products of all widths
    tile = config.tile("bn_relu_conv1x1_backward", device, x.dtype, few)
    block, columns = config.fit(max(width, 64), tile.inner), config.fit(channels, tile.columns)
    wide, column_tiles = width > block, tiles_of(channels, columns)
    per_processor = config.resident(tile, affine is None)
    ranges, range_rows = config.ranges(device, rows, tile.rows, column_tiles, per_processor)
    weight_rows = width if need_weight else 0
    partials = float32(x, ranges, (weight_rows + (2 if need_input else 0)) * channels)
    vectors = Affine(*(partials,) * 3) if affine is None else affine  # a plain product reads none
    source, target = or_unread(source, x), or_unread(grad_x, x)
    (c, c_unit), (b, b_unit) = units(channels), units(width)
    (ld_grad, grad_unit), (ld_x, x_unit) = units(grad.stride(0)), units(x.stride(0))
    (ld_source, source_unit), (ld_target, target_unit) = units(source.stride(0)), units(target.stride(0))

    def run(with_input: bool, with_weight: bool, blocks: int) -> None:
        launch_backward(
            (column_tiles, ranges, blocks),
            tile,
            grad=grad,
            x=x,
            mean=vectors.mean,
            rstd=vectors.rstd,
            norm_bias=vectors.bias,
            norm_weight=or_unread(vectors.weight, vectors.mean),
            weight=weight,
            source=source,
            grad_x=target,
            partials=partials,
            M=rows,
            C=c,
            B=b,
            ld_grad=ld_grad,
            ld_x=ld_x,
            ld_source=ld_source,
            ld_grad_x=ld_target,
            range_rows=range_rows,
            partial_rows=partials.shape[1] // channels,
            sums_row=weight_rows,
            C_UNIT=c_unit,
            B_UNIT=b_unit,
            GRAD_UNIT=grad_unit,
            X_UNIT=x_unit,
            SOURCE_UNIT=source_unit,
            GRAD_X_UNIT=target_unit,
            ROWS=tile.rows,
            CHANNELS=columns,
            WIDTH=block,
            INPUT=with_input,
            UPDATE=with_input and grad_x is not None,
            WEIGHT=with_weight,
            WIDE=with_input and wide,
            PLAIN=affine is None,
            WEIGHTED=affine is not None and affine.weight is not None,
            TURNED=with_input and with_weight and config.turned(device, x.dtype),
            PRECISION=dot_precision(x.dtype),
            STAGES=tile.stages,
        )

    if not wide:
        run(need_input, need_weight, 1)
    else:
        if need_input:
            run(True, False, 1)
        if need_weight:
            run(False, True, tiles_of(width, block))
    return partials
