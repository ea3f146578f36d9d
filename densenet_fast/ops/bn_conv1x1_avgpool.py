"""The transition without ReLU: batch normalisation, a 1x1 convolution and a 2x2 mean.

Without ReLU all three are linear in x, given its statistics. So the mean is computed first, and all else runs on a
quarter of the pixels. This is written with differentiable torch functions; the backward pass keeps x and its centred
mean.

    out = mean2x2(bn(x) @ W^T) = (mean2x2(x) - mu) @ (W * s)^T + b @ W^T
    dx = the mean's own + (dmu + 2 * dv * (x - mu)) / M
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_fast.backends.affine import accumulation_dtype
from densenet_fast.backends.layout import CHANNELS_LAST
from densenet_fast.ops import stock
from densenet_fast.ops.stage import Stage, without_autocast


class _BatchStatistics(torch.autograd.Function):
    """The mean and the biased variance [C] of x [N, C, *spatial]; keeps x alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = stock.batch_statistics(x)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        rows, columns = x.numel() // x.shape[1], (-1, *[1] * (x.dim() - 2))
        slope, constant = (2 / rows * grad_var).view(columns), (grad_mean / rows).view(columns)
        centred = x - mean.view(columns)
        if torch.is_grad_enabled():
            return (centred * slope + constant).to(x.dtype)
        return centred.mul_(slope).add_(constant).to(x.dtype)


@without_autocast
def bn_conv1x1_avgpool(
    x: Tensor, mean: Tensor | None, var: Tensor | None, stage: Stage
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [N, C', *spatial // 2] and the mean and variance [C] that x [N, C, *spatial] was normalised by.

    ``mean`` and ``var`` are the batch statistics of x, or None to compute them.
    """
    if stage.frozen:
        mean, var = stage.running_mean, stage.running_var
    elif mean is None:
        mean, var = _BatchStatistics.apply(x)
    wide, dims = accumulation_dtype(x.dtype), x.dim() - 2
    pooled = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1](x, 2)
    if x.dim() in CHANNELS_LAST:
        pooled = pooled.contiguous(memory_format=CHANNELS_LAST[x.dim()])
    centred = (pooled.to(wide) - mean.to(wide).view(-1, *[1] * dims)).to(x.dtype)
    weight = stage.conv_weight.to(wide)
    scale = torch.rsqrt(var.to(wide) + stage.eps)
    if stage.weight is not None:
        scale = scale * stage.weight
    bias = None if stage.conv_bias is None else stage.conv_bias.to(wide)
    if stage.bias is not None:
        constant = weight.flatten(1) @ stage.bias.to(wide)
        bias = constant if bias is None else constant + bias
    scaled = (weight * scale.view(1, -1, *[1] * dims)).to(x.dtype)
    ones = [1] * dims
    bias = None if bias is None else bias.to(x.dtype)
    out = torch.convolution(centred, scaled, bias, ones, [0] * dims, ones, False, [0], 1)
    return out, mean, var
