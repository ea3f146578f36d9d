"""What one training step has to move and to multiply: every kernel's bytes and multiply-adds, from the shapes alone.

A feature map is a matrix of M = N * H * W rows. F is a dense block's, of C_total columns, and G is its gradient. Z is a
layer's bottleneck of B columns; k is the number of columns that the layer adds. Each kernel reads its operands and
writes its results once:

    kernel               reads                                 writes
    append               C0 M                                  C0 M
    1x1                  C M, B C                              B M
    3x3                  B M, 9 B k                            k M
    3x3 backward         k M (dY), B M (Z), 9 B k              B M (D'), 9 B k
    1x1 backward         2 B M (D', Z), 2 C M (F, G), B C      C M (G), B C
    finalise n columns   2 n M (G, F)                          n M

with M B C multiply-adds in a 1x1 and 9 M B k in a 3x3 convolution, twice that backward. Vectors of one value a column
are left out.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Call", "training_step"]


@dataclass(frozen=True)
class Call:
    """One call of a kernel.

    Attributes:
        kernel: its name in the backends' table; ``conv0``, ``classifier`` and their backwards are torch's.
        part: of the network: ``stem``, ``block 1``, ``transition 1``, ``head``.
        grid: (N, H, W) of its input's pixels.
        inputs: columns that it reads.
        outputs: columns that it makes.
        columns: of the buffer whose first columns it reads.
        bytes: read and written.
        products: multiply-adds, by the definition of a convolution.
    """

    kernel: str
    part: str
    grid: tuple[int, int, int]
    inputs: int
    outputs: int
    columns: int
    bytes: int
    products: int


def training_step(
    arguments: dict[str, Any], batch: int, size: int, itemsize: int, memory_efficient: bool = False
) -> list[Call]:
    """Every kernel call of a training step of ``densenet_fast.DenseNet(**arguments)``, without loss and optimizer.

    The block that made a transition's or the head's input knows its statistics. So what is spent on them there has a
    floor of zero.

    Args:
        arguments: of a network with bottlenecks; growth_rate, block_config and num_init_features are needed.
        batch, size: of the images, [batch, 3, size, size].
        itemsize: bytes of an element.
        memory_efficient: whether the bottlenecks are recomputed in the backward pass.
    """
    return list(_Step(arguments, batch, itemsize, memory_efficient).calls(size))


class _Step:
    def __init__(self, arguments: dict[str, Any], batch: int, itemsize: int, memory_efficient: bool) -> None:
        self.batch, self.itemsize, self.memory_efficient = batch, itemsize, memory_efficient
        self.k, self.layers = arguments["growth_rate"], arguments["block_config"]
        self.bottleneck = arguments.get("bn_size", 4) * self.k
        self.stem_channels = arguments["num_init_features"]
        self.small = arguments.get("small_inputs", False)
        self.compression = arguments.get("compression", 0.5)
        self.classes = arguments.get("num_classes", 1000)

    def calls(self, size: int) -> Iterator[Call]:
        size = yield from self.stem(size)
        channels = self.stem_channels
        for i, layers in enumerate(self.layers, start=1):
            yield from self.block(f"block {i}", size, channels, layers)
            channels += layers * self.k
            if i < len(self.layers):
                kept = math.floor(self.compression * channels)
                yield from self.transition(f"transition {i}", size, channels, kept)
                channels, size = kept, size // 2
        yield from self.head(size, channels)

    def call(
        self, kernel: str, part: str, size: int, shape: tuple[int, int, int], elements: int, products: int = 0
    ) -> Call:
        return Call(kernel, part, (self.batch, size, size), *shape, elements * self.itemsize, products)

    def stem(self, size: int) -> Iterator[Call]:
        c, part = self.stem_channels, "stem"
        kernel, made = (3, size) if self.small else (7, (size - 1) // 2 + 1)
        rows, weight = self.batch * made**2, 3 * kernel**2 * c
        moved, products = 3 * self.batch * size**2 + rows * c + weight, rows * weight
        for name in ("conv0", "conv0_backward"):  # the images need no gradient
            yield self.call(name, part, size, (3, c, 3), moved, products)
        if self.small:
            return made
        pooled = (made - 1) // 2 + 1
        outputs = self.batch * pooled**2 * c
        shape = (c, c, c)
        yield self.call("channel_statistics", part, made, shape, rows * c)
        positions = outputs  # a byte each, whatever the dtype
        for name, moved in (
            ("bn_relu_maxpool", rows * c + outputs),
            ("bn_relu_maxpool_backward", 2 * rows * c + outputs),
        ):
            yield Call(name, part, (self.batch, made, made), *shape, moved * self.itemsize + positions, 0)
        yield self.call("finalise_gradient", part, made, shape, 3 * rows * c)
        return pooled

    def block(self, part: str, size: int, channels: int, layers: int) -> Iterator[Call]:
        rows, b, k = self.batch * size**2, self.bottleneck, self.k
        total = channels + layers * k
        yield self.call("append_features", part, size, (channels, channels, total), 2 * channels * rows)
        for i in range(layers):
            c = channels + i * k
            first, second = (c, b, total), (b, k, total)
            w1, w2 = b * c, 9 * b * k
            one, three = rows * w1, rows * w2
            for _ in range(1 + self.memory_efficient):
                yield self.call("bn_relu_conv1x1", part, size, first, (c + b) * rows + w1, one)
            yield self.call("bn_relu_conv3x3", part, size, second, (b + k) * rows + w2, three)
            if i < layers - 1:  # nothing in the block reads what the last layer makes
                yield self.call("finalise_gradient", part, size, (k, k, total), 3 * k * rows)
            yield self.call("bn_relu_conv3x3_backward", part, size, second, (k + 2 * b) * rows + 2 * w2, 2 * three)
            yield self.call("bn_relu_conv1x1_backward", part, size, first, (2 * b + 3 * c) * rows + 2 * w1, 2 * one)
        yield self.call("finalise_gradient", part, size, (channels, channels, total), 3 * channels * rows)

    def transition(self, part: str, size: int, channels: int, kept: int) -> Iterator[Call]:
        rows, pooled = self.batch * size**2, self.batch * (size // 2) ** 2
        shape, weight = (channels, kept, channels), channels * kept
        yield self.call("channel_statistics", part, size, shape, 0)
        moved = channels * rows + kept * pooled + weight
        yield self.call("bn_relu_pool_conv1x1", part, size, shape, moved, pooled * weight)
        moved += channels * rows + weight
        yield self.call("bn_relu_pool_conv1x1_backward", part, size, shape, moved, 2 * pooled * weight)
        yield self.call("finalise_gradient", part, size, (channels,) * 3, 3 * channels * rows)

    def head(self, size: int, channels: int) -> Iterator[Call]:
        rows, part, shape = self.batch * size**2, "head", (channels,) * 3
        means, weight = self.batch * channels, channels * self.classes
        yield self.call("channel_statistics", part, size, shape, 0)
        yield self.call("bn_relu_global_avgpool", part, size, shape, channels * rows + means)
        yield self.call("bn_relu_global_avgpool_backward", part, size, shape, 2 * channels * rows + means)
        yield self.call("finalise_gradient", part, size, shape, 3 * channels * rows)
        moved, shape = weight + means + self.batch * self.classes, (channels, self.classes, channels)
        yield self.call("classifier", part, 1, shape, moved, self.batch * weight)
        yield self.call("classifier_backward", part, 1, shape, 2 * moved, 2 * self.batch * weight)
