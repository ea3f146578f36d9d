"""Partial results, one row per tile, combined in fixed order: statistics of columns, and sums.

    mean = sum_t n_t mean_t / M;   M2 = sum_t (M2_t + n_t (mean_t - mean)^2);   variance = M2 / M

Each of LANES lanes merges the tiles t, t + LANES, ... by Chan, Golub and LeVeque's pairwise update; then the lanes are
combined by the formula above. Never E[x^2] - E[x]^2.
"""

import triton
import triton.language as tl


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


@triton.jit(do_not_specialize=["tiles", "n", "n_first"])
def sum_partials(
    partials,  # [tiles, n] float32
    first,  # [n_first], any floating dtype: the sums of the first n_first columns
    rest,  # [n - n_first] float32: the others'
    tiles,
    n,
    n_first,
    UNIT: tl.constexpr,
    FIRST_UNIT: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n, n_first = n * UNIT, n_first * FIRST_UNIT
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < n
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES, COLUMNS), tl.float32)
    for start in range(0, tiles, LANES):
        tile = start + lane
        row = partials + (tile.to(tl.int64) * n)[:, None] + columns[None, :]
        total += tl.load(row, mask=(tile < tiles)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, 0)
    in_first = columns < n_first
    tl.store(first + columns, result.to(first.dtype.element_ty), mask=in_first)
    tl.store(rest + (columns - n_first), result, mask=inside & (columns >= n_first))
