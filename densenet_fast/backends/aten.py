"""The backend of torch operations: the equations of the contract plainly, for every device and floating dtype. It is
what the others are held to, and what runs where they do not."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from densenet_fast.backends.affine import (
    Affine,
    Completion,
    Job,
    Reader,
    Running,
    Statistics,
    ThroughStatistics,
    Unfinished,
    Update,
    accumulation_dtype,
    bn_relu,
    normalise,
    read,
)
from densenet_fast.backends.contract import Backend, Sums
from densenet_fast.backends.spatial import convolve, convolve_backward, max_pool, max_unpool, pool, unpool

FLOATING = frozenset(d for d in vars(torch).values() if isinstance(d, torch.dtype) and d.is_floating_point)


class Aten(Backend):
    """In torch operations."""

    name = "aten"

    def describe(self) -> str:
        return "torch operations"

    def dtypes(self, device_type: str) -> Collection[torch.dtype]:
        return FLOATING

    def channel_statistics(self, x: Tensor, out: Statistics) -> None:
        """By the corrected two-pass formula (Chan, Golub and LeVeque 1983): the mean of the residuals, zero but for
        rounding, corrects both results. On CPUs the sums are float64's, as stock's are."""
        x = x.to(accumulation_dtype(x.dtype))
        wide = torch.float64 if x.device.type == "cpu" else x.dtype
        mean = x.mean(0)
        residual = x - mean
        correction = residual.mean(0, dtype=wide)
        out.mean.copy_(mean + correction)
        out.var.copy_((residual.square_().mean(0, dtype=wide) - correction.square()).clamp_(min=0))
        torch.add(out.var, out.eps, out=out.rstd).rsqrt_()

    def append_features(
        self,
        new: Tensor,
        out: Tensor,
        statistics: Statistics | None,
        mask: Tensor | None = None,
        keep_scale: float = 1.0,
    ) -> None:
        if mask is not None:
            new = new * mask * keep_scale
        rows = new.movedim(1, -1)
        out.view(rows.shape).copy_(rows)
        if statistics is not None:
            self.channel_statistics(out, statistics)

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
        a = bn_relu(x, affine)
        z = a @ weight.t() if bias is None else torch.addmm(bias, a, weight.t())
        out.copy_(z if then is None else bn_relu(z, then))
        if statistics is not None:
            self.channel_statistics(out, statistics)

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
        if unfinished is not None and unfinished.through is not None:
            grad = self.finalise_gradient(grad, unfinished.through, grad)
        weight_gradient = grad.t() @ bn_relu(x, affine) if need_weight else None
        if grad_x is None and not need_sums:
            return weight_gradient, None
        scaled, sums = _masked(grad @ weight, x, affine)
        if grad_x is not None:
            torch.add(grad_x if source is None else source, scaled, out=grad_x)
        sums = read(sums, affine, reader)
        if completion is not None:
            self.finalise_gradient(grad_x[:, completion.columns], completion.through, completion.out)
        return weight_gradient, sums

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
        y = convolve(x if affine is None else bn_relu(x, affine), weight, bias, grid)
        self.append_features(y, out, statistics, mask, keep_scale)

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
        input_gradient, weight_gradient = convolve_backward(
            grad, bn_relu(x, affine), weight, grid, out is not None, need_weight
        )
        if out is None:
            return weight_gradient, None
        scaled, sums = _masked(input_gradient, x, affine)
        out.copy_(scaled if source is None else source + scaled)
        return weight_gradient, read(sums, affine, reader)

    def finalise_gradient(self, grad: Tensor, through: ThroughStatistics, out: Tensor) -> Tensor:
        x, mean, p, q, count = through
        dtype = accumulation_dtype(x.dtype)
        centred = x.to(dtype) - mean
        return out.copy_(torch.addcmul(p / count, centred, 2 * q / count).add_(grad))

    def bn_relu_pool_conv1x1(
        self,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        bias: Tensor | None,
        grid: tuple[int, ...],
        statistics: Statistics | None,
    ) -> Tensor:
        a = pool(normalise(x, affine).relu_(), grid)
        out = a @ weight.to(a.dtype).t()
        out = (out if bias is None else out + bias).to(x.dtype)
        if statistics is not None:
            self.channel_statistics(out, statistics)
        return out

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
        weight_gradient = grad.t() @ _pooled(x, affine, grid) if need_weight else None
        if not need_input:
            return None, weight_gradient, None
        scaled, sums = _masked(unpool(grad @ weight, grid), x, affine)
        return scaled, weight_gradient, read(sums, affine, reader)

    def bn_relu_maxpool(
        self, x: Tensor, affine: Affine, grid: tuple[int, ...], statistics: Statistics | None
    ) -> tuple[Tensor, Tensor]:
        maxima, argmax = max_pool(normalise(x, affine).relu_(), grid)
        out = maxima.to(x.dtype)
        if statistics is not None:
            self.channel_statistics(out, statistics)
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
        scaled, sums = _masked(max_unpool(grad.to(affine.mean.dtype), argmax, grid), x, affine)
        return scaled, read(sums, affine, reader)

    def bn_relu_global_avgpool(self, x: Tensor, affine: Affine, grid: tuple[int, ...]) -> Tensor:
        return normalise(x, affine).relu_().view(grid[0], -1, x.shape[1]).mean(1).to(x.dtype)

    def bn_relu_global_avgpool_backward(
        self, grad: Tensor, x: Tensor, affine: Affine, grid: tuple[int, ...], reader: Reader | None = None
    ) -> tuple[Tensor, Sums | None]:
        pixels = x.shape[0] // grid[0]
        scaled, sums = _masked((grad.to(affine.mean.dtype) / pixels).repeat_interleave(pixels, 0), x, affine)
        return scaled, read(sums, affine, reader)

    def prepare(self, jobs: Sequence[Job]) -> None:
        copies, rstds, zeros = ([job for job in jobs if job.kind == kind] for kind in ("copy", "rstd", "zero"))
        if len(copies) + len(rstds) + len(zeros) < len(jobs):
            raise ValueError(f"kind: expected copy, rstd or zero, got {[job.kind for job in jobs]}")
        if copies:
            torch._foreach_copy_([job.target for job in copies], [job.source for job in copies])
        if rstds:
            made = torch._foreach_add([job.source.to(job.target.dtype) for job in rstds], [job.eps for job in rstds])
            torch._foreach_rsqrt_(made)
            torch._foreach_copy_([job.target for job in rstds], made)
        if zeros:
            torch._foreach_zero_([job.target for job in zeros])

    def update_running_statistics(self, updates: Sequence[Update]) -> None:
        with torch.no_grad():
            for update in updates:
                _update_running_statistics(*update)


aten = Aten()


def _update_running_statistics(running: Sequence[Running], mean: Tensor, var: Tensor, count: Tensor | int) -> None:
    if len({id(r.mean) for r in running}) < len(running):
        for r in running:
            _update_running_statistics([r], mean, var, count)
        return
    counters = [r.batches for r in running if r.batches is not None]
    if counters:
        torch._foreach_add_(counters, 1)
    unbiased = count / (count - 1) if isinstance(count, Tensor) or count != 1 else torch.inf
    var = var * (unbiased.to(var.dtype) if isinstance(unbiased, Tensor) else unbiased)
    by_momentum: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for r in running:
        columns, momentum = slice(r.start, r.start + r.mean.numel()), r.momentum or 0.0
        if r.momentum is None and r.batches is not None:
            momentum = r.batches.to(mean.dtype).reciprocal()
        targets, values = (r.mean, r.var), (mean[columns], var[columns])
        if isinstance(momentum, Tensor) or not r.mean.dtype == r.var.dtype == mean.dtype:
            for target, value in zip(targets, values):
                target.copy_(torch.lerp(target.to(mean.dtype), value, momentum))
        else:
            ours, batch = by_momentum.setdefault(momentum, ([], []))
            ours += targets
            batch += values
    for momentum, (ours, batch) in by_momentum.items():
        torch._foreach_lerp_(ours, batch, momentum)


def _masked(grad: Tensor, x: Tensor, affine: Affine) -> tuple[Tensor, Sums]:
    """scale * D in x's dtype with D = grad * (bn(x) > 0), and the column sums (sum D, sum D * (x - mean)). Where bn(x)
    is NaN, D = grad, as in stock's ReLU."""
    d = grad.to(affine.mean.dtype) * ~(normalise(x, affine) <= 0)
    sums = d.sum(0), (d * (x.to(d.dtype) - affine.mean)).sum(0)
    return d.mul_(affine.scale).to(x.dtype), sums


def _pooled(x: Tensor, affine: Affine, grid: tuple[int, ...]) -> Tensor:
    return pool(normalise(x, affine).relu_(), grid).to(x.dtype)
