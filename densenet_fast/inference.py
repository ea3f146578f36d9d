"""Inference of a part by one call of a compiled kernel, which normalises by running statistics.

These kernels run where no gradient is needed, on devices whose backend has them. A part in front of a dense block
writes its result into the block's feature buffer, so nothing is copied between the two.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast.backends import select
from densenet_fast.backends.contract import Backend
from densenet_fast.backends.layout import are_dense, empty_image, to_matrix
from densenet_fast.operands import BlockOperands, ConvOperands, NormOperands, Operands
from densenet_fast.ops import planned
from densenet_fast.ops.convolution import as_taps, is_plain, output_sizes, with_unit_channels
from densenet_fast.ops.flops import of_convolutions, of_stages
from densenet_fast.ops.op import named, seen_by_dispatcher
from densenet_fast.ops.stage import Stage, Stages, autocast_dtype

Grid = tuple[int, ...]

MOST_KINDS = 64
"""The most kinds of images that a network remembers."""


class Frozen:
    """The tensors of some stages as the kernels take them.

    For each stage they are its normalisation's four tensors and its convolution's weight, if it has one. An empty
    tensor stands for an absent one.
    """

    def __init__(self, stages: Stages) -> None:
        self.eps = stages.eps
        self._vectors = [t for stage in stages for t in stage[:4] if t is not None]
        self._weights = [stage.conv_weight for stage in stages if stage.conv_weight is not None]
        self._dtypes = {weight.dtype for weight in self._weights}
        empty = torch.empty(0)
        taken = 5 if self._weights else 4
        self.tensors = [empty if t is None else t for stage in stages for t in stage[:taken]]

    def fit(self, x: Tensor) -> bool:
        """Whether the kernels take these tensors with x."""
        return (
            self._dtypes <= {x.dtype, torch.float32}
            and all(map(Tensor.is_contiguous, self._vectors))
            and are_dense(self._weights)
        )


class Room:
    """What consecutive parts know of each other.

    ``reader`` is the dense block that reads what is made next, if it is one. The features are the buffer that this was
    made in.
    """

    def __init__(self) -> None:
        self.reader: BlockOperands | None = None
        self.served: list[Operands] = []
        """Those of the parts that ran by these kernels, in turn."""
        self._made: tuple[Tensor, Tensor] | None = None

    def image(self, like: Tensor, grid: Grid, channels: int, backend: Backend) -> Tensor:
        """An uninitialised [N, channels, *spatial] with a channel stride of 1, in the feature buffer of its reader."""
        if self.reader is None or _frozen(self.reader) is None or self.reader.channels != channels:
            return empty_image(like, grid, channels, backend.empty)
        features = empty_image(like, grid, self.reader.columns, backend.empty)
        own = self.reader.own(features)
        self._made = own, features
        return own

    def features_of(self, x: Tensor) -> Tensor | None:
        """The feature buffer that x was made in, for the one block that reads x."""
        made, self._made = self._made, None
        return made[1] if made is not None and made[0] is x else None


def dense_block(x: Tensor, operands: BlockOperands, room: Room | None) -> Tensor | None:
    """The block's features [N, C_total, H, W] from x [N, C0, H, W]. None where these kernels do not take it."""
    features = None if room is None else room.features_of(x)
    served = _served(x, operands)
    if served is None or not operands.bottleneck or operands.drops or min(x.shape[2:]) < 2:
        return None
    backend, frozen = served
    with _noted("dense_block", x, operands, room):
        if features is None:
            features = empty_image(x, _grid(x), operands.columns, backend.empty)
            backend.append_features(x, _matrix(operands.own(features)), None)
        backend.dense_block_inference(
            _matrix(features), x.shape[1], frozen.tensors, frozen.eps, _grid(x), operands.prepend
        )
    return features


