"""Device functions that the kernels share: which tile a program makes, normalisation, statistics and sums of a tile,
completion of columns, and where windows start."""

import triton
import triton.language as tl

from densenet_fast.backends.triton.config import interpreted

COMPILED = tl.constexpr(not interpreted())


@triton.jit
def tile_of_program(M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile of a matrix [M, N] that this program makes: the number of its row tile, its rows, its columns, and
    which rows and columns are inside. The programs of one row tile are neighbours in the grid."""
    column_tiles = tl.cdiv(N, COLUMNS)
    tile = tl.program_id(0) // column_tiles
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    return tile, rows, columns, rows < M, columns < N


@triton.jit
def load_affine(mean, rstd, bias, weight, columns, inside, WEIGHTED: tl.constexpr):
    """Rows [1, n] of mean, scale = weight * rstd and shift. Columns outside have zeros, which normalise to zero."""
    m = tl.load(mean + columns, mask=inside, other=0.0)
    s = tl.load(rstd + columns, mask=inside, other=0.0)
    t = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        s *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    return m[None, :], s[None, :], t[None, :]


@triton.jit
def normalise(x, mean, scale, shift):
    """x - mean and (x - mean) * scale + shift, in float32."""
    centred = x.to(tl.float32) - mean
    return centred, centred * scale + shift


@triton.jit
def relu(x):
    """max(x, 0); a NaN stays a NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bn_relu(x, mean, scale, shift):
    """relu((x - mean) * scale + shift) in x's dtype."""
    return relu(normalise(x, mean, scale, shift)[1]).to(x.dtype)


@triton.jit
def settled(total):
    """``total``, a product's sum, when it is complete. For products whose first operand is made in registers.

    On sm_90 products are asynchronous. Triton makes the next iteration's operand in registers that the last one's
    product may still read (triton issue 9433). For a sum that is used it has to wait. Triton's interpreter has no
    inline assembler and needs none.
    """
    if COMPILED:
        total = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=True, pack=1)
    return total


@triton.jit
def beside(x, product):
    """``x`` as it is, laid out over the threads as ``product`` is. It waits for the product. For half precision.

    Triton lays an operand out as it was loaded, and a product's companions as the product. What both need is computed
    twice. From the ``x`` that this returns it is computed once. The interpreter has no layouts.
    """
    if COMPILED and x.dtype.primitive_bitwidth == 16:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r", [x, product], dtype=x.dtype, is_pure=True, pack=2)
    return x


@triton.jit
def store_statistics(stored, partials, tile, columns, count, num_columns, inside_rows, inside_columns):
    """Stores the mean and the sum of squared deviations of the ``count`` rows inside, of the values as stored, into
    partials [tiles, 2, num_columns]."""
    values = tl.where(inside_rows[:, None], stored.to(tl.float32), 0.0)
    mean = tl.sum(values, 0) / count
    deviation = tl.where(inside_rows[:, None], values - mean[None, :], 0.0)
    row = partials + tile.to(tl.int64) * 2 * num_columns + columns
    tl.store(row, mean, mask=inside_columns)
    tl.store(row + num_columns, tl.sum(deviation * deviation, 0), mask=inside_columns)


@triton.jit
def add_bias(total, bias, columns, inside, BIAS: tl.constexpr):
    """``total`` and, if BIAS, the ``bias`` of each of its columns."""
    if BIAS:
        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def store_result(total, out, ld_out, place, M, N, partials, STATISTICS: tl.constexpr):
    """Stores ``total`` into out [M, N], rows ld_out apart, at the ``place`` that :func:`tile_of_program` returned. If
    STATISTICS, stores the tile's statistics into partials [row tiles, 2, N]."""
    tile, rows, columns, inside_rows, inside_columns = place
    stored = total.to(out.dtype.element_ty)
    valid = inside_rows[:, None] & inside_columns[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * ld_out + columns[None, :], stored, mask=valid)
    if STATISTICS:
        count = tl.minimum(M - tile * total.shape[0], total.shape[0])
        store_statistics(stored, partials, tile, columns, count, N, inside_rows, inside_columns)


@triton.jit
def store_sums(sum_d, sum_dx, row, columns, num_columns, inside_columns):
    """Stores the two column sums of a tile into two adjacent rows of ``num_columns``, from pointer ``row`` on."""
    tl.store(row + columns, sum_d, mask=inside_columns)
    tl.store(row + num_columns + columns, sum_dx, mask=inside_columns)


@triton.jit
def sum_rows(partials, tiles, length, columns, inside, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums of ``columns`` over ``tiles`` rows of partial results, which stand ``length`` apart."""
    lane = tl.arange(0, LANES)
    total = tl.zeros((LANES, COLUMNS), tl.float32)
    for start in range(0, tiles, LANES):
        tile = start + lane
        row = partials + (tile.to(tl.int64) * length)[:, None] + columns[None, :]
        total += tl.load(row, mask=(tile < tiles)[:, None] & inside[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def complete(
    grad,  # [M, C], rows ld_grad apart
    ld_grad,
    x,  # [M, C], rows ld_x apart
    ld_x,
    out,  # [M, C], rows ld_out apart
    ld_out,
    m,  # of each of the columns, as are constant and slope
    constant,
    slope,
    first_row,
    last_row,
    columns,
    inside,
    ROWS: tl.constexpr,
):
    """out = grad + constant + slope * (x - m) on ``columns`` of the rows from ``first_row`` to ``last_row``, ROWS at a
    time."""
    for start in range(first_row, last_row, ROWS):
        rows = start + tl.arange(0, ROWS)
        wide_rows = rows.to(tl.int64)[:, None]
        valid = (rows < last_row)[:, None] & inside[None, :]
        g = tl.load(grad + wide_rows * ld_grad + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        features = tl.load(x + wide_rows * ld_x + columns[None, :], mask=valid, other=0.0).to(tl.float32)
        completed = g + (constant[None, :] + slope[None, :] * (features - m[None, :]))
        tl.store(out + wide_rows * ld_out + columns[None, :], completed.to(out.dtype.element_ty), mask=valid)


@triton.jit
def top_left(windows, H, W):
    """The first pixel of each 2x2 window, as an int64 row of F. Windows are numbered over [N, H // 2, W // 2]."""
    height, width = H // 2, W // 2
    image, y, x = windows // (height * width), windows // width % height, windows % width
    return (image.to(tl.int64) * H + 2 * y) * W + 2 * x
