"""A stage (BN-ReLU-convolution, or BN-ReLU alone) as the ops take it, and the vector work between kernels.

F are the features, mu and v the mean and variance of a column, r = rsqrt(v + eps), s = weight * r. P and Q are the
gradients with respect to mu and v, D is the gradient behind the mask of the ReLU.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from densenet_fast.backends.affine import Affine, Job, Reader, Statistics, accumulation_dtype
from densenet_fast.backends.contract import Backend
from densenet_fast.backends.inputs import Fixed
from densenet_fast.backends.layout import as_output

Pair = tuple[Tensor, Tensor]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
Value = TypeVar("Value")

STAGE_TENSORS = 6
"""The number of a stage's tensors in a flat list."""

_requires_grad = operator.attrgetter("requires_grad")


class Stage(NamedTuple):
    """BN-ReLU-convolution: the tensors of its BatchNorm and of its convolution.

    An absent tensor is None; BN-ReLU alone has no convolution. With running statistics the BatchNorm is frozen: it
    normalises by them. Without, it normalises by the batch.
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


class Prepared:
    """What the kernels of one op read besides feature maps: statistics, rstds, weights. :meth:`done` makes all of it by
    one launch.

    ``weights`` are (weight, bias) of each stage's convolution, in ``dtype``. A weight that has that dtype already is
    not copied.
    """

    def __init__(self, stages: Sequence[Stage], backend: Backend, like: Tensor) -> None:
        self.stages, self.backend, self.dtype = stages, backend, like.dtype
        self.vector_dtype = accumulation_dtype(like.dtype)
        self.jobs: list[Job] = []
        self.weights = [(self._weight(stage.conv_weight), self._bias(stage.conv_bias)) for stage in stages]
        self._frozen_rstds = {j: self._frozen_rstd(stage) for j, stage in enumerate(stages) if stage.frozen}

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.jobs.append(Job("copy", target, source))

    def rstd(self, target: Tensor, variance: Tensor, eps: float) -> None:
        self.jobs.append(Job("rstd", target, variance, eps))

    def zero(self, target: Tensor) -> None:
        self.jobs.append(Job("zero", target))

    def done(self) -> None:
        """Does all that was asked for so far."""
        if self.jobs:
            self.backend.prepare(self.jobs)
        self.jobs = []

    def affine(self, j: int, own: Statistics) -> Affine:
        """Returns what normalises the input of stage j. ``own`` are the batch statistics of that input."""
        stage = self.stages[j]
        if stage.frozen:
            mean, rstd = self._vector(stage.running_mean), self._frozen_rstds[j]
        else:
            mean, rstd = own.mean, own.rstd
            if stage.eps != own.eps:
                rstd = torch.empty_like(rstd)
                self.rstd(rstd, own.var, stage.eps)
        bias = self._zeros(rstd) if stage.bias is None else stage.bias.contiguous()
        self.done()
        return Affine(mean, rstd, bias, None if stage.weight is None else stage.weight.contiguous())

    def _weight(self, weight: Tensor | None) -> Tensor | None:
        if weight is None:
            return None
        taps_first = self.backend.TAPS_FIRST and weight.dim() == 4 and weight.shape[-1] == 3
        layout = torch.channels_last if taps_first else torch.preserve_format
        if weight.dtype == self.dtype and (not taps_first or weight.is_contiguous(memory_format=layout)):
            return weight
        made = torch.empty_like(weight, dtype=self.dtype, memory_format=layout)
        self.copy(made, weight)
        return made

    def _bias(self, bias: Tensor | None) -> Tensor | None:
        if bias is None or bias.dtype == self.dtype:
            return bias
        made = torch.empty_like(bias, dtype=self.dtype)
        self.copy(made, bias)
        return made

    def _frozen_rstd(self, stage: Stage) -> Tensor:
        made = torch.empty_like(stage.running_var, dtype=self.vector_dtype)
        self.rstd(made, stage.running_var, stage.eps)
        return made

    def _vector(self, vector: Tensor) -> Tensor:
        if vector.dtype == self.vector_dtype:
            return vector.contiguous()
        made = torch.empty_like(vector, dtype=self.vector_dtype)
        self.copy(made, vector)
        return made

    def _zeros(self, like: Tensor) -> Tensor:
        made = torch.empty_like(like)
        self.zero(made)
        return made


class RequiringGrad:
    """The tensors of some stages that require a gradient, and their ``places`` in the flat list of ``count``
    tensors."""

    def __init__(self, places: list[int], tensors: list[Tensor], count: int) -> None:
        self.places, self.tensors, self.count = places, tensors, count
        self._needs: dict[tuple[bool, ...], list[bool]] = {}

    def needs(self, given: tuple[bool, ...]) -> list[bool]:
        """Returns whether a gradient is needed: of x, of mean and var, and of each tensor in the flat list.

        ``given`` says so of x, of mean, of var and of the tensors that require a gradient: autograd's
        ``needs_input_grad``.
        """
        found = self._needs.get(given)
        if found is None:
            x, mean, _, *required = given
            tensors = [False] * self.count
            for place, need in zip(self.places, required):
                tensors[place] = need
            if len(self._needs) >= 16:
                self._needs.clear()
            found = self._needs[given] = Fixed([x, mean, *tensors])
        return found

    def of_those(self, tensors: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
        """Picks, from one value per tensor in the flat list, those of the tensors that require a gradient."""
        return map(tensors.__getitem__, self.places)


class Stages(tuple[Stage, ...]):
    """The stages of one op. ``tensors`` is the flat list of their tensors, None where one is absent; ``eps`` has one
    per stage."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        self.tensors = Fixed(t for stage in self for t in stage[:STAGE_TENSORS])
        self.eps = Fixed(stage.eps for stage in self)
        self._places = [i for i, t in enumerate(self.tensors) if t is not None]
        self._present = [self.tensors[i] for i in self._places]
        self._last: tuple[list[bool], RequiringGrad] | None = None

    def requiring_grad(self) -> RequiringGrad:
        """The tensors that require a gradient now."""
        flags, last = [*map(_requires_grad, self._present)], self._last
        if last is None or last[0] != flags:
            places = [i for i, flag in zip(self._places, flags) if flag]
            last = self._last = flags, RequiringGrad(places, [self.tensors[i] for i in places], len(self.tensors))
        return last[1]


