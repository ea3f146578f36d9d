"""The gradients of Z = relu(bn(F[:, :C])) @ W1^T from dZ, in one pass over F and G.

    D   = (dZ @ W1) * (bn(F) > 0)
    G   = source + scale * D
    dW1 = dZ^T @ relu(bn(F));   sum D;   sum D * (F - mean)

One program owns CHANNELS columns of F and a range of rows. It keeps its part of W1, of dW1 and of the two column sums.
It walks down its rows, ROWS at a time, and leaves dW1 and the sums as partial results, one per range. The programs of
one range are neighbours in the grid, so that all but the first find dZ in the L2 cache.

While the products of a tile of ROWS rows run, F, G and dZ of the next STAGES - 2 tiles are on their way into shared
memory; one more tile is asked for behind them. By default Triton copies ahead only what a product reads. G is no
operand, so every tile would wait for it. A loop that says its number of stages itself has all its loads copied ahead.
``source`` may be ``grad_x``: a tile's G is read before it is written, and by its own program alone.

B above WIDTH takes two launches. One (INPUT) walks over the B columns of dZ in blocks for each row tile. The other
(WEIGHT) has a program per block. PLAIN is the product dZ^T @ F alone.
"""

import triton
import triton.language as tl

from densenet_fast.backends.triton.kernels.pieces import beside, load_affine, normalise, relu, store_sums


@triton.jit(
    do_not_specialize=["M", "C", "B", "ld_grad", "ld_x", "ld_source", "ld_grad_x"]
    + ["range_rows", "partial_rows", "sums_row"]
)
def bn_relu_conv1x1_backward(
    grad,  # [M, B], rows ld_grad apart
    x,  # [M, C], rows ld_x apart
    mean,  # [C]
    rstd,  # [C]
    norm_bias,  # [C]
    norm_weight,  # [C], if WEIGHTED
    weight,  # [B, C]
    source,  # [M, C], rows ld_source apart: what G was; may be grad_x
    grad_x,  # [M, C], rows ld_grad_x apart: G
    partials,  # [ranges, dW1's B rows if asked for, then the sums' two if asked for, C] float32
    M,
    C,
    B,
    ld_grad,
    ld_x,
    ld_source,
    ld_grad_x,
    range_rows,
    partial_rows,
    sums_row,
    C_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    SOURCE_UNIT: tl.constexpr,
    GRAD_X_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    INPUT: tl.constexpr,
    UPDATE: tl.constexpr,
    WEIGHT: tl.constexpr,
    WIDE: tl.constexpr,
    PLAIN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    C, B = C * C_UNIT, B * B_UNIT
    ld_grad, ld_x = ld_grad * GRAD_UNIT, ld_x * X_UNIT
    ld_source, ld_grad_x = ld_source * SOURCE_UNIT, ld_grad_x * GRAD_X_UNIT
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channels < C
    if not PLAIN:
        m, s, t = load_affine(mean, rstd, norm_bias, norm_weight, channels, inside, WEIGHTED)
    block = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    inside_block = block < B
    if INPUT and not WIDE:
        w = tl.load(
            weight + block[:, None] * C + channels[None, :], mask=inside_block[:, None] & inside[None, :], other=0.0
        )
    if INPUT:
        sum_d = tl.zeros((ROWS, CHANNELS), tl.float32)
        sum_dx = tl.zeros((ROWS, CHANNELS), tl.float32)
    if WEIGHT:
        grad_weight = tl.zeros((CHANNELS, WIDTH) if TURNED else (WIDTH, CHANNELS), tl.float32)
    tile_rows = tl.arange(0, ROWS)
    x_offsets = tile_rows[:, None] * ld_x + channels[None, :]
    source_offsets = tile_rows[:, None] * ld_source + channels[None, :]
    grad_x_offsets = tile_rows[:, None] * ld_grad_x + channels[None, :]
    grad_offsets = tile_rows[:, None] * ld_grad

    first = tl.program_id(1) * range_rows
    for start in tl.range(first, tl.minimum(first + range_rows, M), ROWS, num_stages=STAGES):
        inside_rows = start + tile_rows < M
        row = tl.cast(start, tl.int64)
        valid = inside_rows[:, None] & inside[None, :]
        features = tl.load(x + row * ld_x + x_offsets, mask=valid, other=0.0)
        if UPDATE:
            before = tl.load(source + row * ld_source + source_offsets, mask=valid, other=0.0)
        if not PLAIN:
            centred, normalised = normalise(features, m, s, t)
        dz_rows = grad + row * ld_grad + grad_offsets
        if not WIDE:
            dz = tl.load(dz_rows + block[None, :], mask=inside_rows[:, None] & inside_block[None, :], other=0.0)
        if INPUT:
            if WIDE:
                product = tl.zeros((ROWS, CHANNELS), tl.float32)
                for b in range(0, B, WIDTH):
                    part = b + tl.arange(0, WIDTH)
                    dz = tl.load(dz_rows + part[None, :], mask=inside_rows[:, None] & (part < B)[None, :], other=0.0)
                    w = tl.load(
                        weight + part[:, None] * C + channels[None, :],
                        mask=(part < B)[:, None] & inside[None, :],
                        other=0.0,
                    )
                    product = tl.dot(dz, w, product, input_precision=PRECISION)
            else:
                product = tl.dot(dz, w, input_precision=PRECISION)
            d = tl.where(normalised <= 0, 0.0, product)
            sum_d += d
            sum_dx += d * centred
            if UPDATE:
                updated = before.to(tl.float32) + s * d
                g = grad_x + row * ld_grad_x + grad_x_offsets
                tl.store(g, updated.to(grad_x.dtype.element_ty), mask=valid)
        if WEIGHT:
            a = features
            if not PLAIN:
                a = relu(normalised).to(features.dtype)
            if INPUT and (TURNED or ROWS < 64):  # products of warp groups, from 64 rows, may hold all of it twice
                a = beside(a, product)
            if TURNED:
                grad_weight = tl.dot(tl.trans(a), dz, grad_weight, input_precision=PRECISION)
            else:
                grad_weight = tl.dot(tl.trans(dz), a, grad_weight, input_precision=PRECISION)

    partial = partials + tl.program_id(1).to(tl.int64) * partial_rows * C
    if WEIGHT:
        tl.store(
            partial + block[:, None] * C + channels[None, :],
            tl.trans(grad_weight) if TURNED else grad_weight,
            mask=inside_block[:, None] & inside[None, :],
        )
    if INPUT:
        store_sums(tl.sum(sum_d, 0), tl.sum(sum_dx, 0), partial + sums_row * C, channels, C, inside)
