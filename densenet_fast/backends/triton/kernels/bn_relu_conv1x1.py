"""Z = relu(bn(F[:, :C])) @ W1^T and, in the same pass, the statistics of Z as stored.

    Z[p, b] = sum_c relu((F[p, c] - mean_c) * scale_c + shift_c) * W1[b, c]  (+ bias_b)

Where Z's statistics are known before (THEN), relu(bn2(Z)) is stored in Z's place.

One program makes ROWS x COLUMNS of Z, INNER channels at a time. It normalises them in registers on their way to the
product. The programs of one row tile are neighbours in the grid, so that all but the first find F in the L2 cache.
"""

import triton
import triton.language as tl

from densenet_fast.backends.triton.kernels.pieces import (
    add_bias,
    bn_relu,
    load_affine,
    settled,
    store_result,
    tile_of_program,
)


@triton.jit(do_not_specialize=["M", "C", "ld_x", "B", "ld_z"])
def bn_relu_conv1x1(
    x,  # [M, C], rows ld_x apart
    mean,  # [C]
    rstd,  # [C]
    norm_bias,  # [C]
    norm_weight,  # [C], if WEIGHTED
    weight,  # [B, C]
    bias,  # [B]
    then_mean,  # [B]
    then_rstd,  # [B]
    then_bias,  # [B]
    then_weight,  # [B], if WEIGHTED
    z,  # [M, B], rows ld_z apart
    partials,  # [row tiles, 2, B] float32
    M,
    C,
    ld_x,
    B,
    ld_z,
    C_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr,
    Z_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BIAS: tl.constexpr,
    THEN: tl.constexpr,
    STATISTICS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    C, ld_x, B, ld_z = C * C_UNIT, ld_x * X_UNIT, B * B_UNIT, ld_z * Z_UNIT
    place = tile_of_program(M, B, ROWS, COLUMNS)
    _, rows, columns, inside_rows, inside_columns = place
    x_rows = x + rows.to(tl.int64)[:, None] * ld_x
    weight_columns = weight + columns[None, :] * C

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, C, INNER):
        channels = start + tl.arange(0, INNER)
        inside = channels < C
        m, s, t = load_affine(mean, rstd, norm_bias, norm_weight, channels, inside, WEIGHTED)
        features = tl.load(x_rows + channels[None, :], mask=inside_rows[:, None] & inside[None, :], other=0.0)
        w = tl.load(weight_columns + channels[:, None], mask=inside[:, None] & inside_columns[None, :], other=0.0)
        total = settled(tl.dot(bn_relu(features, m, s, t), w, total, input_precision=PRECISION))
    total = add_bias(total, bias, columns, inside_columns, BIAS)
    if THEN:
        m, s, t = load_affine(then_mean, then_rstd, then_bias, then_weight, columns, inside_columns, WEIGHTED)
        total = bn_relu(total, m, s, t)
    store_result(total, z, ld_z, place, M, B, partials, STATISTICS)
