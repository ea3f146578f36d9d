"""A whole network in training as one call, for networks of small images."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from densenet_fast.backends import select
from densenet_fast.backends.optional import NetworkParts, Tracked
from densenet_fast.functional.shared import LARGEST_VARIANCE
from densenet_fast.inference import Kinds, in_autocast_dtype, pooled
from densenet_fast.operands import BlockOperands, Operands
from densenet_fast.ops.block_plan import BlockTensors
from densenet_fast.ops.convolution import convolves, output_sizes, with_unit_channels
from densenet_fast.ops.network import Network
from densenet_fast.ops.op import saved_tensors_are_looked_at
from densenet_fast.ops.stage import STAGE_TENSORS

__all__ = ["TrainingNetwork"]

MOST_BYTES = 32 << 20
"""The most bytes of features and bottlenecks that one call keeps. The parts of a larger network free theirs one after
the other in the backward pass, and the time between its parts does not count."""


class TrainingNetwork:
    """A stem, dense blocks with a transition between each two, and the average behind the last, as one call and one
    node of autograd.

    Only such images are admitted with which the parts ran one by one before.
    """

    def __init__(self, convolution: nn.Module, parts: Sequence[Operands]) -> None:
        self._convolution, self._all, self._blocks = convolution, parts, parts[1::2]
        self._kinds = Kinds()

    def admits(self, images: Tensor) -> bool:
        """Whether such images were admitted before, all parameters are trained, and nothing has to see the parts one by
        one."""
        return (
            torch.is_grad_enabled()
            and not images.requires_grad
            and self._kinds.has(images)
            and self._network.is_trained()
            and not saved_tensors_are_looked_at()
        )

    def admit(self, images: Tensor) -> None:
        """Admits images of the dtype, the shape and the device of these, under the same autocast, if they are small,
        and the network is one that runs in one call."""
        if not torch.is_grad_enabled() or not convolves(self._convolution, images) or not self._fits():
            return
        x, size = in_autocast_dtype(images), 0
        backend, grid = select(x.device, x.dtype), pooled(x, output_sizes(self._convolution, x))
        for block in self._blocks:
            if not backend.runs_whole_blocks(grid):
                return
            widths = block.columns + sum(layer[0].weight.shape[0] for layer in block.layers)
            size += math.prod(grid) * widths * x.element_size()
            grid = (grid[0], *(length // 2 for length in grid[1:]))
        if backend.RUNS_NETWORKS and size <= MOST_BYTES:
            self._kinds.add(images)

    def run(self, images: Tensor) -> Tensor:
        """The means [N, C] of the rectified features. Running statistics are updated.

        Raises:
            RuntimeError: the tensors of the parts have changed in place, and do not fit any more; or a variance of the
                batch is beyond the kernels' float32. Nothing is updated then.
        """
        images = in_autocast_dtype(images)
        return self._network.run(select(images.device, images.dtype), with_unit_channels(images))

    def _fits(self) -> bool:
        """Whether the call takes such parts: float32, without dropout, and of one process."""
        return (
            self._convolution.weight.dtype == torch.float32
            and all(block.bottleneck and not block.drops for block in self._blocks)
            and all(
                part.group() is None
                and not part.counters
                and part.running.plain()
                and BlockTensors.of(part.stages.tensors, part.stages.eps).fits(torch.float32)
                for part in self._all
            )
        )

    @functools.cached_property
    def _network(self) -> Network:
        stages = [stage for part in self._all for stage in part.stages]
        flat = [t for stage in stages for t in stage[:STAGE_TENSORS]]
        places = [i for i, t in enumerate(flat) if t is not None]
        blocks: list[BlockOperands] = [*self._blocks]
        parts = NetworkParts(
            [self._convolution.weight, *(flat[i] for i in places)],
            places,
            [stage.eps for stage in stages],
            [len(block.layers) for block in blocks],
            [flag for block in blocks for flag in block.saved(self._convolution.weight, True)],
            [block.prepend for block in blocks],
            self._convolution.stride[0],
            self._convolution.padding[0],
        )
        running = [part.running for part in self._all]
        counts = [len(running[0]), *(len(a) + len(b) for a, b in zip(running[1::2], running[2::2]))]
        tracked = Tracked(
            [t for r in running for t in r.vectors],
            [t for r in running for t in r.counters],
            [momentum for r in running for momentum in r.momenta],
            [start for r in running for start in r.starts],
            counts,
            LARGEST_VARIANCE,
        )
        return Network(parts, tracked)
