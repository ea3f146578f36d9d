"""One BN-ReLU-convolution, or BN-ReLU alone, as the ops take it, and the vector work between kernels.

The letters are the design's: F features, mu and v mean and variance of a column, r = rsqrt(v + eps), s = weight * r,
P and Q the gradients with respect to mu and v, D the gradient behind the ReLU's mask.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from densenet_fast.backends.affine import Affine, Statistics, accumulation_dtype
from densenet_fast.backends.layout import as_output

STAGE_TENSORS = 6
"""Tensors of a stage in a flat list."""


class Stage(NamedTuple):
    """BN-ReLU-convolution: its BatchNorm's and its convolution's tensors, None where absent; both of the convolution's
    for BN-ReLU alone.

    With running statistics the BatchNorm normalises by them (it is frozen), without by the batch's.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    eps: float

    @property
    def frozen(self) -> bool:
        return self.running_mean is not None


def convolutions(stages: Sequence[Stage], dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
    """The convolutions' weights and biases in ``dtype``, converted all at once."""
    given = [t for stage in stages for t in (stage.conv_weight, stage.conv_bias) if t is not None and t.dtype != dtype]
    converted = [torch.empty_like(t, dtype=dtype) for t in given]
    if given:
        torch._foreach_copy_(converted, given)
    by_id = dict(zip(map(id, given), converted))
    return [tuple(by_id.get(id(t), t) for t in (stage.conv_weight, stage.conv_bias)) for stage in stages]


def affines(stages: Sequence[Stage], statistics: Sequence[Statistics]) -> list[tuple[Affine, Tensor]]:
    """What normalises each stage's input, and its r, all at once; ``statistics`` are the batch's, for each stage."""
    dtype = statistics[0].mean.dtype
    means = [stage.running_mean.to(dtype) if stage.frozen else own.mean for stage, own in zip(stages, statistics)]
    rs = [own.rstd for own in statistics]
    apart = [i for i, stage in enumerate(stages) if stage.frozen or stage.eps != statistics[i].eps]
    if apart:
        variances = [stages[i].running_var.to(dtype) if stages[i].frozen else statistics[i].var for i in apart]
        shifted = torch._foreach_add(variances, [stages[i].eps for i in apart])
        torch._foreach_rsqrt_(shifted)
        for i, r in zip(apart, shifted):
            rs[i] = r
    scales, scaled = list(rs), [i for i, stage in enumerate(stages) if stage.weight is not None]
    if scaled:
        products = torch._foreach_mul([stages[i].weight for i in scaled], [rs[i] for i in scaled])
        for i, scale in zip(scaled, products):
            scales[i] = scale
    shifts = [torch.zeros_like(r) if stage.bias is None else stage.bias.to(dtype) for stage, r in zip(stages, rs)]
    return [(Affine(*(v.contiguous() for v in vectors)), r) for *vectors, r in zip(means, scales, shifts, rs)]


def flatten(stages: Sequence[Stage]) -> tuple[list[Tensor | None], list[float]]:
    """The tensors of ``stages`` in a list, and their epsilons."""
    return [t for stage in stages for t in stage[:STAGE_TENSORS]], [stage.eps for stage in stages]


def present(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """``tensors`` with an empty one, on the device of ``like``, for each that is absent: what an op's list can hold."""
    empty = like.new_empty(0)
    return [empty if t is None else t for t in tensors]


def unflatten(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> list[Stage]:
    """The stages of flattened ``tensors``, of which those that are absent are None or empty."""
    tensors = [None if t is None or t.numel() == 0 else t for t in tensors]
    return [Stage(*tensors[i * STAGE_TENSORS : (i + 1) * STAGE_TENSORS], e) for i, e in enumerate(eps)]


class StageGradients:
    """The gradients of one stage's tensors, as far as they are needed."""

    def __init__(self, stage: Stage, needs: Sequence[bool]) -> None:
        self.stage = stage
        self.needs_weight, self.needs_bias, _, _, self.needs_conv_weight, self.needs_conv_bias = needs
        self.needs_norm = self.needs_weight or self.needs_bias
        self.needs_any = any(needs)
        self._gradients: list[Tensor | None] = [None] * STAGE_TENSORS
        self.sums: tuple[Tensor, Tensor] | None = None
        """(sum D, sum D * (F - mu)), if the normalisation's gradients or the input's are needed."""

    def convolution(self, weight: Tensor | None, grad_output: Tensor) -> None:
        """From the weight's gradient and the output's gradient matrix [M, out_channels]."""
        if self.needs_conv_weight:
            like = self.stage.conv_weight
            own = weight.view(like.shape)
            if own.dtype == like.dtype and own.stride() == like.stride():
                self._gradients[4] = as_output(own)
            else:
                self._gradients[4] = torch.empty_like(like).copy_(own)
        if self.needs_conv_bias:
            total = grad_output.sum(0, dtype=accumulation_dtype(grad_output.dtype))
            self._gradients[5] = total.to(self.stage.conv_bias.dtype)

    def norm(self, weight: Tensor, bias: Tensor) -> None:
        """Takes the gradients of the normalisation's weight and bias, as far as they are needed."""
        if self.needs_weight:
            self._gradients[0] = weight.to(self.stage.weight.dtype)
        if self.needs_bias:
            self._gradients[1] = bias.to(self.stage.bias.dtype)

    def tensors(self) -> list[Tensor | None]:
        """One gradient per tensor of the stage, None where it was not needed."""
        return self._gradients


def norm_gradients(gradients: Sequence[StageGradients], rs: Sequence[Tensor]) -> None:
    """db = sum D and dg = r * sum D * (F - mu) of every stage that needs them, all at once."""
    needed = [(g, r) for g, r in zip(gradients, rs) if g.needs_norm and g.sums is not None]
    if needed:
        weights = torch._foreach_mul([g.sums[1] for g, _ in needed], [r for _, r in needed])
        biases = torch._foreach_mul([g.sums[0] for g, _ in needed], 1)
        for (g, _), weight, bias in zip(needed, weights, biases):
            g.norm(weight, bias)


def through_statistics(normalised: Sequence[tuple[Affine, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """By what :func:`add_reader` multiplies a stage's two sums, of all stages at once: s and s * r^2."""
    scales, rs = [affine.scale for affine, _ in normalised], [r for _, r in normalised]
    return list(zip(scales, torch._foreach_mul(torch._foreach_mul(scales, rs), rs)))


def add_reader(sums: tuple[Tensor, Tensor], factors: tuple[Tensor, Tensor], p: Tensor, q: Tensor) -> None:
    """What one reader adds to P and Q (2): P -= s * sum D, Q -= s * r^2 * sum D * (F - mu) / 2."""
    p.addcmul_(factors[0], sums[0], value=-1)
    q.addcmul_(factors[1], sums[1], value=-0.5)


def global_count(rows: int, like: Tensor, group: str | None) -> Tensor:
    """Rows M of the whole batch, over all processes of ``group``, as a float64 scalar."""
    count = torch.full((), rows, dtype=torch.float64, device=like.device)
    if group is not None:
        dist.all_reduce(count, group=_process_group(group))
    return count


def synchronise(statistics: Statistics | None, rows: int, group: str | None) -> None:
    """Makes this process's statistics, over ``rows`` rows, those of all processes of ``group``; combined in rank
    order. Nothing to do without statistics or group."""
    if statistics is None or group is None:
        return
    mean, var, rstd, eps = statistics
    shard = torch.cat([mean, var, mean.new_full((1,), rows)])
    process_group = _process_group(group)
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(shards, shard, group=process_group)
    means, variances, counts = torch.stack(shards).split([mean.numel(), mean.numel(), 1], dim=1)
    weights = counts / counts.sum()
    mean.copy_((weights * means).sum(0))
    var.copy_((weights * (variances + (means - mean).square())).sum(0))
    torch.add(var, eps, out=rstd).rsqrt_()


def global_sum(p: Tensor, q: Tensor, group: str | None) -> tuple[Tensor, Tensor]:
    """p and q summed over all processes of ``group``."""
    if group is None:
        return p, q
    both = torch.stack([p, q])
    dist.all_reduce(both, group=_process_group(group))
    return both[0], both[1]


def _process_group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on ``device``, None where it is off."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def without_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Runs an op's body, whose first argument is a tensor, in the dtypes it was given."""

    @functools.wraps(function)
    def body(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if autocast_dtype(args[0].device) is None:
            return function(*args, **kwargs)
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return body
