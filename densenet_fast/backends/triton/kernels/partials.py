"""Partial results, one row per tile, combined in fixed order: statistics of columns, sums, and what follows from them.

    mean = sum_t n_t mean_t / M;   M2 = sum_t (M2_t + n_t (mean_t - mean)^2);   variance = M2 / M

Each of LANES lanes merges the tiles t, t + LANES, ... by Chan, Golub and LeVeque's pairwise update; then the lanes are
combined by the formula above. Never E[x^2] - E[x]^2.
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
    """What one launch combines: the two sums, by COLUMNS columns, and the gradients through a normalisation that they
    make; the products' gradients, by WIDE; and gradients of columns that are completed by these P and Q, by COMPLETED
    columns and chunk_rows rows, each program adding up for itself what it needs."""
    length, n_weight, C, n_other = length * UNIT, n_weight * UNIT, C * UNIT, n_other * OTHER_UNIT
    first_column, ld_grad = first_column * MATRIX_UNIT, ld_grad * MATRIX_UNIT
    ld_x, ld_out = ld_x * MATRIX_UNIT, ld_out * MATRIX_UNIT
    sums_programs, weight_programs = tl.cdiv(C, COLUMNS), tl.cdiv(n_weight, WIDE)
    other_programs = tl.cdiv(n_other, WIDE)
    program = tl.program_id(0)
    sums = partials + n_weight
    if program < sums_programs:
        columns = program * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < C
        sum_d, sum_dx = sum_pairs(sums, C, tiles, length, columns, inside, LANES, COLUMNS)
        if RAW:
            tl.store(p + columns, sum_d, mask=inside)
            tl.store(q + columns, sum_dx, mask=inside)
        if THROUGH:
            through = gradients_through(
                sum_d, sum_dx, rstd, norm_weight, p_before, q_before, columns, inside, WEIGHTED, BEFORE
            )
            tl.store(p + columns, through[0], mask=inside)
            tl.store(q + columns, through[1], mask=inside)
        if GRAD_NORM_WEIGHT:
            r = tl.load(rstd + columns, mask=inside, other=0.0)
            tl.store(grad_norm_weight + columns, (sum_dx * r).to(grad_norm_weight.dtype.element_ty), mask=inside)
        if GRAD_NORM_BIAS:
            tl.store(grad_norm_bias + columns, sum_d.to(grad_norm_bias.dtype.element_ty), mask=inside)
    elif program < sums_programs + weight_programs:
        columns = (program - sums_programs) * WIDE + tl.arange(0, WIDE)
        inside = columns < n_weight
        total = sum_rows(partials, tiles, length, columns, inside, WIDE_LANES, WIDE)
        tl.store(grad_weight + columns, total.to(grad_weight.dtype.element_ty), mask=inside)
    elif program < sums_programs + weight_programs + other_programs:
        columns = (program - sums_programs - weight_programs) * WIDE + tl.arange(0, WIDE)
        inside = columns < n_other
        total = sum_rows(others, other_tiles, n_other, columns, inside, WIDE_LANES, WIDE)
        k, tap, b = columns // (taps * B), columns // B % taps, columns % B
        place = k * (taps * B) + tap * tap_stride + b * channel_stride
        tl.store(grad_other + place, total.to(grad_other.dtype.element_ty), mask=inside)
    else:
        program -= sums_programs + weight_programs + other_programs
        column_tiles = tl.cdiv(n_columns, COMPLETED)
        columns = (program % column_tiles) * COMPLETED + tl.arange(0, COMPLETED)
        inside = columns < n_columns
        own = first_column + columns
        sum_d, sum_dx = sum_pairs(sums, C, tiles, length, own, inside, COMPLETED_LANES, COMPLETED)
        through = gradients_through(sum_d, sum_dx, rstd, norm_weight, p_before, q_before, own, inside, WEIGHTED, BEFORE)
        m = tl.load(mean + own, mask=inside, other=0.0)
        first_row = (program // column_tiles) * chunk_rows
        last_row = tl.minimum(first_row + chunk_rows, M)
        complete(
            grad + first_column,
            ld_grad,
            x + first_column,
            ld_x,
            out,
            ld_out,
            m,
            through[0] / count,
            2 * through[1] / count,
            first_row,
            last_row,
            columns,
            inside,
            ROWS,
        )


@triton.jit
def sum_pairs(sums, C, tiles, length, columns, inside, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """sum D and sum D * (x - mean) of ``columns``, which stand C apart in each row of partial results."""
    lane = tl.arange(0, LANES)
    total_d = tl.zeros((LANES, COLUMNS), tl.float32)
    total_dx = tl.zeros((LANES, COLUMNS), tl.float32)
    for start in range(0, tiles, LANES):
        tile = start + lane
        row = sums + (tile.to(tl.int64) * length)[:, None] + columns[None, :]
        valid = (tile < tiles)[:, None] & inside[None, :]
        total_d += tl.load(row, mask=valid, other=0.0)
        total_dx += tl.load(row + C, mask=valid, other=0.0)
    return tl.sum(total_d, 0), tl.sum(total_dx, 0)


@triton.jit
def gradients_through(
    sum_d, sum_dx, rstd, weight, p_before, q_before, columns, inside, WEIGHTED: tl.constexpr, BEFORE: tl.constexpr
):
    """P = P_before - scale * sum D and Q = Q_before - scale * rstd^2 * sum D * (x - mean) / 2."""
    r = tl.load(rstd + columns, mask=inside, other=0.0)
    s = r
    if WEIGHTED:
        s *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    p, q = -s * sum_d, -0.5 * (s * r * r) * sum_dx
    if BEFORE:
        p += tl.load(p_before + columns, mask=inside, other=0.0)
        q += tl.load(q_before + columns, mask=inside, other=0.0)
    return p, q
