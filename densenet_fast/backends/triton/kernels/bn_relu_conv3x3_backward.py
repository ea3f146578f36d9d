"""The gradients of Y = conv3x3(relu(bn(Z)), W2) from dY: Z's, with D's column sums, and W2's.

    D[p, b] = (bn(Z)[p, b] > 0) * sum_{dy, dx, j} dY[p - dy * W - dx, j] * W2[j, dy, dx, b]
    scale * D;   sum D;   sum D * (Z - mean);   A = relu(bn(Z)), for the product that follows
    dW2[j, dy, dx, b] = sum_p dY[p - dy * W - dx, j] * A[p, b]

The sums are over the shifted pixels that stay inside the image. In the weight gradient A stays where it is and dY is
shifted. A program takes the three taps of one dy, BLOCK channels, WIDTH outputs and a range of rows. It leaves the
range's partial result. Further programs of the same launch complete dZ, which this product does not read:

    dZ = scale * D + (P + 2 * Q * (Z - mean)) / count
"""

import triton
import triton.language as tl

from densenet_fast.backends.triton.kernels.pieces import (
    complete,
    load_affine,
    normalise,
    relu,
    store_sums,
    tile_of_program,
)


@triton.jit(do_not_specialize=["M", "B", "k", "H", "W", "ld_grad", "ld_z", "ld_scaled", "taps"])
def bn_relu_conv3x3_grad_input(
    grad,  # [M, k], rows ld_grad apart
    z,  # [M, B], rows ld_z apart
    mean,  # [B]
    rstd,  # [B]
    norm_bias,  # [B]
    norm_weight,  # [B], if WEIGHTED
    weight,  # [k, 3, 3, B]
    scaled,  # [M, B], rows ld_scaled apart
    a,  # [M, B]
    partials,  # [row tiles, 2, B] float32
    M,
    B,
    k,
    H,
    W,
    ld_grad,
    ld_z,
    ld_scaled,
    taps,
    B_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    Z_UNIT: tl.constexpr,
    SCALED_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    KEEP_A: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    B, k, ld_grad = B * B_UNIT, k * K_UNIT, ld_grad * GRAD_UNIT
    ld_z, ld_scaled = ld_z * Z_UNIT, ld_scaled * SCALED_UNIT
    tile, rows, columns, inside_rows, inside_columns = tile_of_program(M, B, ROWS, COLUMNS)
    y, x = (rows // W) % H, rows % W
    wide_rows = rows.to(tl.int64)
    blocks = tl.cdiv(k, INNER)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, taps * blocks):
        tap = step // blocks
        outputs = (step % blocks) * INNER + tl.arange(0, INNER)
        dy, dx = tap // 3 - 1, tap % 3 - 1
        inside = outputs < k
        on_image = inside_rows & (y - dy >= 0) & (y - dy < H) & (x - dx >= 0) & (x - dx < W)
        shifted = (wide_rows - (dy * W + dx))[:, None] * ld_grad
        g = tl.load(grad + shifted + outputs[None, :], mask=on_image[:, None] & inside[None, :], other=0.0)
        w = tl.load(
            weight + outputs[:, None] * (taps * B) + (tap * B + columns)[None, :],
            mask=inside[:, None] & inside_columns[None, :],
            other=0.0,
        )
        total = tl.dot(g, w, total, input_precision=PRECISION)

    valid = inside_rows[:, None] & inside_columns[None, :]
    first, local = tile.to(tl.int64) * ROWS, tl.arange(0, ROWS)[:, None]
    m, s, t = load_affine(mean, rstd, norm_bias, norm_weight, columns, inside_columns, WEIGHTED)
    values = tl.load(z + first * ld_z + (local * ld_z + columns[None, :]), mask=valid, other=0.0)
    centred, normalised = normalise(values, m, s, t)
    if KEEP_A:
        rectified = relu(normalised)
        tl.store(a + first * B + (local * B + columns[None, :]), rectified.to(a.dtype.element_ty), mask=valid)
    d = tl.where(inside_rows[:, None] & ~(normalised <= 0), total, 0.0)
    place = scaled + first * ld_scaled + (local * ld_scaled + columns[None, :])
    tl.store(place, (s * d).to(scaled.dtype.element_ty), mask=valid)
    store_sums(tl.sum(d, 0), tl.sum(d * centred, 0), partials + tile.to(tl.int64) * 2 * B, columns, B, inside_columns)


@triton.jit(
    do_not_specialize=["M", "B", "k", "H", "W", "ld_grad", "range_rows", "ranges", "ld_z", "ld_dz", "chunk_rows"]
)
def bn_relu_conv3x3_grad_weight(
    grad,  # [M, k], rows ld_grad apart
    a,  # [M, B]
    partials,  # [ranges, k, 3, 3, B] float32
    z,  # [M, B], rows ld_z apart
    dz,  # [M, B], rows ld_dz apart: completed in place
    mean,  # [B]
    p,  # [B]
    q,  # [B]
    M,
    B,
    k,
    H,
    W,
    ld_grad,
    range_rows,
    ranges,
    ld_z,
    ld_dz,
    chunk_rows,
    count,
    B_UNIT: tl.constexpr,
    K_UNIT: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    Z_UNIT: tl.constexpr,
    DZ_UNIT: tl.constexpr,
    COMPLETED_ROWS: tl.constexpr,
    COMPLETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    B, k, ld_grad = B * B_UNIT, k * K_UNIT, ld_grad * GRAD_UNIT
    ld_z, ld_dz = ld_z * Z_UNIT, ld_dz * DZ_UNIT
    if tl.program_id(1) < ranges:
        grad_weight_of_range(
            grad=grad,
            a=a,
            partials=partials,
            M=M,
            B=B,
            k=k,
            H=H,
            W=W,
            ld_grad=ld_grad,
            range_rows=range_rows,
            ROWS=ROWS,
            BLOCK=BLOCK,
            WIDTH=WIDTH,
            PRECISION=PRECISION,
        )
    else:
        program = (tl.program_id(1) - ranges) * tl.num_programs(0) + tl.program_id(0)
        column_tiles = tl.cdiv(B, COMPLETED)
        columns = (program % column_tiles) * COMPLETED + tl.arange(0, COMPLETED)
        inside = columns < B
        m = tl.load(mean + columns, mask=inside, other=0.0)
        constant = tl.load(p + columns, mask=inside, other=0.0) / count
        slope = 2 * tl.load(q + columns, mask=inside, other=0.0) / count
        first_row = (program // column_tiles) * chunk_rows
        complete(
            grad=dz,
            ld_grad=ld_dz,
            x=z,
            ld_x=ld_z,
            out=dz,
            ld_out=ld_dz,
            m=m,
            constant=constant,
            slope=slope,
            first_row=first_row,
            last_row=tl.minimum(first_row + chunk_rows, M),
            columns=columns,
            inside=inside,
            ROWS=COMPLETED_ROWS,
        )


@triton.jit
def grad_weight_of_range(
    grad,  # [M, k], rows ld_grad apart
    a,  # [M, B]
    partials,  # [ranges, k, 3, 3, B] float32
    M,
    B,
    k,
    H,
    W,
    ld_grad,
    range_rows,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The partial result of one range of rows, for the three taps of one dy, BLOCK channels and WIDTH outputs."""
    dy = tl.program_id(0) % 3 - 1
    blocks = tl.cdiv(B, BLOCK)
    channels = (tl.program_id(0) // 3 % blocks) * BLOCK + tl.arange(0, BLOCK)
    outputs = (tl.program_id(0) // 3 // blocks) * WIDTH + tl.arange(0, WIDTH)
    inside, inside_outputs = channels < B, outputs < k
    left = tl.zeros((BLOCK, WIDTH), tl.float32)
    middle = tl.zeros((BLOCK, WIDTH), tl.float32)
    right = tl.zeros((BLOCK, WIDTH), tl.float32)

    first = tl.program_id(1) * range_rows
    for start in range(first, tl.minimum(first + range_rows, M), ROWS):
        rows = start + tl.arange(0, ROWS)
        y, x = (rows // W) % H - dy, rows % W
        wide_rows = rows.to(tl.int64)
        inside_rows = rows < M
        values = tl.load(
            a + wide_rows[:, None] * B + channels[None, :], mask=inside_rows[:, None] & inside[None, :], other=0.0
        )
        on_image = inside_rows & (y >= 0) & (y < H)
        shifted = grad + (wide_rows - dy * W)[:, None] * ld_grad + outputs[None, :]
        before = tl.load(shifted + ld_grad, mask=(on_image & (x + 1 < W))[:, None] & inside_outputs[None, :], other=0.0)
        here = tl.load(shifted, mask=on_image[:, None] & inside_outputs[None, :], other=0.0)
        after = tl.load(shifted - ld_grad, mask=(on_image & (x >= 1))[:, None] & inside_outputs[None, :], other=0.0)
        left = tl.dot(tl.trans(values), before, left, input_precision=PRECISION)
        middle = tl.dot(tl.trans(values), here, middle, input_precision=PRECISION)
        right = tl.dot(tl.trans(values), after, right, input_precision=PRECISION)

    taps = outputs[None, :] * 9 + (dy + 1) * 3
    partial = partials + tl.program_id(1).to(tl.int64) * k * 9 * B + channels[:, None]
    valid = inside[:, None] & inside_outputs[None, :]
    tl.store(partial + taps * B, left, mask=valid)
    tl.store(partial + (taps + 1) * B, middle, mask=valid)
    tl.store(partial + (taps + 2) * B, right, mask=valid)
