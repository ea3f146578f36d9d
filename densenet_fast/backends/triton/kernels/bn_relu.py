"""A = relu(bn(X)), stored, because the taps of the 3x3 convolution read it nine times.

A[p, b] = relu((X[p, b] - mean_b) * weight_b * rstd_b + bias_b)
"""

import triton
import triton.language as tl

from densenet_fast.backends.triton.kernels import pieces
from densenet_fast.backends.triton.kernels.pieces import load_affine, tile_of_program


@triton.jit(do_not_specialize=["M", "C", "ld_x"])
def bn_relu(
    x,  # [M, C], rows ld_x apart
    mean,  # [C]
    rstd,  # [C]
    norm_bias,  # [C]
    norm_weight,  # [C], if WEIGHTED
    out,  # [M, C]
    M,
    C,
    ld_x,
    C_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    C, ld_x = C * C_UNIT, ld_x * X_UNIT
    _, rows, columns, inside_rows, inside = tile_of_program(M, C, ROWS, COLUMNS)
    m, s, t = load_affine(mean, rstd, norm_bias, norm_weight, columns, inside, WEIGHTED)
    wide_rows = rows.to(tl.int64)[:, None]
    valid = inside_rows[:, None] & inside[None, :]
    features = tl.load(x + wide_rows * ld_x + columns[None, :], mask=valid, other=0.0)
    tl.store(out + wide_rows * C + columns[None, :], pieces.bn_relu(features, m, s, t), mask=valid)
