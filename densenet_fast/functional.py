"""The fused ops as functions: what ``torch.nn.functional`` is to ``torch.nn``.

Like ``torch.nn.functional.batch_norm`` they update the running statistics they are given in place, once per call, with
the unbiased variance. All take and return feature maps [N, C, *spatial] with 1, 2 or 3 spatial dimensions, in any
memory format, and return channels-last memory. Under autocast those with a convolution run in its dtype.

Each has a second form, ``run_...``, for the modules: it takes operands that were gathered before, and that it checks
once for each kind of input.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from densenet_fast import inference, ops
from densenet_fast.backends import aten, select
from densenet_fast.backends.affine import Update, accumulation_dtype
from densenet_fast.backends.layout import CHANNELS_LAST
from densenet_fast.operands import BatchNorm, BlockOperands, BNReLUConv, ConvOperands, NormOperands, Operands, check
from densenet_fast.ops import planned, stock
from densenet_fast.ops.chain import HEAD, TRANSITION, Call
from densenet_fast.ops.op import saved_tensors_are_looked_at, seen_by_dispatcher
from densenet_fast.ops.stage import autocast_dtype, global_count, rows_of, without_autocast
from densenet_fast.reference import dropout_mask

__all__ = [
    "BatchNorm",
    "BatchStatistics",
    "BNReLUConv",
    "bn_conv1x1_avgpool",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_avgpool",
    "bn_relu_global_avgpool",
    "bn_relu_maxpool",
    "dense_block",
]


class BatchStatistics(NamedTuple):
    """A feature map's mean and biased variance over its batch and pixels, [C] each, in float32 (float64 for float64):
    over this process's batch, or over those of all processes of ``group``, a group's name."""

    mean: Tensor
    var: Tensor
    group: str | None = None


class Updates:
    """Updates of running statistics that wait, to be made by one call: a call takes longer than a normalisation; and
    the ``room`` that parts which run one after the other have for their feature maps."""

    def __init__(self) -> None:
        self.room = inference.Room()
        self._like: tuple[torch.device, torch.dtype] | None = None
        self._waiting: list[Update] = []

    def add(self, x: Tensor, update: Update) -> None:
        """One that belongs to an op on x."""
        like = x.device, x.dtype
        if like != self._like:
            self.make()
            self._like = like
        self._waiting.append(update)

    def make(self) -> None:
        """Makes those that wait, in their order."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            _make(*self._like, waiting)


def bn_relu_conv1x1(
    x: Tensor,
    norm: BatchNorm,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    statistics: BatchStatistics | None = None,
) -> Tensor:
    """``conv(relu(batch_norm(x)), weight, bias)`` with a 1x1 convolution, saving ``x`` alone for the backward pass.

    Pleiss et al., "Memory-Efficient Implementation of DenseNets" (https://arxiv.org/abs/1707.06990), section 3.

    Args:
        x: [N, C, *spatial], floating.
        norm: the batch normalisation, of C channels.
        weight: [C', C, 1, ...], of x's dtype unless autocast is on.
        bias: [C'] or None.
        statistics: x's, as the function that made x returned them; else they are computed where they are needed.

    Returns:
        [N, C', *spatial].

    Raises:
        ValueError: x has the wrong number of dimensions, or one value per channel where the batch is normalised.
        RuntimeError: channels, kernel size, dtypes or devices do not match.
    """
    operands = ConvOperands(BNReLUConv(norm, weight, bias))
    return _bn_relu_conv1x1(x, operands, operands.check, False, statistics, False)[0]


def bn_relu_conv1x1_avgpool(
    x: Tensor,
    norm: BatchNorm,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    statistics: BatchStatistics | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, BatchStatistics]:
    """The transition: ``avg_pool(conv(relu(batch_norm(x)), weight, bias), 2)``, pooling first, which is the same.

    Arguments and errors as for :func:`bn_relu_conv1x1`. Returns [N, C', *spatial // 2]; with ``return_statistics`` also
    its statistics, for a dense block that reads it.
    """
    _check_poolable(x)
    operands = ConvOperands(BNReLUConv(norm, weight, bias))
    out, own = _bn_relu_conv1x1(x, operands, operands.check, True, statistics, return_statistics)
    return (out, own) if return_statistics else out


