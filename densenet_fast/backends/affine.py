"""The vectors between kernels: statistics, the affine that normalises by them, and the gradients through both."""

import functools
import math
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends.inputs import Fixed


class Affine(NamedTuple):
    """What normalises the columns of a matrix x: ``bn(x) = (x - mean) * scale + bias`` with ``scale = weight * rstd``.

    Without a weight, ``scale = rstd``. Each vector has one value per column. ``mean`` and ``rstd`` are in the
    accumulation dtype; ``bias`` and ``weight`` are in that dtype or in x's.

    The centred form keeps full precision where a column's mean is large against its deviation. ``x * s + t`` with
    ``t = bias - mean * s`` would not.
    """

    mean: Tensor
    rstd: Tensor
    bias: Tensor
    weight: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """``weight * rstd`` in the accumulation dtype."""
        return self.rstd if self.weight is None else self.weight * self.rstd

    def vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``mean``, ``scale`` and ``bias``, all in the accumulation dtype."""
        return self.mean, self.scale, self.bias.to(self.mean.dtype)


class Reader(NamedTuple):
    """Where the gradients through one normalisation of x are written. They follow from sum D and sum D * (x - mean).

    ``after`` are the gradients P and Q with respect to the batch's mean and variance, [columns] each. ``before`` are
    those of the other readers of x so far, zero if None; they may have the memory of ``after``. ``weight`` and ``bias``
    are the gradients with respect to the normalisation's weight and bias, each in the dtype of its tensor. What is None
    is not asked for.

        P = P_before - scale * sum D;   Q = Q_before - scale * rstd^2 * sum D * (x - mean) / 2
        weight = rstd * sum D * (x - mean);   bias = sum D
    """

    before: tuple[Tensor, Tensor] | None
    after: tuple[Tensor, Tensor] | None
    weight: Tensor | None
    bias: Tensor | None

    def read(self, sums: tuple[Tensor, Tensor], affine: Affine) -> None:
        """Writes the gradients, by torch operations."""
        d, dx = sums
        if self.after is not None:
            scale = affine.scale
            before = self.before or (torch.zeros_like(d), torch.zeros_like(d))
            torch.addcmul(before[0], scale, d, value=-1, out=self.after[0])
            torch.addcmul(before[1], scale * affine.rstd * affine.rstd, dx, value=-0.5, out=self.after[1])
        if self.weight is not None:
            self.weight.copy_(dx * affine.rstd)
        if self.bias is not None:
            self.bias.copy_(d)


def read(sums: tuple[Tensor, Tensor] | None, affine: Affine, reader: Reader | None) -> tuple[Tensor, Tensor] | None:
    """Gives the sums to the ``reader``, if there is one. Returns what a backward function returns for the sums: None if
    the reader has them."""
    if reader is None or sums is None:
        return sums
    reader.read(sums, affine)
    return None


class Statistics(NamedTuple):
    """Where a kernel writes the statistics of what it stored: mean, biased variance and rstd = rsqrt(var + eps).

    Each is [columns], its values adjacent, in the accumulation dtype.
    """

    mean: Tensor
    var: Tensor
    rstd: Tensor
    eps: float

    def of(self, columns: slice) -> "Statistics":
        """The statistics of a range of columns."""
        return Statistics(self.mean[columns], self.var[columns], self.rstd[columns], self.eps)


class Job(NamedTuple):
    """A vector or a weight that is made before the kernels run.

    By its ``kind``, ``target`` becomes a copy of ``source`` in target's dtype and layout ("copy"),
    ``1 / sqrt(source + eps)`` ("rstd"), or zero ("zero").
    """

    kind: str
    target: Tensor
    source: Tensor | None = None
    eps: float = 0.0


class Running(NamedTuple):
    """The running statistics of a normalisation. They are updated in place, by the batch statistics that stand from
    column ``start`` on. Without a ``momentum`` they become averages over all ``batches``."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None
    momentum: float | None
    start: int


