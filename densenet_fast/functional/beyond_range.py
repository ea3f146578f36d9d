"""Values that the kernels' float32 does not hold, on CPUs: there stock torch computes instead."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends.layout import CHANNELS_LAST
from densenet_fast.ops import stock
from densenet_fast.ops.op import seen_by_dispatcher
from densenet_fast.ops.stage import without_autocast

__all__ = ["LARGEST_VARIANCE", "beyond_range", "on_stock", "summed_in_float64"]

LARGEST_VARIANCE = 2.0**80
"""Up to here the cube of rsqrt(variance), which gradients are multiplied by, is a normal float32."""


def beyond_range(x: Tensor, var: Tensor, group: str | None) -> bool:
    """Whether the variances of a batch [C] are too large for the kernels' float32, or not finite.

    Stock torch may know better, for it sums in float64 on CPUs. A GPU is not asked: it would have to be waited for.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or group is not None or seen_by_dispatcher([x]):
        return False
    return not var.max().item() <= LARGEST_VARIANCE


def on_stock(function: Callable[..., Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """What ``function`` of ``ops.stock`` makes of x.

    Returns the result, the mean and variance of x and their count, and the mean and variance of the result. Torch sums
    in float64 where memory is contiguous.
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