def run_bn_relu_conv1x1(
    x: Tensor, operands: ConvOperands, statistics: BatchStatistics | None = None, updates: Updates | None = None
) -> Tensor:
    """:func:`bn_relu_conv1x1`."""
    return _bn_relu_conv1x1(x, operands, operands.admit, False, statistics, False, updates)[0]


def run_bn_relu_conv1x1_avgpool(
    x: Tensor,
    operands: ConvOperands,
    statistics: BatchStatistics | None = None,
    describe: bool = False,
    updates: Updates | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    """:func:`bn_relu_conv1x1_avgpool`, with its result's statistics if it is to be described."""
    _check_poolable(x)
    return _bn_relu_conv1x1(x, operands, operands.admit, True, statistics, describe, updates)


def _check_poolable(x: Tensor) -> None:
    check(x.dim() < 3 or min(x.shape[2:]) >= 2, RuntimeError, "x", "spatial sizes of at least 2", tuple(x.shape))


def _bn_relu_conv1x1(
    x: Tensor,
    operands: ConvOperands,
    check_input: Callable[[Tensor], None],
    pool: bool,
    statistics: BatchStatistics | None,
    describe: bool,
    updates: Updates | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    x, statistics = _autocast(x, statistics)
    check_input(x)
    if pool and not describe:
        made = inference.transition(x, operands, _room(updates))
        if made is not None:
            return made, None
    group = operands.group()
    mean, var = _known(x, operands.reader, statistics, group)
    outputs = ops.bn_relu_conv1x1(x, mean, var, operands.stages, pool, describe, group)
    if _beyond_range(x, outputs[2], group):
        convolve = stock.bn_relu_conv_pool if pool else stock.bn_relu_conv
        outputs = _on_stock(convolve, x, *operands.stages, None, None)
    _update_running_statistics(x, operands, *outputs[1:4], updates)
    return outputs[0], BatchStatistics(*outputs[4:6]) if describe else None


def bn_conv1x1_avgpool(
    x: Tensor,
    norm: BatchNorm,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    statistics: BatchStatistics | None = None,
) -> Tensor:
    """The transition without ReLU: ``avg_pool(conv(batch_norm(x), weight, bias), 2)``, pooling first.

    Saved for the backward pass: ``x`` and its centred mean over the windows. Arguments, result and errors as for
    :func:`bn_relu_conv1x1_avgpool`; a RuntimeError too if the batch is normalised over several processes.
    """
    _check_poolable(x)
    operands = ConvOperands(BNReLUConv(norm, weight, bias))
    return _bn_conv1x1_avgpool(x, operands, operands.check, statistics)


def run_bn_conv1x1_avgpool(
    x: Tensor, operands: ConvOperands, statistics: BatchStatistics | None = None, updates: Updates | None = None
) -> Tensor:
    """:func:`bn_conv1x1_avgpool`."""
    _check_poolable(x)
    return _bn_conv1x1_avgpool(x, operands, operands.admit, statistics, updates)


def _bn_conv1x1_avgpool(
    x: Tensor,
    operands: ConvOperands,
    check_input: Callable[[Tensor], None],
    statistics: BatchStatistics | None,
    updates: Updates | None = None,
) -> Tensor:
    x, statistics = _autocast(x, statistics)
    check_input(x)
    group, (stage,) = operands.group(), operands.stages
    check(group is None, RuntimeError, "norm.group", "batch statistics of one process", group)
    out, mean, var = ops.bn_conv1x1_avgpool(x, *_known(x, operands.reader, statistics, group), stage)
    mean, var, count = mean.detach(), var.detach(), global_count(0, x, None)
    if _beyond_range(x, var, group):
        out, mean, var, count, *_ = _on_stock(stock.bn_conv_pool, x, stage, None, None)
    _update_running_statistics(x, operands, mean, var, count, updates)
    return out


def bn_relu_maxpool(
    x: Tensor, norm: BatchNorm, *, return_statistics: bool = False
) -> Tensor | tuple[Tensor, BatchStatistics]:
    """The stem behind its convolution: ``max_pool(relu(batch_norm(x)), 3, stride=2, padding=1)``.

    Huang et al., "Densely Connected Convolutional Networks" (https://arxiv.org/abs/1608.06993), table 1. Saved for the
    backward pass: ``x`` and one byte for each value of the result.

    Args:
        x: [N, C, *spatial], floating.
        norm: the batch normalisation, of C channels.
        return_statistics: whether to return the result's statistics too, for a dense block that reads it.

    Returns:
        [N, C, *(spatial + 1) // 2], of x's dtype.

    Raises:
        ValueError: x has the wrong number of dimensions, or one value per channel where the batch is normalised.
        RuntimeError: channels, dtypes or devices do not match.
    """
    operands = NormOperands(norm)
    operands.check(x)
    out, own = _bn_relu_maxpool(x, operands, return_statistics)
    return (out, own) if return_statistics else out


def run_bn_relu_maxpool(
    x: Tensor, operands: NormOperands, describe: bool, updates: Updates | None = None
) -> tuple[Tensor, BatchStatistics | None]:
    """:func:`bn_relu_maxpool`, with its result's statistics if it is to be described."""
    operands.admit(x)
    return _bn_relu_maxpool(x, operands, describe, updates)


def run_stem(images: Tensor, convolution: nn.Module, operands: NormOperands, updates: Updates | None) -> Tensor | None:
    """:func:`bn_relu_maxpool` of what a plain ``convolution`` makes of the images, as one call; None where they have to
    be called one after the other: where this is not inference, or the convolution is of an unusual kind."""
    return inference.stem(images, convolution, operands, _room(updates))


def _room(updates: Updates | None) -> inference.Room | None:
    return None if updates is None else updates.room


def _bn_relu_maxpool(
    x: Tensor, operands: NormOperands, describe: bool, updates: Updates | None = None
) -> tuple[Tensor, BatchStatistics | None]:
    group = operands.group()
    outputs = ops.bn_relu_maxpool(x, None, None, operands.stages, describe, group)
    if _beyond_range(x, outputs[2], group):
        out, *own = _on_stock(stock.bn_relu_maxpool, x, *operands.stages, None, None)
        outputs = (out, *own[:3], None, *own[3:])
    _update_running_statistics(x, operands, *outputs[1:4], updates)
    return outputs[0], BatchStatistics(*outputs[5:7]) if describe else None


def bn_relu_global_avgpool(x: Tensor, norm: BatchNorm, *, statistics: BatchStatistics | None = None) -> Tensor:
    """The head before its classifier: ``relu(batch_norm(x))``, averaged over all pixels of each image; saves ``x``
    alone for the backward pass.

    ``statistics`` are x's, as the dense block that made x returned them. Other arguments, source and errors as for
    :func:`bn_relu_maxpool`. Returns [N, C], of x's dtype.
    """
    operands = NormOperands(norm)
    operands.check(x)
    return _bn_relu_global_avgpool(x, operands, statistics)


def run_bn_relu_global_avgpool(
    x: Tensor, operands: NormOperands, statistics: BatchStatistics | None, updates: Updates | None = None
) -> Tensor:
    """:func:`bn_relu_global_avgpool`."""
    operands.admit(x)
    return _bn_relu_global_avgpool(x, operands, statistics, updates)


def _bn_relu_global_avgpool(
    x: Tensor, operands: NormOperands, statistics: BatchStatistics | None, updates: Updates | None = None
) -> Tensor:
    made = inference.global_avgpool(x, operands)
    if made is not None:
        return made
    group = operands.group()
    known = _known(x, operands.reader, statistics, group)
    outputs = ops.bn_relu_global_avgpool(x, *known, operands.stages, group)
    if _beyond_range(x, outputs[2], group):
        outputs = _on_stock(stock.bn_relu_global_avgpool, x, *operands.stages, None, None)
    _update_running_statistics(x, operands, *outputs[1:4], updates)
    return outputs[0]


def dense_block(
    x: Tensor,
    layers: Sequence[Sequence[BNReLUConv]],
    drop_rates: Sequence[float] | None = None,
    memory_efficient: bool | Sequence[bool] = False,
    *,
    drop_channels: bool = False,
    prepend: bool = False,
    statistics: BatchStatistics | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, BatchStatistics]:
    """A dense block: each layer reads x and all features made before it, and appends its own.

    Saved for the backward pass: the result and the output of each bottleneck; with ``memory_efficient`` the result
    alone, the bottlenecks being recomputed. On CPUs those are recomputed always that have more channels than their
    layers read: they are the cheapest to recompute.

    Args:
        x: [N, C0, *spatial], floating.
        layers: at least one; each (1x1 unit, 3x3 unit), or in every layer (3x3 unit,) for no bottleneck. Convolutions
            of stride 1, the 3x3 ones padded by 1; weights of x's dtype unless autocast is on.
        drop_rates: the rate at which each layer's new features are dropped, [len(layers)], or at which what each unit's
            convolution makes is, in the order of the units; None for no dropout. Masks come from torch's default
            generator: in training, the ones that ``F.dropout`` draws on contiguous memory.
        memory_efficient: whether to recompute the bottlenecks in the backward pass: of all layers or, [len(layers)],
            of each.
        drop_channels: whether dropout takes whole channels of an image, as ``F.dropout2d`` does, instead of values.
        prepend: whether each layer's features come before those that it reads, ``torch.cat([new, x], 1)``, instead of
            behind them.
        statistics: x's, as the function that made x returned them; else they are computed where they are needed.
        return_statistics: whether to return the result's statistics too, for a transition or head that reads it. They
            are differentiable, and the pass over the features that its gradient would take is saved.

    Returns:
        [N, C0 + sum of the layers' new channels, *spatial].

    Raises:
        ValueError: no or unlike layers, not one rate or flag for each, x has the wrong number of dimensions, or one
            value per channel where the batch is normalised.
        RuntimeError: channels, kernel sizes, dtypes or devices do not match.
    """
    operands = BlockOperands(layers, drop_rates, memory_efficient, drop_channels, prepend)
    features, own = _dense_block(x, operands, operands.check, statistics, return_statistics)
    return (features, own) if return_statistics else features


def run_dense_block(
    x: Tensor,
    operands: BlockOperands,
    statistics: BatchStatistics | None = None,
    describe: bool = False,
    updates: Updates | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    """:func:`dense_block`, with its result's statistics if it is to be described."""
    return _dense_block(x, operands, operands.admit, statistics, describe, updates)


def _dense_block(
    x: Tensor,
    operands: BlockOperands,
    check_input: Callable[[Tensor], None],
    statistics: BatchStatistics | None,
    describe: bool,
    updates: Updates | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    x, statistics = _autocast(x, statistics)
    check_input(x)
    if not describe:
        made = inference.dense_block(x, operands, _room(updates))
        if made is not None:
            return made, None
    rates, stages, group = operands.drop_rates, operands.stages, operands.group()
    masks = _masks(x, operands)
    differentiable = operands.differentiable(x)
    features, *described, count, mean, var = ops.dense_block(
        x,
        *_known(x, operands.reader, statistics, group),
        stages,
        masks,
        rates,
        operands.bottleneck,
        operands.saved(x, differentiable),
        describe,
        group,
        _link(x) if differentiable and x.requires_grad else None,
        operands.prepend,
    )
    if _beyond_range(x, var, group):
        n = 2 if operands.bottleneck else 1
        per_layer = [stages[i : i + n] for i in range(0, len(stages), n)]
        bottlenecks: list[Tensor] = []
        features, *_ = made = _on_stock(stock.dense_block, x, per_layer, masks, rates, operands.prepend, bottlenecks)
        mean, var = map(torch.cat, zip(*map(_summed_in_float64, [features, *bottlenecks])))
        described = made[4:]
    _update_running_statistics(x, operands, mean, var, count, updates)
    return features, BatchStatistics(*described, group) if describe else None


def run_dense_block_and_reader(
    x: Tensor,
    operands: BlockOperands,
    reader: ConvOperands | NormOperands,
    statistics: BatchStatistics | None,
    describe: bool,
    updates: Updates,
) -> tuple[Tensor, BatchStatistics | None] | None:
    """:func:`run_dense_block` and, of its result, the transition or the head that ``reader`` is of, as one call that
    spares the host work and the memory of a gradient; None where they have to be called one after the other: where
    neither counts, or there is more to do."""
    if operands.drops or saved_tensors_are_looked_at() or seen_by_dispatcher([x]):
        return None
    is_planned, differentiable = planned.obstacle(x) is None, operands.differentiable(x)
    if not is_planned and (x.device.type != "cpu" or not differentiable):
        return None
    group, is_transition = operands.group(), isinstance(reader, ConvOperands)
    if group is not None or reader.group() is not None:
        return None
    x, statistics = _autocast(x, statistics)
    if is_transition:
        _check_poolable(x)
    operands.admit(x)
    reader.admit(x, x.shape[1] + sum(operands.growths))
    call = Call(
        x,
        *_known(x, operands.reader, statistics, group),
        stages=operands.stages,
        drop_rates=operands.drop_rates,
        bottleneck=operands.bottleneck,
        saved=operands.saved(x, differentiable),
        described=reader.reads_statistics,
        prepend=operands.prepend,
        link=_link(x) if differentiable and x.requires_grad else None,
        read_stages=reader.stages,
        options=(True, describe) if is_transition else (),
    )
    out, mean, var, count, *own = (TRANSITION if is_transition else HEAD)(*call)
    if not is_planned and (_beyond_range(x, var, group) or _beyond_range(x, own[1], group)):
        return None
    _update_running_statistics(x, operands, mean, var, count, updates)
    _update_running_statistics(x, reader, *own[:3], updates)
    return out, BatchStatistics(*own[3:5]) if describe else None


LARGEST_VARIANCE = 2.0**80
"""Up to here the cube of rsqrt(variance), which gradients are multiplied by, is a normal float32."""


def _beyond_range(x: Tensor, var: Tensor, group: str | None) -> bool:
    """Whether the variances of a batch [C] are too large for the kernels' float32, or not finite, where stock torch,
    which sums in float64 on CPUs, may know better. A GPU is not asked: it would have to be waited for."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or group is not None or seen_by_dispatcher([x]):
        return False
    return not var.max().item() <= LARGEST_VARIANCE


def _on_stock(function: Callable[..., Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """What ``function`` of ``ops.stock`` makes of x: the result, the mean and variance of x and their count, and the
    mean and variance of the result. Torch sums in float64 where memory is contiguous."""
    out = without_autocast(function)(x.contiguous(), *arguments)
    if out.dim() in CHANNELS_LAST:
        out = out.contiguous(memory_format=CHANNELS_LAST[out.dim()])
    count = torch.full((), x.numel() // x.shape[1], dtype=torch.float64)
    return out, *_summed_in_float64(x), count, *(stock.batch_statistics(out) if out.dim() > 2 else ())


def _summed_in_float64(x: Tensor) -> list[Tensor]:
    """Mean and biased variance of x, [C] each, in float32."""
    wide, dims = x.detach().double(), [0, *range(2, x.dim())]
    return [wide.mean(dims).float(), wide.var(dims, correction=0).float()]


def _known(
    x: Tensor, norm: BatchNorm, statistics: BatchStatistics | None, group: str | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The mean and variance in ``statistics``, if they are what ``norm`` normalises x by."""
    if statistics is None or norm.frozen or statistics.group != group:
        return None, None
    expected = (x.shape[1],), accumulation_dtype(x.dtype), x.device
    for field, vector in zip(("mean", "var"), statistics):
        got = tuple(vector.shape), vector.dtype, vector.device
        if got != expected:
            raise RuntimeError(f"statistics.{field}: expected shape, dtype and device {expected}, got {got}")
    return statistics[:2]


def _masks(x: Tensor, operands: BlockOperands) -> list[Tensor]:
    """A dropout mask for each drop rate."""
    if not operands.drops:
        return []
    return [_mask(x, k, p, operands.drop_channels) for k, p in zip(operands.dropped_channels, operands.drop_rates)]


def _mask(x: Tensor, channels: int, p: float, whole_channels: bool) -> Tensor:
    """A dropout mask [N, channels, *spatial] for features made from x; empty where nothing is dropped."""
    if p == 0:
        return x.new_empty(0)
    spatial = x.shape[2:]
    shape = x.shape[0], channels, *([1] * len(spatial) if whole_channels else spatial)
    if x.device.type != "cpu" or seen_by_dispatcher([x]):
        return dropout_mask(x.new_empty(shape), p).expand(-1, -1, *spatial)
    mask = x.new_empty(shape, dtype=torch.bool).bernoulli_(1 - p)
    layout = torch.preserve_format if whole_channels else CHANNELS_LAST.get(x.dim(), torch.preserve_format)
    return mask.contiguous(memory_format=layout).expand(-1, -1, *spatial)


def _update_running_statistics(
    x: Tensor, operands: Operands, mean: Tensor, var: Tensor, count: Tensor, updates: Updates | None
) -> None:
    """After an op on x: running = (1 - momentum) * running + momentum * batch, with the unbiased variance, for the
    statistics of x and what was made of it, which stand in the packed ``mean`` and ``var``. With ``updates`` it waits
    there."""
    if not torch.compiler.is_compiling():
        operands.outcome.walked = planned.last()
    for batches in operands.counters:
        batches.add_(1)
    if operands.running:
        update = Update(operands.running, mean, var, rows_of(count, x.numel() // x.shape[1]))
        if updates is None:
            _make(x.device, x.dtype, [update])
        else:
            updates.add(x, update)


def _make(device: torch.device, dtype: torch.dtype, updates: list[Update]) -> None:
    traced = seen_by_dispatcher([value for u in updates for value in (u.mean, u.running.vectors)])
    (aten if traced else select(device, dtype)).update_running_statistics(updates)


class _Link(torch.autograd.Function):
    """One zero, seen in x's shape, whose gradient is x's: reaches x's graph without keeping its memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        made = _zero.__wrapped__ if seen_by_dispatcher([x]) else _zero  # what a mode makes is for that mode alone
        return made(x.dtype, x.device).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


_linked = super(torch.autograd.Function, _Link).apply
"""Without what torch.func needs: operands are refused under its transforms."""


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _link(x: Tensor) -> Tensor | None:
    return None if torch.compiler.is_compiling() else _linked(x)


def _autocast(x: Tensor, statistics: BatchStatistics | None) -> tuple[Tensor, BatchStatistics | None]:
    """x in autocast's dtype, and its statistics if it was in that dtype already."""
    dtype = autocast_dtype(x.device)
    if dtype in (None, x.dtype) or not x.dtype.is_floating_point or x.dtype == torch.float64:
        return x, statistics
    return x.to(dtype), None
