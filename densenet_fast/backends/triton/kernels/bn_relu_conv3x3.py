"""Y = conv3x3(A, W2) for A = relu(bn(Z)), straight into k columns of the block's buffer, with their statistics.

    Y[p, j] = sum_{dy, dx, b} A[p + dy * W + dx, b] * W2[j, dy, dx, b]  (+ bias_j, * mask[p, j] * keep_scale)

The taps dy, dx run over -1..1 and stay inside the image: a tap outside loads zeros. One program makes ROWS x COLUMNS
of Y in one loop over taps and blocks of INNER channels.
"""

import triton
import triton.language as tl

from densenet_fast.backends.triton.kernels.pieces import add_bias, store_result, tile_of_program


@triton.jit(do_not_specialize=["M", "B", "k", "H", "W", "ld_out", "taps", "keep_n", "keep_k", "keep_h", "keep_w"])
def bn_relu_conv3x3(
    a,  # [M, B]
    weight,  # [k, 3, 3, B]
    bias,  # [k]
    keep,  # [N, k, H, W] bool, of any strides
    out,  # [M, k], rows ld_out apart
    partials,  # [row tiles, 2, k] float32
    M,
    B,
    k,
    H,
    W,
    ld_out,
    taps,
    keep_n,
    keep_k,
    keep_h,
    keep_w,
    keep_scale,
    B_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    B, k, ld_out = B * B_UNIT, k * K_UNIT, ld_out * OUT_UNIT
    place = tile_of_program(M, k, ROWS, COLUMNS)
    _, rows, columns, inside_rows, inside_columns = place
    y, x = (rows // W) % H, rows % W
    a_rows = a + rows.to(tl.int64)[:, None] * B
    weight_columns = weight + columns[None, :] * (taps * B)
    blocks = tl.cdiv(B, INNER)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, taps * blocks):
        tap = step // blocks
        channels = (step % blocks) * INNER + tl.arange(0, INNER)
        dy, dx = tap // 3 - 1, tap % 3 - 1
        inside = channels < B
        on_image = inside_rows & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        shifted = a_rows + ((dy * W + dx) * B + channels)[None, :]
        tapped = tl.load(shifted, mask=on_image[:, None] & inside[None, :], other=0.0)
        w = tl.load(
            weight_columns + (tap * B + channels)[:, None], mask=inside[:, None] & inside_columns[None, :], other=0.0
        )
        total = tl.dot(tapped, w, total, input_precision=PRECISION)
    total = add_bias(total, bias, columns, inside_columns, BIAS)
    if KEEP:
        valid = inside_rows[:, None] & inside_columns[None, :]
        pixels = (rows // W // H).to(tl.int64) * keep_n + y.to(tl.int64) * keep_h + x.to(tl.int64) * keep_w
        kept = tl.load(keep + pixels[:, None] + columns.to(tl.int64)[None, :] * keep_k, mask=valid, other=0)
        total *= kept.to(tl.float32) * keep_scale
    store_result(total, out, ld_out, place, M, k, partials, STATISTICS)