class RunningStatistics(tuple[Running, ...]):
    """The running statistics that one call updates. ``vectors`` are the means and variances by turns. ``counters`` are
    the ``batches`` of those that have such a counter."""

    def __init__(self, running: Iterable[Running]) -> None:
        self.vectors = Fixed(t for r in self for t in (r.mean, r.var))
        self.counters = [r.batches for r in self if r.batches is not None]
        self.momenta = [0.0 if r.momentum is None else r.momentum for r in self]
        self.starts = [r.start for r in self]
        cumulative = any(r.momentum is None and r.batches is not None for r in self)
        self._plain = not cumulative and all(t.dtype == torch.float32 for t in self.vectors)

    def plain(self) -> bool:
        """Whether all vectors are contiguous and float32, none is of inference mode, and no average is cumulative."""
        return (
            self._plain
            and all(map(Tensor.is_contiguous, self.vectors))
            and not any(map(Tensor.is_inference, self.vectors))
        )

    @functools.cached_property
    def table(self) -> Tensor:
        """What the compiled kernels need besides addresses: int64 [n, 6] on the CPU.

        A row has the start, the number of columns, the places of the mean's and the variance's dtype in ``DTYPES``, the
        bits of the momentum, which is NaN for a cumulative average, and whether there is a counter.

        Raises:
            RuntimeError: a vector or a counter has another form than :class:`Running` says, or another device.
        """
        if len({t.device for t in (*self.vectors, *self.counters)}) > 1:
            raise RuntimeError("update_running_statistics: expected all tensors on one device")
        return torch.frombuffer(bytearray().join(map(_row, self)), dtype=torch.int64).view(-1, 6)


class Update(NamedTuple):
    """Running statistics, and the batch statistics that update them: packed means and biased variances over ``count``
    rows. The count is an int, or a float64 scalar on the device."""

    running: Sequence[Running]
    mean: Tensor
    var: Tensor
    count: Tensor | int


def _row(running: Running) -> bytes:
    mean, var, batches, momentum, start = running
    columns, kernel = mean.numel(), "update_running_statistics"
    for name, vector in (("mean", mean), ("var", var)):
        if vector.dtype not in DTYPES:
            expected = "float32, float64, float16 or bfloat16"
            raise RuntimeError(f"{kernel}: running {name}: expected {expected}, got {vector.dtype}")
        if vector.shape != (columns,):
            raise RuntimeError(f"{kernel}: running {name}: expected [{columns}], got {list(vector.shape)}")
    if batches is not None and (batches.numel(), batches.dtype) != (1, torch.int64):
        raise RuntimeError(f"{kernel}: batches: expected one int64 value, got {list(batches.shape)}, {batches.dtype}")
    types, momentum = map(DTYPES.index, (mean.dtype, var.dtype)), math.nan if momentum is None else momentum
    return struct.pack("=4qdq", start, columns, *types, momentum, batches is not None)


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The dtypes that vectors may have, in the order of ``Type`` in csrc/cuda/kernels.h."""

NO_STATISTICS = (None, None, None, 0.0)
"""What the compiled kernels take in the place of statistics that are not asked for."""

NO_VECTORS = (None, None, None)
"""What they take in the place of the vectors of an affine that is absent."""


class ThroughStatistics(NamedTuple):
    """What completes the gradient of a matrix x [M, n] that was normalised by its batch statistics.

    ``p`` and ``q`` [n] are the gradients with respect to its ``mean`` and its variance. These were computed over
    ``count`` rows.
    """

    x: Tensor
    mean: Tensor
    p: Tensor
    q: Tensor
    count: Tensor | int


class Completion(NamedTuple):
    """Columns of a gradient matrix that are completed as soon as P and Q are known. ``through`` is what completes them,
    ``out`` where the result is written. The reader's ``before`` and ``after`` must then be different memory."""

    columns: slice
    through: ThroughStatistics
    out: Tensor


class Unfinished:
    """What the backward pass of a layer's 3x3 convolution leaves to that of its 1x1 convolution. ``through`` is the
    completion of the gradient between them. ``sums`` are partial results to be added up; only the backend that left
    them knows their form."""

    def __init__(self, through: ThroughStatistics | None) -> None:
        self.through = through
        self.sums: list[Any] = []


def empty_statistics(like: Tensor, columns: int, eps: float) -> Statistics:
    """Uninitialised statistics, for values of the dtype and on the device of ``like``."""
    dtype = accumulation_dtype(like.dtype)
    return Statistics(*(like.new_empty(columns, dtype=dtype) for _ in range(3)), eps)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums over values of ``dtype``: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalise(x: Tensor, affine: Affine) -> Tensor:
    """bn(x) [M, C] in the accumulation dtype, by torch operations."""
    return torch.addcmul(affine.bias.to(affine.mean.dtype), x.to(affine.mean.dtype) - affine.mean, affine.scale)


def bn_relu(x: Tensor, affine: Affine) -> Tensor:
    """relu(bn(x)) [M, C] in x's dtype, by torch operations."""
    return normalise(x, affine).relu_().to(x.dtype)
