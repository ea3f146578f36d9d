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

from densenet_fast.backends.affine import Affine, accumulation_dtype
from densenet_fast.backends.layout import as_output

STAGE_TENSORS = 6
"""Tensors of a stage in an op's flat list; an absent one is an empty tensor."""


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

    def convolution(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The convolution's weight and bias in ``dtype``."""
        return self.conv_weight.to(dtype), None if self.conv_bias is None else self.conv_bias.to(dtype)

    def fold(self, mean: Tensor, var: Tensor) -> tuple[Affine, Tensor]:
        """The vectors that normalise the input, and r; ``mean`` and ``var`` are the batch's, in accumulation dtype."""
        if self.frozen:
            mean, var = self.running_mean.to(mean.dtype), self.running_var.to(mean.dtype)
        r = torch.rsqrt(var + self.eps)
        scale = r if self.weight is None else self.weight * r
        shift = torch.zeros_like(r) if self.bias is None else self.bias.to(r.dtype)
        return Affine(mean.contiguous(), scale.contiguous(), shift.contiguous()), r


def pack(stages: Sequence[Stage], like: Tensor) -> tuple[list[Tensor], list[float]]:
    """The flat tensor list and the epsilons of ``stages``, on the device of ``like``."""
    tensors = [like.new_empty(0) if t is None else t for stage in stages for t in stage[:STAGE_TENSORS]]
    return tensors, [stage.eps for stage in stages]


def unpack(tensors: Sequence[Tensor], eps: Sequence[float]) -> list[Stage]:
    """The stages that :func:`pack` flattened."""
    present = [t if t.numel() else None for t in tensors]
    return [Stage(*present[i * STAGE_TENSORS : (i + 1) * STAGE_TENSORS], e) for i, e in enumerate(eps)]


class StageGradients:
    """The gradients of one stage's tensors, as far as they are needed."""

    def __init__(self, stage: Stage, needs: Sequence[bool]) -> None:
        self.stage = stage
        self.needs_weight, self.needs_bias, _, _, self.needs_conv_weight, self.needs_conv_bias = needs
        self.needs_norm = self.needs_weight or self.needs_bias
        self.needs_any = any(needs)
        self._gradients: list[Tensor | None] = [None] * STAGE_TENSORS

    def norm(self, sums: tuple[Tensor, Tensor], r: Tensor) -> None:
        """From (sum D, sum D * (F - mu)): db = sum D, dg = r * sum D * (F - mu)."""
        if self.needs_weight:
            self._gradients[0] = (r * sums[1]).to(self.stage.weight.dtype)
        if self.needs_bias:
            self._gradients[1] = sums[0].to(self.stage.bias.dtype, copy=True)

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

    def tensors(self, like: Tensor) -> list[Tensor]:
        """One gradient per packed tensor, empty where it was not needed."""
        return [like.new_empty(0) if g is None else g for g in self._gradients]


def statistics_gradient(sums: tuple[Tensor, Tensor], scale: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """What one reader adds to P and Q (2): P -= s * sum D, Q -= s * r^2 * sum D * (F - mu) / 2."""
    return -scale * sums[0], -0.5 * scale * r * r * sums[1]


def global_count(rows: int, like: Tensor, group: str | None) -> Tensor:
    """Rows M of the whole batch, over all processes of ``group``, as a float64 scalar."""
    count = torch.full((), rows, dtype=torch.float64, device=like.device)
    if group is not None:
        dist.all_reduce(count, group=_process_group(group))
    return count


def global_statistics(statistics: tuple[Tensor, Tensor], rows: int, group: str | None) -> tuple[Tensor, Tensor]:
    """Mean and variance over all processes of ``group``, from this one's over ``rows`` rows; combined in rank order."""
    if group is None:
        return statistics
    mean, var = statistics
    shard = torch.cat([mean, var, mean.new_tensor([rows])])
    process_group = _process_group(group)
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(shards, shard, group=process_group)
    means, variances, counts = torch.stack(shards).split([mean.numel(), mean.numel(), 1], dim=1)
    weights = counts / counts.sum()
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0)


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
