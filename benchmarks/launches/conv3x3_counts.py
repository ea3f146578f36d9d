"""The counts of the 3x3 kernels over tiles with a halo, in CUDA C++ (csrc/cuda/bn_relu_conv3x3*.cu), from shapes alone.

M rows of pixels, images H x W. T tiles of R consecutive rows of the matrix, across images; each reads R + 2 W + 2 rows
of the matrix that the taps shift. Images wider than ``Geometry.widest`` are cut into tiles of 16 columns instead. J
blocks of columns; each reads the shifted matrix again:

    kernel     asked of feature maps                    of weights        stored              partials
    forward    J (M + T (2 W + 2)) B (Z)                9 T B k           M k                 2 T k
    input      J (M + T (2 W + 2)) k (dY), M B (Z)      9 blocks B k      M B                 2 blocks B
    weight     J (M + T (2 W + 2)) k (dY), M B (Z)      -                 M B, if through     9 ranges B k

The weight's kernel also reads M B, scale * D, where it completes dZ ``through`` the statistics.
"""

from typing import NamedTuple

from densenet_fast.backends.cuda_conv3x3 import RESIDENT
from densenet_fast.backends.triton.config import Device
from launches.counts import Counts, tiles_of
from launches.triton_counts import FLOAT, padded

__all__ = ["GEOMETRY", "Conv3x3", "Geometry"]


class Geometry(NamedTuple):
    """The figures that the kernels are built with."""

    forward_rows: int = 256
    """Output pixels of a block of the forward pass."""
    few_rows: int = 64
    """The same where ``forward_rows`` would make fewer tiles than half the multiprocessors."""
    backward_rows: int = 128
    """Pixels that the two backward kernels take at a time. The input's gradient takes half as many where there would be
    fewer tiles, times blocks of columns, than multiprocessors."""
    backward_columns: int = 64
    """Columns of the bottleneck that a block of the backward kernels owns."""
    resident: int = RESIDENT
    tiles_per_range: int = 4
    """The fewest tiles of a range of the weight's gradient, if the matrix has so many."""
    widest: int = 64
    """Of images whose rows are taken as they follow in the matrix."""
    side: int = 16
    """Columns of a tile of wider images."""
    inner: int = 16
    """What the channels that a product sums are a multiple of."""
    widths: tuple[int, ...] = (16, 32, 48)
    """New columns that a block makes, or multiplies with: the least of these that holds all columns, or the last."""


GEOMETRY = Geometry()