def transition(x: Tensor, operands: ConvOperands, room: Room | None) -> Tensor | None:
    """BN-ReLU, a mean over windows of 2 and a 1x1 convolution of x [N, C, H, W]. None where these kernels do not take
    it."""
    served = _served(x, operands)
    if served is None:
        return None
    backend, frozen = served
    with _noted("bn_relu_conv1x1", x, operands, room):
        grid = (x.shape[0], *(size // 2 for size in x.shape[2:]))
        out = (room or Room()).image(x, grid, operands.unit.weight.shape[0], backend)
        backend.bn_relu_pool_conv1x1_inference(_matrix(x), frozen.tensors, *frozen.eps, _grid(x), _matrix(out))
    return out


def global_avgpool(x: Tensor, operands: NormOperands, room: Room | None) -> Tensor | None:
    """BN-ReLU and the mean over all pixels of x [N, C, H, W]. None where these kernels do not take it."""
    served = _served(x, operands)
    if served is None:
        return None
    backend, frozen = served
    with _noted("bn_relu_global_avgpool", x, operands, room):
        return backend.bn_relu_global_avgpool_inference(_matrix(x), frozen.tensors, *frozen.eps, x.shape[0])


def stem(images: Tensor, convolution: nn.Module, operands: NormOperands, room: Room | None) -> Tensor | None:
    """The convolution, BN-ReLU and the maximum over windows of 3 of images [N, C, H, W]. None where these kernels do
    not take them."""
    if torch.compiler.is_compiling():
        return None
    images = in_autocast_dtype(images)
    weight, (stage,) = convolution.weight, operands.stages
    if not is_plain(convolution, images) or stage.running_mean is None:
        return None
    sizes = output_sizes(convolution, images)
    served = _served(images, operands, weight)
    if served is None or min(sizes) < 1 or stage.running_mean.numel() != weight.shape[0]:
        return None
    backend, frozen = served
    flops = functools.partial(of_convolutions, images.shape[0] * sizes[0] * sizes[1], [weight])
    with _noted("bn_relu_maxpool", images, operands, room, flops):
        out = (room or Room()).image(images, pooled(images, sizes), weight.shape[0], backend)
        _stem(backend, images, convolution, frozen, _matrix(out))
    return out


def _stem(backend: Backend, images: Tensor, convolution: nn.Module, frozen: Frozen, out: Tensor) -> None:
    images, taps = with_unit_channels(images), as_taps(convolution.weight)
    stride, padding = convolution.stride[0], convolution.padding[0]
    backend.stem_inference(images, taps, frozen.tensors, *frozen.eps, stride, padding, out)


def in_autocast_dtype(images: Tensor) -> Tensor:
    """The images as autocast would convert them."""
    autocast = autocast_dtype(images.device)
    return images if autocast is None or images.dtype != torch.float32 else images.to(autocast)


def pooled(images: Tensor, sizes: list[int]) -> Grid:
    """The grid of the stem's result, from the ``sizes`` of what its convolution makes of the images."""
    return images.shape[0], *((size + 1) // 2 for size in sizes)


def _served(x: Tensor, operands: Operands, *others: Tensor) -> tuple[Backend, Frozen] | None:
    """The backend that has these kernels, and the operands' tensors as it takes them. None where it does not take x,
    the operands or ``others``."""
    if torch.compiler.is_compiling():
        return None
    frozen = _frozen(operands)
    if frozen is None or x.dim() != 4 or x.numel() == 0 or not frozen.fit(x):
        return None
    if operands.differentiable(x) or (torch.is_grad_enabled() and any(t.requires_grad for t in others)):
        return None
    backend = select(x.device, x.dtype)
    if not backend.INFERS or seen_by_dispatcher([x, operands.stages.tensors, *others]):
        return None
    return backend, frozen


def _frozen(operands: Operands) -> Frozen | None:
    """The operands' tensors as the kernels take them. None unless all are plain and normalised by running
    statistics."""
    return operands.remembered(_examined)


def _examined(operands: Operands) -> Frozen | None:
    unfit = any(norm.training for norm in operands.norms) or not all(map(_is_plain, operands.stages))
    return None if unfit else Frozen(operands.stages)


def _is_plain(stage: Stage) -> bool:
    plain = stage.frozen and stage.running_var is not None and stage.conv_bias is None
    return plain and all(t is None or t.dtype == torch.float32 for t in stage[:4])


def _matrix(x: Tensor) -> Tensor:
    """[N, C, H, W] as [M, C] with a column stride of 1: a view, made in one call, where all rows have one stride."""
    n, channels, height, width = x.shape
    image, column, line, row = x.stride()
    if column == 1 and line == width * row and image == height * line:
        return x.as_strided((n * height * width, channels), (row, 1))
    return to_matrix(x)


def _grid(x: Tensor) -> Grid:
    return x.shape[0], *x.shape[2:]


def _noted(name: str, x: Tensor, operands: Operands, room: Room | None, *more: Callable[[], int]) -> Any:
    operands.outcome.walked = planned.obstacle(x)
    if room is not None:
        room.served.append(operands)
    return named(f"densenet_fast::{name}", x, lambda: of_stages(x, operands.stages.tensors), *more)


class Kinds:
    """Kinds of images that a network takes: their shape, dtype and device, and autocast's dtype.

    Without autocast only those of float32: beside others, weights of either dtype would pass for theirs.
    """

    def __init__(self) -> None:
        self._known: set[Hashable] = set()

    def add(self, images: Tensor) -> None:
        """Adds the kind of these images."""
        if images.dtype == torch.float32 or autocast_dtype(images.device) is not None:
            if len(self._known) >= MOST_KINDS:
                self._known.clear()
            self._known.add(_kind(images))

    def has(self, images: Tensor) -> bool:
        """Whether such images were added before, and neither a profiler nor the dispatcher has to see the parts."""
        return (
            _kind(images) in self._known and not torch.autograd._profiler_enabled() and not seen_by_dispatcher([images])
        )


def _kind(images: Tensor) -> Hashable:
    return images.shape, images.dtype, images.device, autocast_dtype(images.device)


class Network:
    """A stem, dense blocks with a transition between each two, and the average behind the last, without what stands
    between these parts elsewhere.

    Only such images are admitted with which each part, called by itself, has run by these kernels.
    """

    def __init__(self, convolution: nn.Module, parts: Sequence[Operands]) -> None:
        self._convolution, self._blocks = convolution, parts[1::2]
        self._frozen = [*map(_frozen, parts)]
        self._kinds = Kinds()

    @staticmethod
    def consists_of(parts: Sequence[Operands]) -> bool:
        """Whether the parts are such, in that order."""
        turns = [BlockOperands, ConvOperands] * (len(parts) // 2)
        return [*map(type, parts)] == [NormOperands, *turns[:-1], NormOperands]

    def admits(self, images: Tensor) -> bool:
        """Whether such images were admitted before, and nothing has to see the parts one by one."""
        return not torch.is_grad_enabled() and self._kinds.has(images)

    def admit(self, images: Tensor) -> None:
        """Admits images of the dtype, the shape and the device of these, under the same autocast."""
        self._kinds.add(images)

    def run(self, images: Tensor) -> Tensor:
        """The means [N, C] of the rectified features.

        Raises:
            RuntimeError: the tensors of the parts have changed in place, and do not fit any more.
        """
        images = in_autocast_dtype(images)
        backend, (stem, *parts) = select(images.device, images.dtype), self._frozen
        grid = pooled(images, output_sizes(self._convolution, images))
        features, own = _block_memory(images, grid, self._blocks[0], backend)
        _stem(backend, images, self._convolution, stem, own)
        for i, block in enumerate(self._blocks):
            layers, reader = parts[2 * i : 2 * i + 2]
            backend.dense_block_inference(features, block.channels, layers.tensors, layers.eps, grid, block.prepend)
            if i + 1 < len(self._blocks):
                halved = (grid[0], grid[1] // 2, grid[2] // 2)
                following, own = _block_memory(images, halved, self._blocks[i + 1], backend)
                backend.bn_relu_pool_conv1x1_inference(features, reader.tensors, *reader.eps, grid, own)
                features, grid = following, halved
        return backend.bn_relu_global_avgpool_inference(features, reader.tensors, *reader.eps, grid[0])


def _block_memory(like: Tensor, grid: Grid, block: BlockOperands, backend: Backend) -> tuple[Tensor, Tensor]:
    """Uninitialised features [M, C_total] of a block, and the columns of them that are its input."""
    rows, strides = math.prod(grid), (block.columns, 1)
    features = backend.empty(like, (rows, block.columns), strides)
    first = block.columns - block.channels if block.prepend else 0
    return features, features.as_strided((rows, block.channels), strides, first)
