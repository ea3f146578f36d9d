"""The launch configurations, one table: per kernel, device generation, precision and width of the result.

The rows of generation 90 in half precision for up to 128 columns were measured on an H200 (tiles.jsonl of two runs
in benchmarks/results/nvidia_h200). Since then bn_relu_conv1x1_backward has come to copy all that it reads ahead. The
other rows follow from counts of registers, shared memory and the compiler's instructions.
``python -m densenet_fast.backends.triton.tune`` measures candidates and prints rows for this table. Training tunes
nothing: a kernel that adds to its output must not be run twice on it.

Rows for more than 128 columns take 256 at once, so that F is read once.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import cuda_conv3x3


class Tile(NamedTuple):
    """A program makes rows x columns of the result. Its loop takes ``inner`` terms a step. In the backward products,
    which add over rows, rows x columns are the operand's."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


class Device(NamedTuple):
    """What the configuration depends on. ``generation`` is 80, 90, or 0 for the interpreter."""

    generation: int
    processors: int


INTERPRETER = Device(0, 2)
ANY = 1 << 30

Rows = dict[tuple[int, str], tuple[tuple[int, Tile], ...]]

TABLE: dict[str, Rows] = {
    "bn_relu_conv1x1": {
        (90, "half"): ((128, Tile(128, 128, 32, 4, 4)), (ANY, Tile(64, 256, 32, 8, 3))),
        (80, "half"): ((128, Tile(128, 128, 32, 8, 3)), (ANY, Tile(64, 256, 32, 8, 3))),
        (90, "tf32"): ((128, Tile(64, 128, 32, 8, 3)), (ANY, Tile(64, 256, 32, 8, 2))),
        (80, "tf32"): ((128, Tile(64, 128, 32, 8, 3)), (ANY, Tile(64, 256, 16, 8, 3))),
        (90, "ieee"): ((ANY, Tile(64, 128, 16, 8, 2)),),
        (80, "ieee"): ((ANY, Tile(64, 128, 16, 8, 2)),),
        (0, "any"): ((ANY, Tile(32, 32, 32, 1, 1)),),
    },
    # columns: channels of F per program; inner: columns of dZ
    "bn_relu_conv1x1_backward": {
        (90, "half"): ((128, Tile(32, 64, 128, 4, 3)), (ANY, Tile(64, 32, 256, 8, 2))),
        (80, "half"): ((128, Tile(32, 32, 128, 4, 3)), (ANY, Tile(64, 32, 256, 8, 2))),
        (90, "tf32"): ((128, Tile(64, 32, 128, 8, 2)), (ANY, Tile(32, 32, 256, 8, 2))),
        (80, "tf32"): ((128, Tile(32, 32, 128, 8, 2)), (ANY, Tile(16, 32, 256, 8, 2))),
        (90, "ieee"): ((ANY, Tile(16, 32, 128, 8, 1)),),
        (80, "ieee"): ((ANY, Tile(16, 32, 128, 8, 1)),),
        (0, "any"): ((ANY, Tile(32, 32, 32, 1, 1)),),
    },
    "bn_relu_conv3x3": {
        (90, "half"): ((ANY, Tile(128, 64, 64, 4, 3)),),
        (80, "half"): ((ANY, Tile(128, 64, 32, 4, 3)),),
        (90, "tf32"): ((ANY, Tile(128, 64, 32, 4, 3)),),
        (80, "tf32"): ((ANY, Tile(128, 64, 32, 4, 3)),),
        (0, "any"): ((ANY, Tile(32, 32, 32, 1, 1)),),
    },
    "bn_relu_conv3x3_grad_input": {
        (90, "half"): ((ANY, Tile(128, 64, 32, 4, 3)),),
        (80, "half"): ((ANY, Tile(64, 128, 64, 8, 3)),),
        (90, "tf32"): ((ANY, Tile(128, 64, 32, 8, 3)),),
        (80, "tf32"): ((ANY, Tile(128, 64, 32, 8, 3)),),
        (0, "any"): ((ANY, Tile(32, 32, 16, 1, 1)),),
    },
    # columns: channels of A per program; inner: of dY
    "bn_relu_conv3x3_grad_weight": {
        (90, "half"): ((ANY, Tile(32, 128, 32, 4, 4)),),
        (80, "half"): ((ANY, Tile(64, 128, 32, 8, 3)),),
        (90, "tf32"): ((ANY, Tile(32, 128, 32, 8, 3)),),
        (80, "tf32"): ((ANY, Tile(32, 128, 32, 8, 3)),),
        (0, "any"): ((ANY, Tile(32, 32, 16, 1, 1)),),
    },
    "bn_relu_pool_conv1x1": {
        (90, "half"): ((128, Tile(64, 128, 32, 4, 3)), (ANY, Tile(64, 256, 32, 8, 3))),
        (80, "half"): ((ANY, Tile(32, 128, 32, 4, 2)),),
        (90, "tf32"): ((ANY, Tile(64, 128, 32, 8, 2)),),
        (80, "tf32"): ((ANY, Tile(32, 128, 16, 4, 2)),),
        (90, "ieee"): ((ANY, Tile(32, 64, 16, 4, 2)),),
        (80, "ieee"): ((ANY, Tile(32, 64, 16, 4, 2)),),
        (0, "any"): ((ANY, Tile(16, 32, 32, 1, 1)),),
    },
    "bn_relu_pool_conv1x1_backward": {
        (90, "half"): ((ANY, Tile(64, 32, 64, 4, 3)),),
        (80, "half"): ((32, Tile(32, 32, 64, 4, 3)), (ANY, Tile(64, 64, 64, 8, 3))),
        (90, "tf32"): ((ANY, Tile(64, 32, 32, 8, 3)),),
        (80, "tf32"): ((ANY, Tile(64, 64, 32, 8, 2)),),
        (90, "ieee"): ((ANY, Tile(64, 32, 16, 8, 2)),),
        (80, "ieee"): ((ANY, Tile(64, 32, 16, 8, 2)),),
        (0, "any"): ((ANY, Tile(16, 32, 16, 1, 1)),),
    },
}

