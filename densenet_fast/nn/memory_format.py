"""Memory formats at the border: inside, feature maps are channels last; outside, what torchvision's parts would return.

A part returns the format of its input. A convolution whose weight is channels last makes its output so too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast.backends.layout import CHANNELS_LAST, is_channels_last

__all__ = ["contiguous_gradient", "convolved", "copied", "handed_out", "is_channels_last"]


def handed_out(x: Tensor, channels_last: bool, kept: bool) -> Tensor:
    """``x``, whose memory is channels last, for a reader who may change it in place: in the memory format asked for,
    and a copy if it is ``kept`` for the backward pass."""
    layout = CHANNELS_LAST.get(x.dim(), torch.contiguous_format) if channels_last else torch.contiguous_format
    if not x.is_contiguous(memory_format=layout) and (x.dim() in CHANNELS_LAST or not channels_last):
        return x.contiguous(memory_format=layout)
    return x.clone() if kept and x.requires_grad else x


def copied(x: Tensor, channels_last: bool) -> Tensor:
    """A copy of ``x``, channels last in memory if asked, where there is such a format, or else contiguous."""
    return x.clone(memory_format=CHANNELS_LAST.get(x.dim() if channels_last else 0, torch.contiguous_format))


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channels_last: bool) -> Tensor:
        return _converted(x, channels_last) if channels_last else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.contiguous(), None


def contiguous_gradient(x: Tensor, channels_last: bool = False) -> Tensor:
    """``x``, made ``channels_last`` if asked; the gradient that comes back is contiguous, if ``x`` is not channels last
    itself."""
    if is_channels_last(x):
        return x
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _converted(x, channels_last)
    return _ContiguousGradient.apply(x, channels_last)


def _converted(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()]) if channels_last else x


def convolved(convolution: nn.Module, images: Tensor) -> Tensor:
    """What a plain ``convolution`` makes of ``images``, channels last in memory where there is such a format: they are
    made so, instead of the larger maps made from them."""
    images = contiguous_gradient(images, images.dim() in CHANNELS_LAST)
    return convolution._conv_forward(images, contiguous_gradient(convolution.weight), convolution.bias)
