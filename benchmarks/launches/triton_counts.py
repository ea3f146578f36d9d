"""The counts of each launch of Triton's kernels, from its own arguments: shapes, grid and tile.

M rows, C columns of F, a bottleneck of B, k new columns; T row tiles, each read by J column tiles:

    kernel               asked of feature maps        of weights     stored        partials
    1x1                  J M C                        T B C          M B           2 T B
    1x1 backward         J M B (dZ), M C (F, G)       ranges B C     M C (G)       ranges (B + 2) C
    bn_relu              M B                          -              M B           -
    3x3                  9 J M B                      9 T B k        M k           2 T k
    3x3, input           9 J M k (dY), M B (Z)        9 T B k        2 M B         2 T B
    3x3, weight          3 M B (A), 9 J M k (dY)      -              -             9 ranges B k
    complete n columns   2 M n                        -              M n           -

A tap beyond the image's edge is masked; the counts leave that out.
"""

from collections.abc import Callable
from typing import Any

from densenet_fast.backends.triton.launch import Launch
from launches.counts import Counts, tiles_of

__all__ = ["count"]

FLOAT = 4
"""Bytes of a partial result."""
GROUP = 64
"""Rows of a product that a warp group's instruction needs."""

Named = dict[str, Any]


def count(item: Launch, generation: int) -> Counts:
    """Of one launch, planned for a GPU of a ``generation`` that ``config.Device`` knows.

    Raises:
        KeyError: no counting is written down for the kernel.
    """
    named = dict(zip(item.kernel.arg_names, item.arguments)) | item.constants
    units = {name: named[unit] for name, unit in UNITS.items() if unit in named}
    named |= {name: named[name] * unit for name, unit in units.items() if name in named}
    return Counts(item.name, **COUNTING[item.name](named, item.grid, generation))


UNITS = {"C": "C_UNIT", "B": "B_UNIT", "k": "K_UNIT", "K": "K_UNIT"}
"""The compile-time factors of sizes."""


def products(number: int, result_rows: int, generation: int) -> Named:
    """Multiply-adds of products with results of ``result_rows`` rows, by the instruction that makes them."""
    return {"wgmma" if generation >= 90 and result_rows >= GROUP else "mma": number}


def both(first: Named, second: Named) -> Named:
    """Two kinds of products."""
    return {name: first.get(name, 0) + second.get(name, 0) for name in {*first, *second}}


def padded(size: int, tile: int) -> int:
    return tiles_of(size, tile) * tile


def conv1x1(n: Named, grid: tuple[int, ...], generation: int) -> Named:
    rows, channels, width, size = n["M"], n["C"], n["B"], n["x"].element_size()
    tiles, column_tiles = tiles_of(rows, n["ROWS"]), tiles_of(width, n["COLUMNS"])
    partials = FLOAT * 2 * tiles * width * n["STATISTICS"]
    made = padded(rows, n["ROWS"]) * padded(channels, n["INNER"]) * padded(width, n["COLUMNS"])
    return {
        "read": size * rows * channels,
        "asked": size * column_tiles * rows * channels,
        "written": size * rows * width,
        "weights": size * width * channels,
        "weights_asked": size * tiles * width * channels,
        "partials": partials,
        "partials_asked": partials,
        **products(made, n["ROWS"], generation),
    }


def conv1x1_backward(n: Named, grid: tuple[int, ...], generation: int) -> Named:
    rows, channels, width, size = n["M"], n["C"], n["B"], n["x"].element_size()
    column_tiles, ranges, blocks = grid
    input_, weight, update = n["INPUT"], n["WEIGHT"], n["UPDATE"]
    matrices = (blocks + update) * rows * channels  # F for each block of columns of dZ, and what G was
    in_range = tiles_of(rows, n["ROWS"]) if n["WIDE"] else ranges  # how often W1 is read
    partials = FLOAT * ranges * channels * (weight * width + input_ * 2)
    made = padded(rows, n["ROWS"]) * padded(width, n["WIDTH"]) * padded(channels, n["CHANNELS"])
    return {
        "read": size * (rows * width + (1 + update) * rows * channels),
        "asked": size * (column_tiles * rows * width + matrices),
        "written": size * update * rows * channels,
        "weights": size * input_ * width * channels,
        "weights_asked": size * input_ * in_range * width * channels,
        "partials": partials,
        "partials_asked": partials,
        **both(
            products(made * input_, n["ROWS"], generation),
            products(made * weight, n["WIDTH"], generation),
        ),
    }


def bn_relu(n: Named, grid: tuple[int, ...], generation: int) -> Named:
    moved = n["x"].element_size() * n["M"] * n["C"]
    return {"read": moved, "asked": moved, "written": moved}


def conv3x3(n: Named, grid: tuple[int, ...], generation: int) -> Named:
    rows, channels, outputs, taps = n["M"], n["B"], n["k"], n["taps"]
    size, tiles, column_tiles = n["a"].element_size(), tiles_of(rows, n["ROWS"]), tiles_of(outputs, n["COLUMNS"])
    partials = FLOAT * 2 * tiles * outputs * n["STATISTICS"]
    made = padded(rows, n["ROWS"]) * taps * padded(channels, n["INNER"]) * padded(outputs, n["COLUMNS"])
    return {
        "read": size * rows * channels,
        "asked": size * taps * column_tiles * rows * channels,
        "written": size * rows * outputs,
        "weights": size * taps * channels * outputs,
        "weights_asked": size * tiles * taps * channels * outputs,
        "partials": partials,
        "partials_asked": partials,
        **products(made, n["ROWS"], generation),
    }


