"""A dense block: its layers, their dropout, and second derivatives."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from densenet_fast import inference, ops
from densenet_fast.backends.layout import CHANNELS_LAST
from densenet_fast.functional import shared
from densenet_fast.functional.shared import BatchStatistics, Updates
from densenet_fast.operands import BlockOperands, BNReLUConv
from densenet_fast.ops import stock
from densenet_fast.ops.op import seen_by_dispatcher
from densenet_fast.reference import dropout_mask

__all__ = ["dense_block", "stand_in", "run_dense_block"]


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
    return_statistics: bool = False,
    updates: Updates | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    """:func:`dense_block`, with the statistics of its result if they are asked for."""
    return _dense_block(x, operands, operands.admit, statistics, return_statistics, updates)


def _dense_block(
    x: Tensor,
    operands: BlockOperands,
    check_input: Callable[[Tensor], None],
    statistics: BatchStatistics | None,
    return_statistics: bool,
    updates: Updates | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    x, statistics = shared.autocast(x, statistics)
    check_input(x)
    if not return_statistics:
        made = inference.dense_block(x, operands, shared.room(updates))
        if made is not None:
            return made, None
    rates, stages, group = operands.drop_rates, operands.stages, operands.group()
    masks = _masks(x, operands)
    differentiable = operands.differentiable(x)
    features, *returned, count, mean, var = ops.dense_block(
        x,
        *shared.known(x, operands.reader, statistics, group),
        stages,
        masks,
        rates,
        operands.bottleneck,
        operands.saved(x, differentiable),
        return_statistics,
        group,
        stand_in(x) if differentiable and x.requires_grad else None,
        operands.prepend,
    )
    if shared.beyond_range(x, var, group):
        n = 2 if operands.bottleneck else 1
        per_layer = [stages[i : i + n] for i in range(0, len(stages), n)]
        bottlenecks: list[Tensor] = []
        features, *_ = made = shared.on_stock(
            stock.dense_block, x, per_layer, masks, rates, operands.prepend, bottlenecks
        )
        mean, var = map(torch.cat, zip(*map(shared.summed_in_float64, [features, *bottlenecks])))
        returned = made[4:]
    shared.update_running_statistics(x, operands, mean, var, count, updates)
    return features, BatchStatistics(*returned, group) if return_statistics else None


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


class _StandIn(torch.autograd.Function):
    """A single zero expanded to the shape of x. Its gradient goes to x, and it does not keep the memory of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        made = _zero.__wrapped__ if seen_by_dispatcher([x]) else _zero  # what a mode makes is for that mode alone
        return made(x.dtype, x.device).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


_linked = super(torch.autograd.Function, _StandIn).apply
"""Without what torch.func needs: operands are refused under its transforms."""


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def stand_in(x: Tensor) -> Tensor | None:
    """Returns a stand-in for x that passes gradients on to x, for an op that does not keep x. None while torch
    compiles."""
    return None if torch.compiler.is_compiling() else _linked(x)
