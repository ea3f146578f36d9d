"""A plain convolution of images with few channels, by the backend's kernels. The gradient of the images is torch's, and
so are those that are differentiated themselves."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast.backends import select
from densenet_fast.backends.layout import as_output, to_image, to_matrix
from densenet_fast.ops import stock
from densenet_fast.ops.flops import of_convolutions
from densenet_fast.ops.op import direct_call, named, seen_by_dispatcher
from densenet_fast.ops.stage import autocast_dtype

MOST_CHANNELS = 16
"""The most channels of images. A kernel that multiplies by whole lines of windows is the faster one where there are
few."""


def is_plain(convolution: nn.Module, images: Tensor) -> bool:
    """Whether it is a convolution with few channels, without a bias, over plain squares, of images in its dtype or in
    that of autocast."""
    weight, autocast = convolution.weight, autocast_dtype(images.device)
    squares = (weight.shape[2:], convolution.stride, convolution.padding)
    return (
        convolution.bias is None
        and images.dim() == weight.dim() == 4
        and images.shape[1] == weight.shape[1] <= MOST_CHANNELS
        and not isinstance(convolution.padding, str)
        and all(size[0] == size[1] for size in squares)
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and (weight.dtype == images.dtype or (autocast is not None and weight.dtype == torch.float32))
    )


def output_sizes(convolution: nn.Module, images: Tensor) -> list[int]:
    """The height and the width of what a plain ``convolution`` makes of ``images``; not positive if it makes
    nothing."""
    kernel, stride, padding = convolution.weight.shape[-1], convolution.stride[0], convolution.padding[0]
    return [(size + 2 * padding - kernel) // stride + 1 for size in images.shape[2:]]


def convolves(convolution: nn.Module, images: Tensor) -> bool:
    """Whether :func:`convolution_of_images` takes a ``convolution`` of ``images`` [N, C, H, W]."""
    if torch.compiler.is_compiling() or not is_plain(convolution, images) or images.numel() == 0:
        return False
    dtype = autocast_dtype(images.device)
    return (
        select(images.device, dtype or images.dtype).CONVOLVES
        and images.dtype in (torch.float32, dtype or images.dtype)
        and min(output_sizes(convolution, images)) > 0
        and torch.autograd.forward_ad._current_level < 0
        and not seen_by_dispatcher([images, convolution.weight])
    )


def convolution_of_images(convolution: nn.Module, images: Tensor, weight: Tensor) -> Tensor:
    """The result [N, k, H', W'] of a plain ``convolution`` of ``images`` with its ``weight``, channels last.

    The images are converted to autocast's dtype first. A float32 weight is rounded to it too; its gradient is not.
    """
    dtype = autocast_dtype(images.device) or images.dtype
    sizes = output_sizes(convolution, images)
    flops = partial(of_convolutions, images.shape[0] * sizes[0] * sizes[1], [weight])
    with named(NAME, images, flops):
        return _apply(images.to(dtype), weight, convolution.stride[0], convolution.padding[0], sizes)


def with_unit_channels(images: Tensor) -> Tensor:
    """The images with adjacent channels, as the kernels take them."""
    return images if images.stride(1) == 1 else images.contiguous(memory_format=torch.channels_last)


def as_taps(weight: Tensor) -> Tensor:
    """The weight [k, C, h, w] as the kernels take it: [k, h, w, C], contiguous."""
    return weight.detach().permute(0, 2, 3, 1).contiguous()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, stride: int, padding: int, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        backend = select(images.device, images.dtype)
        made = backend.convolution(with_unit_channels(images), as_taps(weight), stride, padding)
        return as_output(to_image(made, (images.shape[0], *sizes)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        need_images, need_weight = ctx.needs_input_grad[:2]
        own = need_weight and not stock.needed_in_backward(grad) and not seen_by_dispatcher([grad])
        grad_images = grad_weight = None
        if need_images or not own:
            squares = [[ctx.stride] * 2, [ctx.padding] * 2, [1, 1]]
            needs = [need_images, need_weight and not own, False]
            grad_images, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad, images, weight.to(images.dtype), None, *squares, False, [0, 0], 1, needs
            )
            grad_weight = grad_weight if grad_weight is None else grad_weight.to(weight.dtype)
        if own:
            backend, matrix = select(images.device, images.dtype), to_matrix(grad)
            made = backend.convolution_grad_weight(
                matrix, with_unit_channels(images), as_taps(weight), ctx.stride, ctx.padding
            )
            grad_weight = made.permute(0, 3, 1, 2).to(weight.dtype)
        return grad_images, grad_weight, None, None, None


NAME = "densenet_fast::convolution"
_apply = direct_call(_Convolution, NAME)
