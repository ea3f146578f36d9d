"""The vectors with which a kernel normalises its input."""

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


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums over values of ``dtype``: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32
