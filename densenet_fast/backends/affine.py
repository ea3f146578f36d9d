"""The vectors with which a kernel normalises its input, and those that lead the gradient back through them."""

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


class Norm(NamedTuple):
    """A normalisation: bn(x) = (x - mean) * s + bias with s = weight * r and r = rsqrt(var + eps), a value per column.
    ``mean`` and ``var`` are of the accumulation dtype; no weight is one, no bias zero."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class ThroughStatistics(NamedTuple):
    """What completes the gradient of a matrix x [M, n] that was normalised by its batch: the gradients ``p`` and ``q``
    with respect to its ``mean`` and variance, [n] each, over ``count`` rows."""

    x: Tensor
    mean: Tensor
    p: Tensor
    q: Tensor
    count: Tensor | int


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums over values of ``dtype``: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32
