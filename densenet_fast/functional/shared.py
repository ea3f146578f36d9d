"""What the operations share: statistics that they are given, hand on and update; autocast; values beyond float32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast import inference
from densenet_fast.backends import aten, select
from densenet_fast.backends.affine import Update, accumulation_dtype
from densenet_fast.backends.layout import CHANNELS_LAST
from densenet_fast.operands import BatchNorm, Operands
from densenet_fast.ops import planned, stock
from densenet_fast.ops.op import seen_by_dispatcher
from densenet_fast.ops.stage import autocast_dtype, rows_of, without_autocast

__all__ = [
    "BatchStatistics",
    "Updates",
    "autocast",
    "beyond_range",
    "known",
    "on_stock",
    "room",
    "summed_in_float64",
    "update_running_statistics",
]


class BatchStatistics(NamedTuple):
    """A feature map's mean and biased variance over its batch and pixels, [C] each, in float32 (float64 for float64).

    The batch is this process's or, with the name of a ``group``, those of all its processes together.
    """

    mean: Tensor
    var: Tensor
    group: str | None = None


class Updates:
    """What the parts of a network share while they run one after the other.

    Updates of running statistics wait here to be made by one call, for a call takes longer than an update. ``room`` is
    the memory that the parts have for their feature maps.
    """

    def __init__(self) -> None:
        self.room = inference.Room()
        self._like: tuple[torch.device, torch.dtype] | None = None
        self._waiting: list[Update] = []

    def add(self, x: Tensor, update: Update) -> None:
        """Adds an update of an op on x to those that wait."""
        like = x.device, x.dtype
        if like != self._like:
            self.make()
            self._like = like
        self._waiting.append(update)

    def make(self) -> None:
        """Makes the updates that wait, in their order."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            _make(*self._like, waiting)


def room(updates: Updates | None) -> inference.Room | None:
    return None if updates is None else updates.room


def autocast(x: Tensor, statistics: BatchStatistics | None) -> tuple[Tensor, BatchStatistics | None]:
    """Returns x in autocast's dtype, and its statistics if x had that dtype already."""
    dtype = autocast_dtype(x.device)
    if dtype in (None, x.dtype) or not x.dtype.is_floating_point or x.dtype == torch.float64:
        return x, statistics
    return x.to(dtype), None


def known(
    x: Tensor, norm: BatchNorm, statistics: BatchStatistics | None, group: str | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Returns the mean and variance in ``statistics``, or None for both unless ``norm`` normalises x by them."""
    if statistics is None or norm.frozen or statistics.group != group:
        return None, None
    expected = (x.shape[1],), accumulation_dtype(x.dtype), x.device
    for field, vector in zip(("mean", "var"), statistics):
        got = tuple(vector.shape), vector.dtype, vector.device
        if got != expected:
            raise RuntimeError(f"statistics.{field}: expected shape, dtype and device {expected}, got {got}")
    return statistics[:2]


def update_running_statistics(
    x: Tensor, operands: Operands, mean: Tensor, var: Tensor, count: Tensor, updates: Updates | None
) -> None:
    """After an op on x: running = (1 - momentum) * running + momentum * batch, with the unbiased variance.

    The batch's statistics, of x and of what was made of it, stand in the packed ``mean`` and ``var``. With ``updates``
    the update waits there.
    """
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


LARGEST_VARIANCE = 2.0**80
"""Gradients are multiplied by the cube of rsqrt(variance). Up to this variance it is a normal float32."""


def beyond_range(x: Tensor, var: Tensor, group: str | None) -> bool:
    """Whether the variances of a batch [C] are too large for the kernels' float32, or not finite.

    Stock torch may know better, for it sums in float64 on CPUs. A GPU is not asked: it would have to be waited for.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or group is not None or seen_by_dispatcher([x]):
        return False
    return not var.max().item() <= LARGEST_VARIANCE


def on_stock(function: Callable[..., Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Runs ``function`` of ``ops.stock`` on x.

    Returns the result, the mean and variance of x and their count, and the mean and variance of the result. The sums
    are float64's where memory is contiguous.
    """
    out = without_autocast(function)(x.contiguous(), *arguments)
    if out.dim() in CHANNELS_LAST:
        out = out.contiguous(memory_format=CHANNELS_LAST[out.dim()])
    count = torch.full((), x.numel() // x.shape[1], dtype=torch.float64)
    return out, *summed_in_float64(x), count, *(stock.batch_statistics(out) if out.dim() > 2 else ())


def summed_in_float64(x: Tensor) -> list[Tensor]:
    """Mean and biased variance of x, [C] each, in float32."""
    wide, dims = x.detach().double(), [0, *range(2, x.dim())]
    return [wide.mean(dims).float(), wide.var(dims, correction=0).float()]
