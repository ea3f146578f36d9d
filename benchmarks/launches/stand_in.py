"""A backend on the meta device that counts: what Triton's kernels are launched with, and what those in CUDA C++ move.

Left out are the partial results of the kernels in csrc/cuda/*.cu that combine columns: at most 1,024 tiles'.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends import aten, triton
from densenet_fast.backends.affine import Affine, Job, Reader, Statistics, ThroughStatistics, Unfinished, Update
from densenet_fast.backends.contract import Sums
from densenet_fast.backends.triton import Triton, config
from densenet_fast.backends.triton.launch import Launch
from launches.conv3x3_counts import Conv3x3
from launches.counts import Counts, tiles_of
from launches.triton_counts import count

__all__ = ["StandIn"]

JOBS = 64
"""What a launch of ``prepare`` or ``update_running_statistics`` does at most (csrc/cuda/kernels.h)."""
WINDOWS = 9
"""Pixels of a window of the maxima. On average four pixels together are in as many windows."""


def _of(part: str, name: str) -> Callable[..., Any]:
    """Triton's function of this name, whose launches are of a ``part``."""

    def run(self: "StandIn", *arguments: Any, **options: Any) -> Any:
        self.part = part
        return getattr(triton, name)(*arguments, **options)

    return run


class StandIn(Triton):
    """The functions of Triton's backend, which count instead of running. Those in CUDA C++ count what they move.

    Args:
        device: that launches are configured for.
        native: whether the 3x3 kernels in CUDA C++ stand in for Triton's where they serve: 16 bits, two dimensions.
    """

    name = "counted"

    def __init__(self, device: config.Device, native: bool) -> None:
        self.device, self.native, self.part = device, native, ""
        self.counts: list[Counts] = []
        self.unplaced: list[int] = []
        """Which counts are of the part that the next kernel is of."""

    def unavailable(self) -> str | None:
        """Nothing that is missing hinders counting."""
        return None

    bn_relu_conv1x1 = _of("blocks", "bn_relu_conv1x1")
    bn_relu_conv1x1_backward = _of("blocks", "bn_relu_conv1x1_backward")
    bn_relu_pool_conv1x1 = _of("transitions", "bn_relu_pool_conv1x1")
    bn_relu_pool_conv1x1_backward = _of("transitions", "bn_relu_pool_conv1x1_backward")

    def take(self, item: Launch) -> None:
        """Counts a launch of Triton's."""
        self.add(count(item, self.device.generation))

    def add(self, counts: Counts) -> None:
        """Counts one, of the present part."""
        for i in self.unplaced:
            self.counts[i] = self.counts[i].of(self.part)
        self.unplaced = []
        self.counts.append(counts.of(self.part))

    def moved(self, kernel: str, read: int = 0, written: int = 0, asked: int | None = None) -> None:
        """Counts what is bound by bandwidth."""
        self.add(Counts(kernel, read=read, asked=read if asked is None else asked, written=written))

    def combined(self, kernel: str, wanted: object) -> None:
        """Counts the launch that combines what the tiles left, if its result is wanted."""
        if wanted is not None:
            self.moved(kernel)

    def bn_relu_conv3x3(
        self,
        x: Tensor,
        affine: Affine | None,
        weight: Tensor,
        bias: Tensor | None,
        grid: tuple[int, ...],
        out: Tensor,
        *,
        mask: Tensor | None = None,
        keep_scale: float = 1.0,
        statistics: Statistics | None = None,
    ) -> None:
        if not self.serves(x, weight, grid):
            self.part = "blocks"
            return triton.bn_relu_conv3x3(
                x, affine, weight, bias, grid, out, mask=mask, keep_scale=keep_scale, statistics=statistics
            )
        from densenet_fast.backends.triton import shared

        layer = self.layer(x, weight, grid)
        self.part = "blocks"
        self.add(layer.forward(statistics is not None))
        if statistics is not None:
            tile_rows = layer.forward_rows()
            partials = shared.float32(x, layer.tiles(tile_rows), 2, layer.outputs)
            shared.combine_statistics(partials, layer.rows, tile_rows, statistics)

    def bn_relu_conv3x3_backward(
        self,
        grad: Tensor,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        grid: tuple[int, ...],
        out: Tensor | None,
        *,
        need_weight: bool,
        reader: Reader | None = None,
        unfinished: Unfinished | None = None,
        like: Tensor | None = None,
        source: Tensor | None = None,
    ) -> tuple[Tensor | None, Sums | None]:
        self.part = "blocks"
        needed = out is not None and need_weight and unfinished is not None and like is not None and source is None
        if not self.serves(x, weight, grid) or not needed:
            return triton.bn_relu_conv3x3_backward(
                grad,
                x,
                affine,
                weight,
                grid,
                out,
                need_weight=need_weight,
                reader=reader,
                unfinished=unfinished,
                like=like,
                source=source,
            )
        from densenet_fast.backends.triton import shared

        layer = self.layer(x, weight, grid)
        self.add(layer.grad_input())
        partials = shared.float32(x, layer.row_blocks(), 2 * layer.channels)
        sums = shared.sum_partials(partials, None, layer.channels, affine, reader)
        self.add(layer.grad_weight(unfinished.through is not None))
        unfinished.through = None
        product = shared.Product(shared.float32(x, layer.ranges(), layer.weights), torch.empty_like(like), 9)
        unfinished.sums.append(product)
        return product.out, sums

    def serves(self, x: Tensor, weight: Tensor, grid: tuple[int, ...]) -> bool:
        """Whether the 3x3 kernels in CUDA C++ do."""
        few = weight.shape[0] <= config.CONVOLUTION_IN_CUDA[self.device.generation]
        return self.native and len(grid) == 3 and x.element_size() == 2 and few

    def layer(self, x: Tensor, weight: Tensor, grid: tuple[int, ...]) -> Conv3x3:
        """The convolution of z [M, B]."""
        return Conv3x3(grid, x.shape[1], weight.shape[0], x.element_size(), self.device)

    def channel_statistics(self, x: Tensor, out: Statistics) -> None:
        self.part = "stem"  # all others know them from where their input was made
        self.moved("append_kernel", x.nbytes)
        self.combined("combine_statistics_kernel", out)

    def append_features(
        self,
        new: Tensor,
        out: Tensor,
        statistics: Statistics | None,
        mask: Tensor | None = None,
        keep_scale: float = 1.0,
    ) -> None:
        self.part = "blocks"
        self.moved("append_kernel", new.nbytes + (0 if mask is None else mask.nbytes), out.nbytes)
        self.combined("combine_statistics_kernel", statistics)

    def finalise_gradient(self, grad: Tensor, through: ThroughStatistics, out: Tensor) -> Tensor:
        self.part = self.part if self.part == "stem" else "blocks"  # which transitions and the head leave it to
        self.moved("finalise_kernel", grad.nbytes + through.x.nbytes, out.nbytes)
        return out

    def bn_relu_maxpool(
        self, x: Tensor, affine: Affine, grid: tuple[int, ...], statistics: Statistics | None
    ) -> tuple[Tensor, Tensor]:
        out, argmax = aten.bn_relu_maxpool(x, affine, grid, None)
        self.part = "stem"
        self.moved("bn_relu_maxpool_kernel", x.nbytes, out.nbytes + argmax.nbytes, WINDOWS * out.nbytes)
        self.combined("combine_statistics_kernel", statistics)
        return out, argmax

    def bn_relu_maxpool_backward(
        self,
        grad: Tensor,
        argmax: Tensor,
        x: Tensor,
        affine: Affine,
        grid: tuple[int, ...],
        reader: Reader | None = None,
    ) -> tuple[Tensor, Sums | None]:
        self.part = "stem"
        outputs = grad.nbytes + argmax.nbytes
        self.moved("bn_relu_pool_backward_kernel", x.nbytes + outputs, x.nbytes, x.nbytes + WINDOWS * outputs)
        self.moved("combine_sums_kernel")
        return torch.empty_like(x), None

    def bn_relu_global_avgpool(self, x: Tensor, affine: Affine, grid: tuple[int, ...]) -> Tensor:
        self.part, out = "head", x.new_empty(grid[0], x.shape[1])
        self.moved("bn_relu_global_avgpool_kernel", x.nbytes, out.nbytes)
        return out

    def bn_relu_global_avgpool_backward(
        self, grad: Tensor, x: Tensor, affine: Affine, grid: tuple[int, ...], reader: Reader | None = None
    ) -> tuple[Tensor, Sums | None]:
        self.part = "head"
        self.moved("bn_relu_pool_backward_kernel", x.nbytes + grad.nbytes, x.nbytes, 2 * x.nbytes)
        self.moved("combine_sums_kernel")
        return torch.empty_like(x), None

    def prepare(self, jobs: Sequence[Job]) -> None:
        for start in range(0, len(jobs), JOBS):
            some = jobs[start : start + JOBS]
            read = sum(job.source.nbytes for job in some if job.source is not None)
            written = sum(job.target.nbytes for job in some)
            self.unplaced.append(len(self.counts))
            self.counts.append(Counts("prepare_kernel", read=read, asked=read, written=written))

    def update_running_statistics(self, updates: Sequence[Update]) -> None:
        self.part = "vectors"
        for _ in range(tiles_of(sum(len(update.running) for update in updates), JOBS)):
            self.moved("update_running_kernel")