BN_RELU = Tile(32, 128, 0, 4, 1)
STATISTICS = {90: Tile(256, 8, 0, 8, 1), 80: Tile(256, 8, 0, 8, 1), 0: Tile(64, 16, 0, 4, 1)}
"""rows: lanes of tiles that are combined at once."""
SUMS = {
    90: (Tile(256, 16, 0, 8, 1), Tile(4, 256, 0, 8, 1), Tile(64, 32, 0, 8, 1)),
    80: (Tile(256, 16, 0, 8, 1), Tile(4, 256, 0, 8, 1), Tile(64, 32, 0, 8, 1)),
    0: (Tile(4, 1024, 0, 4, 1), Tile(4, 1024, 0, 4, 1), Tile(4, 64, 0, 4, 1)),
}
"""rows: lanes of tiles that are added at once. The first is for column sums, a few columns of many tiles. The second
is for products, many columns of a few tiles. The last is for column sums by the programs that complete columns."""
COMPLETION = Tile(64, 128, 0, 4, 1)
"""rows and columns that are completed at once. Where a program adds the column sums too, SUMS says how many columns."""
COMPLETING_PROGRAMS = 8
"""Programs per multiprocessor that complete columns."""

PROGRAMS_PER_PROCESSOR = 2
"""A product over rows has as many ranges of rows as give it this many programs per multiprocessor, or fewer."""
TILES_PER_RANGE = 4
"""The fewest tiles of a range, whose partial result costs as much traffic as a few tiles."""


CONVOLUTION_IN_CUDA = {90: 48, 80: 32, 0: 48}
"""By generation, the most columns of a 3x3 product that the kernels in CUDA C++ make. A multiprocessor then has room
for two of their blocks, or for one of twelve warps. Wider products, and those in TF32, are Triton's."""


class _ThisThread(threading.local):
    assumed: Device | None = None


_this_thread = _ThisThread()


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@contextlib.contextmanager
def assume(device: Device) -> Iterator[None]:
    """Configures this thread's launches for ``device``, wherever the tensors are, to compile ahead and for audits."""
    before, _this_thread.assumed = _this_thread.assumed, device
    try:
        yield
    finally:
        _this_thread.assumed = before


def assumed() -> Device | None:
    """The device of the ``with`` block of :func:`assume` that this thread is in."""
    return _this_thread.assumed


