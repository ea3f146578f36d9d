"""The transition's backward pass: one pass over F.

    U = (dOut @ W) / 4, given to each of the four pixels p of its window
    D[p, c] = U[q, c] * (bn(F)[p, c] > 0);   scale * D;   sum D;   sum D * (F - mean)
    P[q, c] = 1/4 sum_p relu(bn(F)[p, c]), for dW = dOut^T @ P, a plain matrix product that follows

Pixels that the pooling drops are not written.
"""

import triton
import triton.language as tl

from densenet_fast.backends.triton.kernels.pieces import (
    load_affine,
    normalise,
    relu,
    store_sums,
    tile_of_program,
    top_left,
)


@triton.jit(do_not_specialize=["M", "C", "K", "ld_grad", "ld_x", "H", "W"])
def bn_relu_pool_conv1x1_backward(
    grad,  # [M', K], rows ld_grad apart
    x,  # [M, C], rows ld_x apart
    mean,  # [C]
    rstd,  # [C]
    norm_bias,  # [C]
    norm_weight,  # [C], if WEIGHTED
    weight,  # [K, C]
    scaled,  # [M, C]
    pooled,  # [M', C]
    partials,  # [row tiles, 2, C] float32
    M,  # M' = N * (H // 2) * (W // 2)
    C,
    K,
    ld_grad,
    ld_x,
    H,
    W,
    C_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    INPUT: tl.constexpr,
    POOLED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    C, K = C * C_UNIT, K * K_UNIT
    ld_grad, ld_x = ld_grad * GRAD_UNIT, ld_x * X_UNIT
    tile, windows, columns, inside_rows, inside = tile_of_program(M, C, ROWS, COLUMNS)
    valid = inside_rows[:, None] & inside[None, :]
    wide_windows = windows.to(tl.int64)

    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    if INPUT:
        for start in range(0, K, INNER):
            outputs = start + tl.arange(0, INNER)
            inside_outputs = outputs < K
            g = tl.load(
                grad + wide_windows[:, None] * ld_grad + outputs[None, :],
                mask=inside_rows[:, None] & inside_outputs[None, :],
                other=0.0,
            )
            w = tl.load(
                weight + outputs[:, None] * C + columns[None, :],
                mask=inside_outputs[:, None] & inside[None, :],
                other=0.0,
            )
            product = tl.dot(g, w, product, input_precision=PRECISION)
    share = 0.25 * product

    m, s, t = load_affine(mean, rstd, norm_bias, norm_weight, columns, inside, WEIGHTED)
    first = top_left(windows, H, W)
    sum_d = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum_dx = tl.zeros((ROWS, COLUMNS), tl.float32)
    mean_a = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(4):
        pixels = (first + ((i // 2) * W + i % 2))[:, None]
        features = tl.load(x + pixels * ld_x + columns[None, :], mask=valid, other=0.0)
        centred, normalised = normalise(features, m, s, t)
        if INPUT:
            d = tl.where(valid & ~(normalised <= 0), share, 0.0)
            sum_d += d
            sum_dx += d * centred
            tl.store(scaled + pixels * C + columns[None, :], (s * d).to(scaled.dtype.element_ty), mask=valid)
        mean_a += 0.25 * relu(normalised)
    if INPUT:
        store_sums(tl.sum(sum_d, 0), tl.sum(sum_dx, 0), partials + tile.to(tl.int64) * 2 * C, columns, C, inside)
    if POOLED:
        tl.store(pooled + wide_windows[:, None] * C + columns[None, :], mean_a.to(pooled.dtype.element_ty), mask=valid)
