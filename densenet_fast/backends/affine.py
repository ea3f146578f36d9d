"""The vectors between kernels: statistics, what normalises by them, what leads the gradient back through them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """``relu(bn(x)) = relu((x - mean) * scale + bias)`` with scale = rstd * weight, or rstd where there is no weight;
    one value per column. ``mean`` and ``rstd`` in the accumulation dtype, ``bias`` and ``weight`` in that or in x's.

    The centred form keeps full precision where a column's mean is large against its deviation, which ``x * s + t`` with
    ``t = bias - mean * s`` does not.
    """

    mean: Tensor
    rstd: Tensor
    bias: Tensor
    weight: Tensor | None = None

    @property
    def scale(self) -> Tensor:
        """In the accumulation dtype."""
        return self.rstd if self.weight is None else self.weight * self.rstd


class Reader(NamedTuple):
    """Where the kernel that sums D and D * (x - mean) writes the gradients through one normalisation, None where they
    are not asked for.

    p = p_before - scale * sum D;  q = q_before - scale * rstd^2 * sum D * (x - mean) / 2;
    weight = rstd * sum D * (x - mean);  bias = sum D   (each in the dtype of the tensor given).
    """

    before: tuple[Tensor, Tensor] | None
    """P and Q so far, [columns] each, in the accumulation dtype, zero if None; may be the same memory as ``after``."""
    after: tuple[Tensor, Tensor] | None
    """P and Q with this reader's part."""
    weight: Tensor | None
    bias: Tensor | None


class Statistics(NamedTuple):
    """Where a kernel writes the statistics of what it stored, [columns] each, adjacent, in the accumulation dtype:
    mean, biased variance and rstd = rsqrt(var + eps)."""

    mean: Tensor
    var: Tensor
    rstd: Tensor
    eps: float

    def of(self, columns: slice) -> "Statistics":
        """The part for a range of columns."""
        return Statistics(self.mean[columns], self.var[columns], self.rstd[columns], self.eps)


NO_STATISTICS = (None, None, None, 0.0)
"""What the compiled kernels take in the place of statistics that are not asked for."""


class ThroughStatistics(NamedTuple):
    """What completes the gradient of a matrix x [M, n] that was normalised by its batch: the gradients ``p`` and ``q``
    with respect to its ``mean`` and variance, [n] each, over ``count`` rows."""

    x: Tensor
    mean: Tensor
    p: Tensor
    q: Tensor
    count: Tensor | int


class Job(NamedTuple):
    """One vector or weight to make before the kernels that read it run.

    "copy": target = source, in the target's dtype; [k, B, *taps] or fewer dimensions, the source of any strides, the
    target contiguous or channels last. "rstd": target = 1 / sqrt(source + eps), [n], in the accumulation dtype.
    "zero": target = 0, dense.
    """

    kind: str
    target: Tensor
    source: Tensor | None = None
    eps: float = 0.0


class Running(NamedTuple):
    """The running statistics [n] of one normalisation, of any floating dtype, and the number of batches they are over,
    an int64 scalar; ``start`` is the first of its columns in packed batch statistics. Without a ``momentum`` they are
    cumulative averages; without a number of batches they then stay as they are."""

    mean: Tensor
    var: Tensor
    batches: Tensor | None
    momentum: float | None
    start: int


def empty_statistics(like: Tensor, columns: int, eps: float) -> Statistics:
    """Uninitialised ones, for values of the dtype and on the device of ``like``."""
    dtype = accumulation_dtype(like.dtype)
    return Statistics(*(like.new_empty(columns, dtype=dtype) for _ in range(3)), eps)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums over values of ``dtype``: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalise(x: Tensor, affine: Affine) -> Tensor:
    """bn(x) [M, C] in the accumulation dtype, on torch ops."""
    return torch.addcmul(affine.bias, x.to(affine.mean.dtype) - affine.mean, affine.scale)


def bn_relu(x: Tensor, affine: Affine) -> Tensor:
    """relu(bn(x)) [M, C] in x's dtype, on torch ops."""
    return normalise(x, affine).relu_().to(x.dtype)
