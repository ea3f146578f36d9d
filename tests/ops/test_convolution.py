"""The plain convolution of images by the backend's kernel, against torch's."""

import pytest
import torch
from torch import nn

from densenet_fast.backends import select
from densenet_fast.nn.memory_format import convolved
from densenet_fast.ops.convolution import MOST_CHANNELS, convolves
from helpers import error

SHAPES = [
    # channels, made, kernel, stride, padding, height, width
    (3, 64, 7, 2, 3, 38, 45),
    (3, 24, 3, 1, 1, 9, 8),
    (1, 37, 7, 2, 3, 1, 5),
    (4, 16, 5, 3, 0, 17, 12),
    (MOST_CHANNELS, 8, 2, 2, 1, 6, 7),
    (2, 5, 1, 2, 2, 3, 3),
]
"""Among them windows wholly in the padding, single lines, and one output."""

pytestmark = pytest.mark.skipif(
    not select(torch.empty(0).device, torch.float32).CONVOLVES, reason="no backend here has the kernel"
)


def made_by(convolution, images, grad, autocast=False):
    """The result of the convolution and the gradients of its weight and of the images."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = convolution(images)
    return out, *torch.autograd.grad(out, [convolution.weight, images], grad.to(out.dtype))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("channels, made, kernel, stride, padding, height, width", SHAPES)
def test_it_is_as_exact_as_torchs(channels, made, kernel, stride, padding, height, width, dtype, channels_last):
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    autocast, own = dtype == "autocast", torch.float32 if dtype == "autocast" else dtype
    convolution = nn.Conv2d(channels, made, kernel, stride, padding, bias=False).to(own, memory_format=layout)
    images = torch.randn(2, channels, height, width, dtype=own).contiguous(memory_format=layout)
    grad = torch.randn_like(convolution(images))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert convolves(convolution, images)
    truth = made_by(convolution.double(), images.double(), grad)
    convolution.to(own)
    ours = made_by(Ours(convolution), images, grad, autocast)
    stock = made_by(convolution, images, grad, autocast)
    for one, other, exact in zip(ours, stock, truth, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert error(one, exact) <= 2 * error(other, exact) + torch.finfo(one.dtype).eps / 2


class Ours:
    """A convolution as the stem calls it."""

    def __init__(self, convolution):
        self.convolution, self.weight = convolution, convolution.weight

    def __call__(self, images):
        return convolved(self.convolution, images)


@pytest.mark.parametrize("given", ["images", "weight", "both"])
def test_its_gradients_are_differentiable(given):
    torch.manual_seed(0)
    convolution, images = nn.Conv2d(3, 5, 3, 2, 1, bias=False), torch.randn(2, 3, 7, 6)
    convolution.weight.requires_grad_(given != "images")
    images.requires_grad_(given != "weight")
    leaves = [t for t in (images, convolution.weight) if t.requires_grad]
    found = []
    for own in (Ours(convolution), convolution):
        first = torch.autograd.grad(own(images).square().sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    assert all(error(one, other) < 1e-5 for one, other in zip(*found, strict=True))


def unusual():
    yield nn.Conv2d(3, 4, 3, bias=True)
    yield nn.Conv2d(3, 4, (3, 5), bias=False)
    yield nn.Conv2d(3, 4, 3, padding="same", bias=False)
    yield nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False)
    yield nn.Conv2d(3, 4, 3, dilation=2, bias=False)
    yield nn.Conv2d(3, 3, 3, groups=3, bias=False)
    yield nn.Conv2d(3, 4, 3, bias=False).double()


@pytest.mark.parametrize("convolution", unusual(), ids=str)
def test_what_is_unusual_is_torchs(convolution):
    images = torch.randn(1, 3, 9, 9, dtype=convolution.weight.dtype)
    assert not convolves(convolution, images)
    assert torch.equal(convolved(convolution, images), convolution(images.to(memory_format=torch.channels_last)))


def test_images_that_changed_before_the_backward_pass_raise():
    convolution, images = nn.Conv2d(3, 4, 3, bias=False), torch.randn(1, 3, 9, 9)
    images = images.to(memory_format=torch.channels_last)
    loss = convolved(convolution, images).sum()
    images.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
