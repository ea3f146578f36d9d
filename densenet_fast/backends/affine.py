"""The vectors between kernels: statistics, what normalises by them, what leads the gradient back through them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Affine(NamedTuple):
    """``relu(bn(x)) = relu((x - mean) * scale + shift)``, one value per column, in the accumulation dtype.

    The centred form keeps full precision where a column's mean is large against its deviation, which ``x * s + t`` with
    ``t = shift - mean * s`` does not.
    """

    mean: Tensor
    scale: Tensor
    shift: Tensor


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


def empty_statistics(like: Tensor, columns: int, eps: float) -> Statistics:
    """Uninitialised ones, for values of the dtype and on the device of ``like``."""
    dtype = accumulation_dtype(like.dtype)
    return Statistics(*(like.new_empty(columns, dtype=dtype) for _ in range(3)), eps)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums over values of ``dtype``: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32
