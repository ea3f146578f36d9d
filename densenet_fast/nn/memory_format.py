"""Memory formats at the border of fused parts.

Inside, feature maps are channels last. Outside, they have the format that torchvision's parts would return: that of the
part's input. A convolution whose weight is channels last makes its output channels last too.
"""

from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast.backends.layout import CHANNELS_LAST, is_channels_last
from densenet_fast.ops.convolution import convolution_of_images, convolves

__all__ = ["contiguous_gradient", "convolved", "copied", "handed_out", "is_channels_last"]


def handed_out(x: Tensor, channels_last: bool, kept: bool) -> Tensor:
    """Returns ``x``, which is channels last, for a reader that may change it in place.

    It gets the memory format that is asked for. It is copied if it is ``kept`` for the backward pass.
    """
    layout = CHANNELS_LAST.get(x.dim(), torch.contiguous_format) if channels_last else torch.contiguous_format
    if not x.is_contiguous(memory_format=layout) and (x.dim() in CHANNELS_LAST or not channels_last):
        return x.contiguous(memory_format=layout)
    return x.clone() if kept and x.requires_grad else x


def copied(x: Tensor, channels_last: bool) -> Tensor:
    """Returns a copy of ``x``: channels last if that is asked for and such a format exists, else contiguous."""
    return x.clone(memory_format=CHANNELS_LAST.get(x.dim() if channels_last else 0, torch.contiguous_format))


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, channels_last: bool) -> Tensor:
        return _converted(x, channels_last) if channels_last else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.contiguous(), None


def contiguous_gradient(x: Tensor, channels_last: bool = False) -> Tensor:
    """Returns ``x``, made ``channels_last`` if asked. The gradient that comes back is contiguous if ``x`` is not
    channels last itself."""
    if is_channels_last(x):
        return x
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _converted(x, channels_last)
    return _ContiguousGradient.apply(x, channels_last)


def _converted(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()]) if channels_last else x


def convolved(convolution: nn.Module, images: Tensor) -> Tensor:
    """Returns the result of a plain ``convolution`` of ``images``, channels last where there is such a format.

    The images are made channels last, because the maps made from them are larger.
    """
    images, weight = contiguous_gradient(images, images.dim() in CHANNELS_LAST), contiguous_gradient(convolution.weight)
    if convolves(convolution, images):
        return convolution_of_images(convolution, images, weight)
    return convolution._conv_forward(images, weight, convolution.bias)
