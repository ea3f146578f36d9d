"""The backend in C++ (csrc/cpu): row tiles that stay in a core's cache, for float32 and bfloat16 on CPUs.

Equal inputs give bitwise equal results for a given number of threads; another number divides the rows otherwise, and
rounds otherwise.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from densenet_fast.backends import extension
from densenet_fast.backends.affine import (
    NO_STATISTICS,
    NO_VECTORS,
    Affine,
    Completion,
    Job,
    Reader,
    RunningStatistics,
    Statistics,
    ThroughStatistics,
    Unfinished,
    Update,
    read,
)
from densenet_fast.backends.aten import Aten, aten
from densenet_fast.backends.contract import Sums
from densenet_fast.backends.layout import to_matrix
from densenet_fast.backends.optional import Block, BlockAndReader, NetworkParts, OneStage, Tracked
from densenet_fast.backends.spatial import convolve, convolve_backward

kernels = torch.ops.densenet_fast

LARGE = 1 << 18
"""From so many bytes on a tensor's memory is kept for the next."""


class Cpu(Aten):
    """In C++."""

    name = "cpu"
    RECOMPUTES_WIDE_BOTTLENECKS = True
    RUNS_STAGES = True
    RUNS_NETWORKS = True
    CONVOLVES = True
    INFERS = True

    def unavailable(self) -> str | None:
        return extension.unavailable()

    def describe(self) -> str:
        """Names the instruction set in use."""
        return f"C++, {kernels.cpu_capability()}"

    def dtypes(self, device_type: str) -> Collection[torch.dtype]:
        return (torch.float32, torch.bfloat16) if device_type == "cpu" else ()

    def empty(self, like: Tensor, size: Sequence[int], strides: Sequence[int], kept: bool = False) -> Tensor:
        if math.prod(size) * like.element_size() < LARGE:
            return like.new_empty_strided(size, strides)
        return kernels.cpu_empty(like, size, strides, kept)

    def channel_statistics(self, x: Tensor, out: Statistics) -> None:
        kernels.cpu_statistics(x, *out)

    def append_features(
        self,
        new: Tensor,
        out: Tensor,
        statistics: Statistics | None,
        mask: Tensor | None = None,
        keep_scale: float = 1.0,
    ) -> None:
        rows = new.movedim(1, -1)
        if new.data_ptr() != out.data_ptr():  # else it is dropped out in place
            kernels.cpu_huge_pages(out)
            out.view(rows.shape).copy_(rows)
        _finish(out, statistics, mask, keep_scale)

    def bn_relu_conv1x1(
        self,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        statistics: Statistics | None,
        *,
        then: Affine | None = None,
    ) -> None:
        kernels.cpu_bn_relu_conv1x1(
            x,
            *affine.vectors(),
            weight.contiguous(),
            _float(bias),
            out,
            *(statistics or NO_STATISTICS),
            *(NO_VECTORS if then is None else then.vectors()),
        )

    def bn_relu_conv1x1_backward(
        self,
        grad: Tensor,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        grad_x: Tensor | None,
        *,
        need_weight: bool,
        need_sums: bool,
        source: Tensor | None = None,
        reader: Reader | None = None,
        completion: Completion | None = None,
        unfinished: Unfinished | None = None,
        like: Tensor | None = None,
    ) -> tuple[Tensor | None, Sums | None]:
        through = None if unfinished is None else unfinished.through
        by = (None, None, None, None, 1.0) if through is None else (*through[:4], float(through.count))
        grad_weight, sums = kernels.cpu_bn_relu_conv1x1_backward(
            grad, x, *affine.vectors(), weight.contiguous(), grad_x, need_weight, need_sums, *by, source
        )
        have_sums = need_sums or grad_x is not None
        sums = read((sums[0], sums[1]) if have_sums else None, affine, reader)
        if completion is not None:
            self.finalise_gradient(grad_x[:, completion.columns], completion.through, completion.out)
        return grad_weight if need_weight else None, sums

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
        if not convolves(grid):
            y = convolve(x if affine is None else kernels.cpu_bn_relu(x, *affine.vectors()), weight, bias, grid)
            return self.append_features(y, out, statistics, mask, keep_scale)
        vectors = NO_VECTORS if affine is None else affine.vectors()
        kernels.cpu_bn_relu_conv3x3(x, *vectors, _evenly_spaced(weight), _float(bias), grid, out)
        _finish(out, statistics, mask, keep_scale)

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
        if convolves(grid):
            weight = _evenly_spaced(weight)
            grad_weight = torch.empty_like(weight, dtype=torch.float32) if need_weight else None
            sums = kernels.cpu_bn_relu_conv3x3_backward(
                grad, x, *affine.vectors(), weight, grid, out, grad_weight, source
            )
        else:
            a = kernels.cpu_bn_relu(x, *affine.vectors())
            input_gradient, grad_weight = convolve_backward(grad, a, weight, grid, out is not None, need_weight)
            if out is not None:
                sums = kernels.cpu_mask(input_gradient, x, *affine.vectors(), out if source is None else input_gradient)
                if source is not None:
                    torch.add(source, input_gradient, out=out)
        sums = None if out is None else read((sums[0], sums[1]), affine, reader)
        return grad_weight if need_weight else None, sums

    def finalise_gradient(self, grad: Tensor, through: ThroughStatistics, out: Tensor) -> Tensor:
        kernels.cpu_finalise(grad, *through[:4], float(through.count), out)
        return out

    def bn_relu_pool_conv1x1(
        self,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        bias: Tensor | None,
        grid: tuple[int, ...],
        statistics: Statistics | None,
    ) -> Tensor:
        return kernels.cpu_bn_relu_pool_conv1x1(
            x, *affine.vectors(), weight.contiguous(), _float(bias), grid, *(statistics or NO_STATISTICS)
        )

    def bn_relu_pool_conv1x1_backward(
        self,
        grad: Tensor,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        grid: tuple[int, ...],
        *,
        need_input: bool,
        need_weight: bool,
        reader: Reader | None = None,
        like: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Sums | None]:
        scaled, grad_weight, sums = kernels.cpu_bn_relu_pool_conv1x1_backward(
            grad, x, *affine.vectors(), weight.contiguous(), grid, need_input, need_weight
        )
        grad_weight = grad_weight if need_weight else None
        if not need_input:
            return None, grad_weight, None
        return scaled, grad_weight, read((sums[0], sums[1]), affine, reader)

    def bn_relu_maxpool(
        self, x: Tensor, affine: Affine, grid: tuple[int, ...], statistics: Statistics | None
    ) -> tuple[Tensor, Tensor]:
        return kernels.cpu_bn_relu_maxpool(x, *affine.vectors(), grid, *(statistics or NO_STATISTICS))

    def bn_relu_maxpool_backward(
        self,
        grad: Tensor,
        argmax: Tensor,
        x: Tensor,
        affine: Affine,
        grid: tuple[int, ...],
        reader: Reader | None = None,
    ) -> tuple[Tensor, Sums | None]:
        scaled, sums = kernels.cpu_bn_relu_maxpool_backward(grad, argmax, x, *affine.vectors(), grid)
        return scaled, read((sums[0], sums[1]), affine, reader)

    def bn_relu_global_avgpool(self, x: Tensor, affine: Affine, grid: tuple[int, ...]) -> Tensor:
        return kernels.cpu_bn_relu_global_avgpool(x, *affine.vectors(), grid[0])

    def bn_relu_global_avgpool_backward(
        self, grad: Tensor, x: Tensor, affine: Affine, grid: tuple[int, ...], reader: Reader | None = None
    ) -> tuple[Tensor, Sums | None]:
        scaled, sums = kernels.cpu_bn_relu_global_avgpool_backward(grad, x, *affine.vectors())
        return scaled, read((sums[0], sums[1]), affine, reader)

    def prepare(self, jobs: Sequence[Job]) -> None:
        for kind, target, source, eps in jobs:
            if kind == "copy":
                target.copy_(source)
            elif kind == "rstd":
                torch.add(source.to(target.dtype), eps, out=target).rsqrt_()
            elif kind == "zero":
                target.zero_()
            else:
                raise ValueError(f"kind: expected copy, rstd or zero, got {kind}")

    def update_running_statistics(self, updates: Sequence[Update]) -> None:
        for update in updates:
            running, mean, var, count = update
            if type(running) is RunningStatistics and running.plain() and isinstance(count, int):
                torch.autograd.graph.increment_version([*running.vectors, *running.counters])
                given = (running.vectors, running.counters, running.momenta, running.starts)
                kernels.cpu_update_running_statistics(*given, mean, var, float(count))
            else:
                aten.update_running_statistics([update])

    def runs_whole_blocks(self, grid: tuple[int, ...]) -> bool:
        return convolves(grid)

    def dense_block(
        self,
        block: Block,
        in_channels: int,
        *,
        return_statistics: bool,
        x: Tensor | None = None,
        x_mean: Tensor | None = None,
        x_var: Tensor | None = None,
    ) -> None:
        features, *rest, prepend = block
        kernels.cpu_dense_block(features, in_channels, *rest, return_statistics, prepend, x, x_mean, x_var)

    def dense_block_backward(
        self,
        grad: Tensor,
        total: Tensor,
        block: Block,
        count: Tensor | int,
        grad_x: Tensor,
        gradients: list[Tensor],
        p: Tensor,
        q: Tensor,
        *,
        return_statistics: bool,
    ) -> None:
        features, tensors, eps, grid, bottlenecks, mean, var, prepend = block
        made = (features, bottlenecks, mean, var, float(count))
        out = (grad_x, gradients, p, q)
        kernels.cpu_dense_block_backward(grad, total, *made, tensors, eps, grid, *out, return_statistics, prepend)

    def dense_block_and_reader(
        self,
        x: Tensor,
        x_mean: Tensor | None,
        x_var: Tensor | None,
        parts: BlockAndReader,
        *,
        return_statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
        return kernels.cpu_dense_block_and_reader(x, x_mean, x_var, *parts, return_statistics)

    def dense_block_and_reader_backward(
        self,
        grad: Tensor,
        features: Tensor,
        mean: Tensor,
        var: Tensor,
        bottlenecks: list[Tensor],
        in_channels: int,
        parts: BlockAndReader,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return kernels.cpu_dense_block_and_reader_backward(grad, features, mean, var, bottlenecks, in_channels, *parts)

    def bn_relu_maxpool_stage(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None, stage: OneStage, *, return_statistics: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return kernels.cpu_bn_relu_maxpool_stage(x, mean, var, *stage, return_statistics)

    def bn_relu_maxpool_stage_backward(
        self, grad: Tensor, argmax: Tensor, x: Tensor, mean: Tensor, var: Tensor, stage: OneStage
    ) -> tuple[Tensor, list[Tensor]]:
        return kernels.cpu_bn_relu_maxpool_stage_backward(grad, argmax, x, mean, var, *stage)

    def convolution(self, images: Tensor, taps: Tensor, stride: int, padding: int) -> Tensor:
        return kernels.cpu_convolution(images, taps, stride, padding)

    def convolution_grad_weight(self, grad: Tensor, images: Tensor, taps: Tensor, stride: int, padding: int) -> Tensor:
        return kernels.cpu_convolution_grad_weight(grad, images, taps, stride, padding)

    def network(self, images: Tensor, parts: NetworkParts, tracked: Tracked) -> tuple[Tensor, list[Tensor]]:
        torch.autograd.graph.increment_version([*tracked.vectors, *tracked.counters])
        return kernels.cpu_network(images, *parts, *tracked)

    def network_backward(self, grad: Tensor, images: Tensor, kept: list[Tensor], parts: NetworkParts) -> list[Tensor]:
        return kernels.cpu_network_backward(grad, images, kept, *parts)

    def dense_block_inference(
        self,
        features: Tensor,
        in_channels: int,
        tensors: list[Tensor],
        eps: list[float],
        grid: tuple[int, ...],
        prepend: bool,
    ) -> None:
        kernels.cpu_dense_block_inference(features, in_channels, tensors, eps, grid, prepend)

    def bn_relu_pool_conv1x1_inference(
        self, x: Tensor, tensors: list[Tensor], eps: float, grid: tuple[int, ...], out: Tensor
    ) -> None:
        kernels.cpu_bn_relu_pool_conv1x1_inference(x, tensors, eps, grid, out)

    def bn_relu_global_avgpool_inference(self, x: Tensor, tensors: list[Tensor], eps: float, images: int) -> Tensor:
        return kernels.cpu_bn_relu_global_avgpool_inference(x, tensors, eps, images)

    def stem_inference(
        self, images: Tensor, taps: Tensor, tensors: list[Tensor], eps: float, stride: int, padding: int, out: Tensor
    ) -> None:
        kernels.cpu_stem_inference(images, taps, tensors, eps, stride, padding, out)


cpu = Cpu()


def _finish(out: Tensor, statistics: Statistics | None, mask: Tensor | None, keep_scale: float) -> None:
    """Drops values of the new columns out [M, k], if there is a mask, and writes their statistics if asked for."""
    if mask is not None:
        kernels.cpu_dropout(out, to_matrix(mask), keep_scale)
    if statistics is not None:
        kernels.cpu_statistics(out, *statistics)


def convolves(grid: tuple[int, ...]) -> bool:
    """Whether the convolution of kernel size 3 is ours on this grid: on lines, and on images and planes of volumes that
    a tile of 2x2 fits in."""
    return len(grid) == 2 or min(grid[-2:]) >= 2


def _evenly_spaced(weight: Tensor) -> Tensor:
    """[k, B, 3, ...] with the taps at one distance: contiguous or channels last."""
    strides = weight.stride()[2:]
    even = all(outer == 3 * inner for outer, inner in zip(strides, strides[1:]))
    return weight if even else weight.contiguous()


def _float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float()