def device_of(device: torch.device) -> Device:
    """The :class:`Device` of torch's ``device``."""
    if found := assumed():
        return found
    if device.type == "cpu":
        return INTERPRETER
    return _cuda_device(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(_generation(properties.major), properties.multi_processor_count)


def _generation(major: int) -> int:
    return 90 if major in (9, 10) else 80


def borrowed(index: int) -> str | None:
    """Says which GPU's configurations GPU ``index`` uses; None where the table has rows of its own."""
    major, minor = torch.cuda.get_device_capability(index)
    if (major, minor) in ((8, 0), (9, 0)):
        return None
    of = _generation(major) / 10
    return f"cuda:{index} has compute capability {major}.{minor} and uses the launch configurations of {of}"


def precision(dtype: torch.dtype) -> str:
    """How products of ``dtype`` are made: "half", or for float32 "tf32" or "ieee", as torch's convolutions are set."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def row(device: Device, dtype: torch.dtype) -> tuple[int, str]:
    """Which rows of the table are for ``dtype`` on ``device``."""
    return device.generation, precision(dtype) if device.generation else "any"


def tile(kernel: str, device: Device, dtype: torch.dtype, width: int) -> Tile:
    """The configuration of ``kernel`` for ``width`` columns of its result, or of the operand that the table names."""
    return next(found for limit, found in TABLE[kernel][row(device, dtype)] if width <= limit)


def chunks(device: Device, rows: int, column_tiles: int) -> tuple[int, int]:
    """(chunks, rows of each): how the programs that complete columns divide ``rows`` rows. Each chunk has
    ``column_tiles`` programs."""
    wanted = max(1, device.processors * COMPLETING_PROGRAMS // column_tiles)
    each = -(-rows // wanted // COMPLETION.rows) * COMPLETION.rows
    return -(-rows // each), each


def fit(size: int, limit: int) -> int:
    """The side of a tile that holds ``size``: a power of two from 16 to ``limit``. A product takes no less than 16."""
    return min(limit, max(16, 1 << (size - 1).bit_length()))


def turned(device: Device, dtype: torch.dtype) -> bool:
    """Whether ``bn_relu_conv1x1_backward`` makes dW from a^T, not from dZ^T.

    Products on sm_80 take their operands from registers. Triton copies a transposed operand ahead only where nothing
    else reads it, and dZ is read twice.
    """
    return row(device, dtype) == (80, "half")


def resident(tile: Tile, plain: bool) -> int:
    """Programs per multiprocessor of ``bn_relu_conv1x1_backward``, no more than it holds at once. The registers of
    eight warps fill it, but not those of the ``plain`` product."""
    return 1 if tile.warps == 8 and not plain else PROGRAMS_PER_PROCESSOR


def ranges(
    device: Device, rows: int, tile_rows: int, programs: int, per_processor: int = PROGRAMS_PER_PROCESSOR
) -> tuple[int, int]:
    """(ranges, rows of each): how a product over ``rows`` rows divides them, with ``programs`` programs per range. The
    rows of a range are a multiple of ``tile_rows``."""
    tiles = max(1, -(-rows // tile_rows))
    wanted = max(1, device.processors * per_processor // programs)
    tiles_each = -(-tiles // max(1, min(wanted, tiles // TILES_PER_RANGE)))
    return -(-tiles // tiles_each), tiles_each * tile_rows


def convolution_in_cuda(x: Tensor, outputs: int, grid: tuple[int, ...]) -> bool:
    """Whether the kernels in CUDA C++ serve the 3x3 product of x [M, B] with ``outputs`` columns."""
    if len(grid) != 3 or not cuda_conv3x3.serves(x):
        return False
    return outputs <= CONVOLUTION_IN_CUDA[device_of(x.device).generation]


@contextlib.contextmanager
def convolution_in_triton() -> Iterator[None]:
    """Leaves the 3x3 product to Triton's kernels, so that they can be measured and looked at."""
    before = CONVOLUTION_IN_CUDA.copy()
    CONVOLUTION_IN_CUDA.update(dict.fromkeys(before, 0))
    try:
        yield
    finally:
        CONVOLUTION_IN_CUDA.update(before)


def convolution_by_torch(grid: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether torch's library convolution makes the 3x3 product.

    It does in 1 and 3 dimensions. It also does for float32 without TF32: no matrix unit helps there, and the library
    programs it best.
    """
    return len(grid) != 3 or precision(dtype) == "ieee"


def pooling_by_torch(grid: tuple[int, ...]) -> bool:
    """Whether torch's functions make the transition. They do in 1 and 3 dimensions."""
    return len(grid) != 3