def conv3x3_grad_input(n: Named, grid: tuple[int, ...], generation: int) -> Named:
    rows, channels, outputs, taps = n["M"], n["B"], n["k"], n["taps"]
    size, tiles, column_tiles = n["z"].element_size(), tiles_of(rows, n["ROWS"]), tiles_of(channels, n["COLUMNS"])
    partials = FLOAT * 2 * tiles * channels
    made = padded(rows, n["ROWS"]) * taps * padded(channels, n["COLUMNS"]) * padded(outputs, n["INNER"])
    return {
        "read": size * rows * (outputs + channels),
        "asked": size * rows * (taps * column_tiles * outputs + channels),
        "written": size * rows * channels * (1 + n["KEEP_A"]),
        "weights": size * taps * channels * outputs,
        "weights_asked": size * tiles * taps * channels * outputs,
        "partials": partials,
        "partials_asked": partials,
        **products(made, n["ROWS"], generation),
    }


def conv3x3_grad_weight(n: Named, grid: tuple[int, ...], generation: int) -> Named:
    rows, channels, outputs, ranges = n["M"], n["B"], n["k"], n["ranges"]
    size, blocks, widths = n["a"].element_size(), tiles_of(channels, n["BLOCK"]), tiles_of(outputs, n["WIDTH"])
    completing = grid[1] > ranges  # dZ in place, from Z
    partials = FLOAT * ranges * 9 * channels * outputs
    made = padded(rows, n["ROWS"]) * 9 * padded(channels, n["BLOCK"]) * padded(outputs, n["WIDTH"])
    return {
        "read": size * rows * (channels + outputs + 2 * completing * channels),
        "asked": size * rows * (3 * widths * channels + 9 * blocks * outputs + 2 * completing * channels),
        "written": size * completing * rows * channels,
        "partials": partials,
        "partials_asked": partials,
        **products(made, n["BLOCK"], generation),
    }


def combine_statistics(n: Named, grid: tuple[int, ...], generation: int) -> Named:
    partials = FLOAT * 2 * n["tiles"] * n["n"] * n["UNIT"]
    return {"partials": partials, "partials_asked": partials}


def sum_partials(n: Named, grid: tuple[int, ...], generation: int) -> Named:
    tiles, length, sizes = n["tiles"], n["length"] * n["UNIT"], [n[f"grad_{name}"] for name in ("weight", "other")]
    n_weight, n_other, completed = n["n_weight"] * n["UNIT"], n["n_other"] * n["OTHER_UNIT"], n["n_columns"]
    completed *= n["MATRIX_UNIT"]
    partials = FLOAT * (tiles * length + n["other_tiles"] * n_other)
    again = tiles_of(n["M"], n["chunk_rows"])  # each chunk's programs add up the columns' sums for themselves
    gradients = n_weight * sizes[0].element_size() + n_other * sizes[1].element_size()
    size = n["x"].element_size()
    return {
        "read": size * 2 * n["M"] * completed,
        "asked": size * 2 * n["M"] * completed,
        "written": size * n["M"] * completed,
        "weights": gradients,
        "weights_asked": gradients,
        "partials": partials,
        "partials_asked": partials + FLOAT * again * tiles * 2 * completed,
    }


def pool_conv1x1(n: Named, grid: tuple[int, ...], generation: int) -> Named:
    windows, channels, width, size = n["M"], n["C"], n["K"], n["x"].element_size()
    tiles, column_tiles = tiles_of(windows, n["ROWS"]), tiles_of(width, n["COLUMNS"])
    partials = FLOAT * 2 * tiles * width * n["STATISTICS"]
    parts = 1 if size == FLOAT else 2  # what a mean is rounded to, and what the rounding lost
    made = parts * padded(windows, n["ROWS"]) * padded(channels, n["INNER"]) * padded(width, n["COLUMNS"])
    return {
        "read": size * 4 * windows * channels,
        "asked": size * column_tiles * 4 * windows * channels,
        "written": size * windows * width,
        "weights": size * width * channels,
        "weights_asked": size * tiles * width * channels,
        "partials": partials,
        "partials_asked": partials,
        **products(made, n["ROWS"], generation),
    }


def pool_conv1x1_backward(n: Named, grid: tuple[int, ...], generation: int) -> Named:
    windows, channels, width, size = n["M"], n["C"], n["K"], n["x"].element_size()
    tiles, column_tiles, input_ = tiles_of(windows, n["ROWS"]), tiles_of(channels, n["COLUMNS"]), n["INPUT"]
    partials = FLOAT * 2 * tiles * channels * input_
    made = padded(windows, n["ROWS"]) * padded(width, n["INNER"]) * padded(channels, n["COLUMNS"])
    return {
        "read": size * windows * (4 * channels + input_ * width),
        "asked": size * windows * (4 * channels + input_ * column_tiles * width),
        "written": size * windows * channels * (4 * input_ + n["POOLED"]),
        "weights": size * input_ * width * channels,
        "weights_asked": size * input_ * tiles * width * channels,
        "partials": partials,
        "partials_asked": partials,
        **products(made * input_, n["ROWS"], generation),
    }


COUNTING: dict[str, Callable[[Named, tuple[int, ...], int], Named]] = {
    "bn_relu": bn_relu,
    "bn_relu_conv1x1": conv1x1,
    "bn_relu_conv1x1_backward": conv1x1_backward,
    "bn_relu_conv3x3": conv3x3,
    "bn_relu_conv3x3_grad_input": conv3x3_grad_input,
    "bn_relu_conv3x3_grad_weight": conv3x3_grad_weight,
    "bn_relu_pool_conv1x1": pool_conv1x1,
    "bn_relu_pool_conv1x1_backward": pool_conv1x1_backward,
    "combine_statistics": combine_statistics,
    "sum_partials": sum_partials,
}
"""By the kernel's name."""