def none_as_empty(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Replaces None in ``tensors`` by an empty tensor on the device of ``like``: the dispatcher's lists cannot hold
    None."""
    empty = like.new_empty(0)
    return [empty if t is None else t for t in tensors]


def unflatten(tensors: Sequence[Tensor | None], eps: Sequence[float]) -> list[Stage]:
    """The stages of flattened ``tensors``; an absent tensor is None or empty."""
    tensors = [None if t is None or t.numel() == 0 else t for t in tensors]
    return [Stage(*tensors[i * STAGE_TENSORS : (i + 1) * STAGE_TENSORS], e) for i, e in enumerate(eps)]


def by_stage(values: Sequence[Value], stages: int, absent: Value) -> list[Value]:
    """Returns one value per stage.

    ``values`` has one per stage, or one per layer of two stages, which is that of the second, or none. ``absent`` fills
    the gaps.
    """
    if not values:
        return [absent] * stages
    return [*values] if len(values) == stages else [v for value in values for v in (absent, value)]


def save_stages(ctx: Any, tensors: list[Tensor | None]) -> Sequence[Tensor | None]:
    """Returns the tensors that ``ctx`` has to save so that :func:`saved_stages` can return the flat list
    ``tensors``."""
    ctx.stages = tensors if type(tensors) is Fixed else None
    return tensors if ctx.stages is None else ctx.stages.saved()


def saved_stages(ctx: Any, saved: list[Tensor | None]) -> list[Tensor | None]:
    """Returns an op's flat list, from the tensors that were ``saved``."""
    return saved if ctx.stages is None else ctx.stages.restored(saved)


class StageGradients:
    """The gradients of one stage's tensors, as far as they are needed."""

    def __init__(self, stage: Stage, needs: Sequence[bool]) -> None:
        self.stage = stage
        self.needs_weight, self.needs_bias, _, _, self.needs_conv_weight, self.needs_conv_bias = needs
        self.needs_norm = self.needs_weight or self.needs_bias
        self.needs_any = any(needs)
        empty = torch.empty_like
        self.weight = empty(stage.weight) if self.needs_weight else None
        """The gradient of the normalisation's weight. The kernel that computes the sums writes it, and that of the
        bias."""
        self.bias = empty(stage.bias) if self.needs_bias else None
        self._convolution: tuple[Tensor | None, Tensor | None] = None, None

    def reader(self, before: Pair | None, after: Pair | None) -> Reader:
        """Where the kernel that computes the sums writes. P and Q go to ``after``, unless the normalisation is
        frozen."""
        return Reader(before, None if self.stage.frozen else after, self.weight, self.bias)

    def convolution(self, weight: Tensor | None, grad_output: Tensor) -> None:
        """Takes the gradient of the convolution's weight, and the gradient of its output [M, out_channels] for that of
        its bias."""
        bias = None
        if self.needs_conv_weight:
            like = self.stage.conv_weight
            view = weight.view(like.shape)
            if weight.dtype != like.dtype or not _laid_out_alike(view, like):
                weight = torch.empty_like(like).copy_(view)
            elif weight.shape != like.shape or weight._is_view() or weight.stride() != like.stride():
                weight = as_output(view, like.stride())
        if self.needs_conv_bias:
            total = grad_output.sum(0, dtype=accumulation_dtype(grad_output.dtype))
            bias = total.to(self.stage.conv_bias.dtype)
        self._convolution = weight if self.needs_conv_weight else None, bias

    def tensors(self) -> list[Tensor | None]:
        """Returns one gradient per tensor of the stage, None where it is not needed."""
        return [self.weight, self.bias, None, None, *self._convolution]


def _laid_out_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have equal strides in all dimensions larger than one."""
    return all(size == 1 or i == j for size, i, j in zip(a.shape, a.stride(), b.stride()))


def global_count(rows: int, like: Tensor, group: str | None) -> Tensor:
    """The number of rows M of the whole batch over all processes of ``group``, a float64 scalar. Without a group it is
    empty."""
    if group is None:
        return like.new_empty(0, dtype=torch.float64)
    count = torch.full((), rows, dtype=torch.float64, device=like.device)
    dist.all_reduce(count, group=_process_group(group))
    return count


def rows_of(count: Tensor, rows: int) -> Tensor | int:
    """The number of rows that statistics are computed over. ``count`` is from :func:`global_count`, ``rows`` are this
    process's."""
    return count if count.numel() else rows


def synchronise(statistics: Statistics | None, rows: int, group: str | None) -> None:
    """Turns the statistics of this process, over its ``rows``, into those of all processes of ``group``.

    They are combined in the order of the ranks. Without statistics or without a group nothing happens.
    """
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
    """The sums of p and q over all processes of ``group``."""
    if group is None:
        return p, q
    both = torch.stack([p, q])
    dist.all_reduce(both, group=_process_group(group))
    return both[0], both[1]


def _process_group(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast uses on ``device``, None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else None


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def without_autocast(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorates the body of an op, whose first argument is a tensor, so that autocast does not change its dtypes."""

    @functools.wraps(function)
    def body(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if autocast_dtype(args[0].device) is None:
            return function(*args, **kwargs)
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return body