class Conv3x3(NamedTuple):
    """A layer's convolution: N images of H x W, from B to k columns, of elements of ``size`` bytes, on ``device``."""

    grid: tuple[int, int, int]
    channels: int
    outputs: int
    size: int
    device: Device
    geometry: Geometry = GEOMETRY

    @property
    def rows(self) -> int:
        images, height, width = self.grid
        return images * height * width

    @property
    def weights(self) -> int:
        return 9 * self.channels * self.outputs

    def tiles(self, tile_rows: int) -> int:
        """Of ``tile_rows`` pixels each."""
        images, height, width = self.grid
        if width <= self.geometry.widest:
            return tiles_of(self.rows, tile_rows)
        side = self.geometry.side
        return images * tiles_of(width, side) * tiles_of(height, tile_rows // side)

    def shifted_rows(self, tile_rows: int) -> int:
        """Rows that all tiles read with their halos."""
        width, side = self.grid[2], self.geometry.side
        if width <= self.geometry.widest:
            halos = self.tiles(tile_rows) * (2 * width + 2)
            return min(self.rows + halos, self.tiles(tile_rows) * self.rows)
        return self.tiles(tile_rows) * (tile_rows // side + 2) * (side + 2)

    @property
    def width(self) -> int:
        """New columns of a block."""
        widths = self.geometry.widths
        return next((width for width in widths if width >= self.outputs), widths[-1])

    def forward_rows(self) -> int:
        """Pixels of a block of the forward pass."""
        enough = self.tiles(self.geometry.forward_rows) >= self.device.processors // 2
        return self.geometry.forward_rows if enough else self.geometry.few_rows

    def input_rows(self) -> int:
        """Pixels of a tile of the input's gradient."""
        rows = self.geometry.backward_rows
        return rows if self.tiles(rows) * self.column_blocks() >= self.device.processors else rows // 2

    def column_blocks(self) -> int:
        """Blocks of columns of the bottleneck, in the backward kernels."""
        return tiles_of(self.channels, self.geometry.backward_columns)

    def row_blocks(self) -> int:
        """Persistent blocks of the input's gradient that share the rows, for each block of columns."""
        most = max(1, self.geometry.resident * self.device.processors // self.column_blocks())
        return min(self.tiles(self.input_rows()), most)

    def ranges(self) -> int:
        """Ranges of rows of the weight's gradient, all equally long but for the last."""
        tiles, blocks = (
            self.tiles(self.geometry.backward_rows),
            self.column_blocks() * tiles_of(self.outputs, self.width),
        )
        most = max(1, self.geometry.resident * self.device.processors // blocks)
        return tiles_of(tiles, tiles_of(tiles, min(most, max(1, tiles // self.geometry.tiles_per_range))))

    def made(self, tile_rows: int, channels: int, outputs: int) -> int:
        """Multiply-adds of all tiles, padding included, of multiples of so many channels and outputs."""
        columns = padded(self.channels, channels) * padded(self.outputs, outputs)
        return self.tiles(tile_rows) * tile_rows * 9 * columns

    def forward(self, statistics: bool) -> Counts:
        """Y from Z: relu(bn(Z)) is made in shared memory."""
        tile_rows, size = self.forward_rows(), self.size
        blocks, tiles = tiles_of(self.outputs, self.width), self.tiles(tile_rows)
        partials = FLOAT * 2 * tiles * self.outputs * statistics
        return Counts(
            "bn_relu_conv3x3",
            read=size * self.rows * self.channels,
            asked=size * blocks * self.shifted_rows(tile_rows) * self.channels,
            written=size * self.rows * self.outputs,
            weights=size * self.weights,
            weights_asked=size * tiles * self.weights,
            partials=partials,
            partials_asked=partials,
            mma=self.made(tile_rows, self.geometry.inner, self.width),
        )

    def grad_input(self) -> Counts:
        """scale * D from dY and Z, and D's column sums in parts."""
        tile_rows, size = self.input_rows(), self.size
        partials = FLOAT * 2 * self.row_blocks() * self.channels
        shifted = self.column_blocks() * self.shifted_rows(tile_rows)
        return Counts(
            "bn_relu_conv3x3_grad_input",
            read=size * self.rows * (self.outputs + self.channels),
            asked=size * (shifted * self.outputs + self.rows * self.channels),
            written=size * self.rows * self.channels,
            weights=size * self.weights,
            weights_asked=size * self.row_blocks() * self.weights,
            partials=partials,
            partials_asked=partials,
            mma=self.made(tile_rows, self.geometry.backward_columns, self.geometry.inner),
        )

    def grad_weight(self, through: bool) -> Counts:
        """dW2 in parts from Z and dY. If the gradient goes ``through`` statistics, also dZ in place, from scale * D and
        Z."""
        tile_rows, size = self.geometry.backward_rows, self.size
        partials = FLOAT * self.ranges() * self.weights
        shifted = self.column_blocks() * self.shifted_rows(tile_rows)
        blocks = tiles_of(self.outputs, self.width)  # each of which reads Z, the first to complete dZ
        bottleneck = (1 + through) * self.rows * self.channels
        again = (blocks - 1) * self.rows * self.channels
        return Counts(
            "bn_relu_conv3x3_grad_weight",
            read=size * (self.rows * self.outputs + bottleneck),
            asked=size * (shifted * self.outputs + bottleneck + again),
            written=size * through * self.rows * self.channels,
            partials=partials,
            partials_asked=partials,
            mma=self.made(tile_rows, self.geometry.backward_columns, self.width),
        )
