"""Partial results, one row per tile, combined in a fixed order: statistics of columns, sums, and gradients from these.

    mean = sum_t n_t mean_t / M;   M2 = sum_t (M2_t + n_t (mean_t - mean)^2);   variance = M2 / M

Each of LANES lanes merges the tiles t, t + LANES, ... by Chan, Golub and LeVeque's pairwise update. Then the formula
above combines the lanes. Never E[x^2] - E[x]^2.
"""

import triton
import triton.language as tl

from densenet_fast.backends.triton.kernels.pieces import complete, sum_rows


@triton.jit(do_not_specialize=["tiles", "n", "M", "tile_rows"])
def combine_statistics(
    partials,  # [tiles, 2, n] float32: mean and M2 of each tile
    mean,  # [n]
    variance,  # [n]
    rstd,  # [n]: 1 / sqrt(variance + eps)
    tiles,
    n,
    M,
    tile_rows,
    eps,
    UNIT: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n = n * UNIT
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n
    lane = tl.arange(0, LANES)
    count = tl.zeros((LANES, COLUMNS), tl.float32)
    lane_mean = tl.zeros((LANES, COLUMNS), tl.float32)
    lane_m2 = tl.zeros((LANES, COLUMNS), tl.float32)
    for start in range(0, tiles, LANES):
        tile = start + lane
        valid = (tile < tiles)[:, None] & inside[None, :]
        row = partials + (tile.to(tl.int64) * 2 * n)[:, None] + columns[None, :]
        tile_mean = tl.load(row, mask=valid, other=0.0)
        tile_m2 = tl.load(row + n, mask=valid, other=0.0)
        added = tl.where(valid, tl.minimum(M - tile * tile_rows, tile_rows)[:, None].to(tl.float32), 0.0)
        total = count + added
        share = added / tl.maximum(total, 1.0)
        delta = tile_mean - lane_mean
        lane_m2 += tile_m2 + delta * delta * (count * share)
        lane_mean += delta * share
        count = total
    overall = tl.sum(count * lane_mean, 0) / M
    deviation = lane_mean - overall[None, :]
    m2 = tl.sum(lane_m2 + count * deviation * deviation, 0)
    tl.store(mean + columns, overall, mask=inside)
    tl.store(variance + columns, m2 / M, mask=inside)
    tl.store(rstd + columns, 1.0 / tl.sqrt_rn(m2 / M + eps), mask=inside)


@triton.jit(
    do_not_specialize=["tiles", "length", "n_weight", "C", "other_tiles", "n_other", "B", "taps", "tap_stride"]
    + ["channel_stride", "first_column", "n_columns", "M", "chunk_rows", "ld_grad", "ld_x", "ld_out"]
)
def sum_partials(
    partials,  # [tiles, length] float32: n_weight columns of a product, then C of sum D and C of sum D * (x - mean)
    grad_weight,  # [n_weight], any floating dtype
    mean,  # [C]
    rstd,  # [C]
    norm_weight,  # [C], if WEIGHTED
    p_before,  # [C], if BEFORE
    q_before,
    p,  # [C], if THROUGH; sum D, if RAW
    q,  # [C], if THROUGH; sum D * (x - mean), if RAW
    grad_norm_weight,  # [C], if GRAD_NORM_WEIGHT
    grad_norm_bias,  # [C], if GRAD_NORM_BIAS
    others,  # [other_tiles, n_other] float32: another product's, of [k, taps, B]
    grad_other,  # [k, taps, B] of strides (taps * B, tap_stride, channel_stride)
    grad,  # [M, C], rows ld_grad apart: columns from first_column on are completed
    x,  # [M, C], rows ld_x apart
    out,  # [M, n_columns], rows ld_out apart
    tiles,
    length,
    n_weight,
    C,
    other_tiles,
    n_other,
    B,
    taps,
    tap_stride,
    channel_stride,
    first_column,
    n_columns,
    M,
    chunk_rows,
    ld_grad,
    ld_x,
    ld_out,
    count,
    UNIT: tl.constexpr,
    OTHER_UNIT: tl.constexpr,
    MATRIX_UNIT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BEFORE: tl.constexpr,
    THROUGH: tl.constexpr,
    GRAD_NORM_WEIGHT: tl.constexpr,
    GRAD_NORM_BIAS: tl.constexpr,
    RAW: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE_LANES: tl.constexpr,
    WIDE: tl.constexpr,
    COMPLETED_LANES: tl.constexpr,
    COMPLETED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What one launch combines, each program one of three things.

    Some add up the two sums of COLUMNS columns and store the gradients through a normalisation that follow. Some add up
    WIDE elements of a product's gradient. The rest complete COMPLETED columns of a gradient by P and Q, chunk_rows rows
    each; they add up the sums of their columns for themselves.
    """
    length, n_weight, C, n_other = length * UNIT, n_weight * UNIT, C * UNIT, n_other * OTHER_UNIT
    first_column, n_columns = first_column * MATRIX_UNIT, n_columns * MATRIX_UNIT
    ld_grad, ld_x, ld_out = ld_grad * MATRIX_UNIT, ld_x * MATRIX_UNIT, ld_out * MATRIX_UNIT
    sums_programs, weight_programs = tl.cdiv(C, COLUMNS), tl.cdiv(n_weight, WIDE)
    other_programs = tl.cdiv(n_other, WIDE)
    program = tl.program_id(0)
    sums = partials + n_weight
    normalisation = rstd, norm_weight, p_before, q_before
    if program < sums_programs:
        pairs = sum_pairs(sums, C, tiles, length, program * COLUMNS, C, LANES, COLUMNS)
        own = program * COLUMNS + tl.arange(0, COLUMNS)
        gradients = p, q, grad_norm_weight, grad_norm_bias
        store_gradients(
            sums=pairs,
            normalisation=normalisation,
            gradients=gradients,
            columns=own,
            inside=own < C,
            WEIGHTED=WEIGHTED,
            BEFORE=BEFORE,
            THROUGH=THROUGH,
            GRAD_NORM_WEIGHT=GRAD_NORM_WEIGHT,
            GRAD_NORM_BIAS=GRAD_NORM_BIAS,
            RAW=RAW,
        )
    elif program < sums_programs + weight_programs:
        first = (program - sums_programs) * WIDE
        store_product(
            partials=partials,
            tiles=tiles,
            length=length,
            out=grad_weight,
            first=first,
            n=n_weight,
            B=n_weight,
            taps=1,
            tap_stride=0,
            channel_stride=1,
            LANES=WIDE_LANES,
            COLUMNS=WIDE,
        )
    elif program < sums_programs + weight_programs + other_programs:
        first = (program - sums_programs - weight_programs) * WIDE
        store_product(
            partials=others,
            tiles=other_tiles,
            length=n_other,
            out=grad_other,
            first=first,
            n=n_other,
            B=B,
            taps=taps,
            tap_stride=tap_stride,
            channel_stride=channel_stride,
            LANES=WIDE_LANES,
            COLUMNS=WIDE,
        )
    else:
        chunk = program - sums_programs - weight_programs - other_programs
        column_tiles = tl.cdiv(n_columns, COMPLETED)
        first = first_column + (chunk % column_tiles) * COMPLETED
        end = first_column + n_columns
        pairs = sum_pairs(sums, C, tiles, length, first, end, COMPLETED_LANES, COMPLETED)
        own = first + tl.arange(0, COMPLETED)
        through = gradients_through(pairs, normalisation, own, own < end, WEIGHTED, BEFORE)
        m = tl.load(mean + own, mask=own < end, other=0.0)
        first_row = (chunk // column_tiles) * chunk_rows
        last_row = tl.minimum(first_row + chunk_rows, M)
        complete(
            grad=grad,
            ld_grad=ld_grad,
            x=x,
            ld_x=ld_x,
            m=m,
            constant=through[0] / count,
            slope=2 * through[1] / count,
            out=out - first_column,
            ld_out=ld_out,
            first_row=first_row,
            last_row=last_row,
            columns=own,
            inside=own < end,
            ROWS=ROWS,
        )


@triton.jit
def store_product(
    partials,
    tiles,
    length,
    out,
    first,
    n,
    B,
    taps,
    tap_stride,
    channel_stride,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds up and stores COLUMNS of the n elements of a product's gradient [k, taps, B], from the ``first`` on."""
    columns = first + tl.arange(0, COLUMNS)
    total = sum_rows(partials, tiles, length, columns, columns < n, LANES, COLUMNS)
    k, tap, b = columns // (taps * B), columns // B % taps, columns % B
    place = k * (taps * B) + tap * tap_stride + b * channel_stride
    tl.store(out + place, total.to(out.dtype.element_ty), mask=columns < n)


@triton.jit
def sum_pairs(sums, C, tiles, length, first, end, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """sum D and sum D * (x - mean) of COLUMNS columns from the ``first`` on; zero from ``end`` on. The two stand C
    apart in each row of partial results."""
    columns, lane = first + tl.arange(0, COLUMNS), tl.arange(0, LANES)
    total_d = tl.zeros((LANES, COLUMNS), tl.float32)
    total_dx = tl.zeros((LANES, COLUMNS), tl.float32)
    for start in range(0, tiles, LANES):
        tile = start + lane
        row = sums + (tile.to(tl.int64) * length)[:, None] + columns[None, :]
        valid = (tile < tiles)[:, None] & (columns < end)[None, :]
        total_d += tl.load(row, mask=valid, other=0.0)
        total_dx += tl.load(row + C, mask=valid, other=0.0)
    return tl.sum(total_d, 0), tl.sum(total_dx, 0)


@triton.jit
def store_gradients(
    sums,
    normalisation,
    gradients,
    columns,
    inside,
    WEIGHTED: tl.constexpr,
    BEFORE: tl.constexpr,
    THROUGH: tl.constexpr,
    GRAD_NORM_WEIGHT: tl.constexpr,
    GRAD_NORM_BIAS: tl.constexpr,
    RAW: tl.constexpr,
):
    """Stores what is asked for: P and Q, the gradients of the normalisation's weight and bias, or the sums."""
    p, q, grad_norm_weight, grad_norm_bias = gradients
    if RAW:
        tl.store(p + columns, sums[0], mask=inside)
        tl.store(q + columns, sums[1], mask=inside)
    if THROUGH:
        through = gradients_through(sums, normalisation, columns, inside, WEIGHTED, BEFORE)
        tl.store(p + columns, through[0], mask=inside)
        tl.store(q + columns, through[1], mask=inside)
    if GRAD_NORM_WEIGHT:
        r = tl.load(normalisation[0] + columns, mask=inside, other=0.0)
        tl.store(grad_norm_weight + columns, (sums[1] * r).to(grad_norm_weight.dtype.element_ty), mask=inside)
    if GRAD_NORM_BIAS:
        tl.store(grad_norm_bias + columns, sums[0].to(grad_norm_bias.dtype.element_ty), mask=inside)


@triton.jit
def gradients_through(sums, normalisation, columns, inside, WEIGHTED: tl.constexpr, BEFORE: tl.constexpr):
    """P = P_before - scale * sum D and Q = Q_before - scale * rstd^2 * sum D * (x - mean) / 2."""
    rstd, weight, p_before, q_before = normalisation
    r = tl.load(rstd + columns, mask=inside, other=0.0)
    s = r
    if WEIGHTED:
        s *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    p, q = -s * sums[0], -0.5 * (s * r * r) * sums[1]
    if BEFORE:
        p += tl.load(p_before + columns, mask=inside, other=0.0)
        q += tl.load(q_before + columns, mask=inside, other=0.0)
    return p, q
