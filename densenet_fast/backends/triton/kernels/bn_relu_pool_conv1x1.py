"""The transition: out = mean2x2(relu(bn(F))) @ W^T and, in the same pass over F, the statistics of out as stored.

    P[q, c] = 1/4 sum_{4 pixels p of window q} relu((F[p, c] - mean_c) * scale_c + shift_c)
    out[q, j] = sum_c P[q, c] * W[j, c]  (+ bias_j)

Pooling and the product are linear and commute. So the pooling comes first, which leaves a quarter of the
multiplications. In 16 bits P is multiplied in two parts: P as rounded, and what the rounding lost. Stock rounds the
product alone.
"""

import triton
import triton.language as tl

from densenet_fast.backends.triton.kernels.pieces import (
    add_bias,
    load_affine,
    normalise,
    relu,
    settled,
    store_result,
    tile_of_program,
    top_left,
)


@triton.jit(do_not_specialize=["M", "C", "ld_x", "K", "H", "W"])
def bn_relu_pool_conv1x1(
    x,  # [M, C], rows ld_x apart
    mean,  # [C]
    rstd,  # [C]
    norm_bias,  # [C]
    norm_weight,  # [C], if WEIGHTED
    weight,  # [K, C]
    bias,  # [K]
    out,  # [M', K]
    partials,  # [row tiles, 2, K] float32
    M,  # M' = N * (H // 2) * (W // 2)
    C,
    ld_x,
    K,
    H,
    W,
    C_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BIAS: tl.constexpr,
    STATISTICS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    C, ld_x, K = C * C_UNIT, ld_x * X_UNIT, K * K_UNIT
    place = tile_of_program(M, K, ROWS, COLUMNS)
    _, windows, columns, inside_rows, inside_columns = place
    x_rows = x + top_left(windows, H, W)[:, None] * ld_x
    weight_columns = weight + columns[None, :] * C

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, C, INNER):
        channels = start + tl.arange(0, INNER)
        inside = channels < C
        m, s, t = load_affine(mean, rstd, norm_bias, norm_weight, channels, inside, WEIGHTED)
        pooled = tl.zeros((ROWS, INNER), tl.float32)
        for i in tl.static_range(4):
            pixels = x_rows + ((i // 2) * W + i % 2) * ld_x + channels[None, :]
            features = tl.load(pixels, mask=inside_rows[:, None] & inside[None, :], other=0.0)
            pooled += relu(normalise(features, m, s, t)[1])
        w = tl.load(weight_columns + channels[:, None], mask=inside[:, None] & inside_columns[None, :], other=0.0)
        pooled *= 0.25
        rounded = pooled.to(w.dtype)
        total = settled(tl.dot(rounded, w, total, input_precision=PRECISION))
        if w.dtype != tl.float32:
            rest = (pooled - rounded.to(tl.float32)).to(w.dtype)
            total = settled(tl.dot(rest, w, total, input_precision=PRECISION))
    total = add_bias(total, bias, columns, inside_columns, BIAS)
    store_result(total, out, K, place, M, K, partials, STATISTICS)
