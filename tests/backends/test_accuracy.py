"""At the sizes of real networks the kernels' error against float64 is at most twice that of stock torch.

Stock is taken in the memory layout in which it is less accurate, which depends on the quantity and on the machine.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import densenet_fast
from backends.comparison import served
from densenet_fast import nn
from densenet_fast.backends import serving
from densenet_fast.backends.affine import Affine, empty_statistics
from densenet_fast.backends.layout import CHANNELS_LAST, to_image, to_matrix
from helpers import error, step

CASES = [
    *(((4, size, size), *channels) for size, *channels in [(28, 128, 32), (7, 128, 32), (14, 192, 48), (32, 48, 12)]),
    ((2, 12, 12, 12), 128, 32),
    ((2, 5, 4, 7), 128, 32),
    ((3, 300), 128, 32),
]
"""Grid, input and output channels of convolutions of DenseNet-121, -161 and -BC-100, and of volumes and lines."""
SMALL = [
    *(((1, *sizes), 128, 32) for sizes in [(2, 2, 2), (1, 4, 4), (2, 2), (4, 2), (2,)]),
    *(((8, *sizes), 128, 32) for sizes in [(2, 4, 4), (2, 2, 2), (4, 4)]),
    ((16, 4, 4), 48, 12),
]
"""Of a few pixels. The convolution of one pixel does not know the grid, and stock's in bfloat16 reads what it has not
written."""

SERVED, FLOAT32 = served([torch.float32, torch.bfloat16]), served([torch.float32])


def stock(x, affine, weight, grad, grid, memory_format):
    """Output, input gradient and weight gradient of conv(relu(bn(x))), in x's dtype."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, scale, shift = (t.to(wide) for t in (affine.mean, affine.scale, affine.bias))
    a = F.relu((x.to(wide) - mean) * scale + shift).to(x.dtype)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(grid) - 2]
    y = convolve(to_image(a, grid).contiguous(memory_format=memory_format), weight, padding=weight.shape[-1] // 2)
    image = to_image(grad, grid).contiguous(memory_format=memory_format)
    return to_matrix(y.detach()), *torch.autograd.grad(y, (x, weight), image)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend, dtype", SERVED.values(), ids=SERVED)
def test_error_is_at_most_twice_stocks(backend, dtype, case, kernel):
    assert_no_more_than_twice_stocks(backend, dtype, case, kernel)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("backend, dtype", FLOAT32.values(), ids=FLOAT32)
def test_error_on_a_few_pixels_is_at_most_twice_stocks(backend, dtype, case):
    assert_no_more_than_twice_stocks(backend, dtype, case, 3)


def assert_no_more_than_twice_stocks(backend, dtype, case, kernel):
    torch.manual_seed(0)
    grid, channels, out_channels = case
    rows, sizes = torch.Size(grid).numel(), [kernel] * (len(grid) - 1)
    x = torch.randn(rows, channels).to(dtype)
    grad = torch.randn(rows, out_channels).to(dtype)
    affine = Affine(torch.randn(channels) * 0.3, torch.rand(channels) + 0.5, torch.randn(channels) * 0.3)
    weight = (torch.randn(out_channels, channels, *sizes) / (kernel ** (len(sizes) / 2) * channels**0.5)).to(dtype)

    out, grad_x = torch.empty_like(grad), torch.zeros_like(x)
    if kernel == 3:
        backend.bn_relu_conv3x3(x, affine, weight, None, grid, out)
        grad_weight, _ = backend.bn_relu_conv3x3_backward(grad, x, affine, weight, grid, grad_x, need_weight=True)
    else:
        matrix = weight.flatten(1)
        backend.bn_relu_conv1x1(x, affine, matrix, None, out, None)
        grad_weight, _ = backend.bn_relu_conv1x1_backward(
            grad, x, affine, matrix, grad_x, need_weight=True, need_sums=True
        )
    got = (out, grad_x, grad_weight.view_as(weight))

    truth = stock(x.double(), affine, weight.double(), grad.double(), grid, torch.contiguous_format)
    formats = (torch.contiguous_format, CHANNELS_LAST.get(weight.dim(), torch.contiguous_format))
    stocks = [stock(x, affine, weight, grad, grid, memory_format) for memory_format in formats]
    for what, ours, exact, *theirs in zip(("output", "input gradient", "weight gradient"), got, truth, *stocks):
        assert error(ours, exact) <= 2 * max(error(t, exact) for t in theirs), what


@pytest.mark.parametrize("kind", ["patch", "one value", "every channel"])
def test_statistics_of_nearly_constant_maps(kind):
    """At most twice stock's error in the layout in which it is more accurate."""
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.rand(4, 32, 1, 1).expand(4, 32, 48, 48).clone()
        if kind == "patch":
            x[:, :, 10:16, 20:26] += torch.randn(4, 32, 6, 6)
        elif kind == "one value":
            x[:, :, 30, 30] += 1
        matrix = to_matrix(x)
        var, mean = torch.var_mean(matrix.double(), 0, correction=0)
        norm = torch.nn.BatchNorm2d(32, momentum=1.0)
        norm(x)
        count = matrix.shape[0]
        for backend in serving(x.device, x.dtype):
            own = empty_statistics(matrix, 32, 1e-5)
            backend.channel_statistics(matrix, own)
            assert error(own.mean, mean) <= 2 * error(norm.running_mean, mean), backend.name
            stock_var = norm.running_var.double() * (count - 1) / count
            assert error(own.var, var) <= 2 * error(stock_var, var), backend.name


PARTS = {
    "transition": lambda: nn.Transition(32, 16),
    "block in one dimension": lambda: nn.DenseBlock(1, 32, None, 16, spatial_dims=1),
}


@pytest.mark.parametrize("kind", PARTS)
def test_gradients_of_normalisations(kind):
    """They are sums over all pixels: at most twice stock's error on contiguous memory, which it sums in float64. No
    value is so near to zero behind the normalisation that rounding could decide what the ReLU does."""
    ours, theirs = {}, {}
    for seed in range(3):
        torch.manual_seed(seed)
        module, shape = PARTS[kind](), (8, 32, 28, 28) if kind == "transition" else (8, 32, 784)
        x = torch.randn(shape).sign() * (torch.rand(shape) + 0.5)
        with densenet_fast.set_fused(False):
            stock_values, truth = dict(step(module, x)), dict(step(copy.deepcopy(module).double(), x.double()))
        for errors, values in ((ours, dict(step(module, x))), (theirs, stock_values)):
            for name, value in values.items():
                if name.startswith("grad") and "norm" in name:
                    errors[name] = errors.get(name, 0) + error(value, truth[name])
    for name in theirs:
        assert ours[name] <= 2 * theirs[name], (name, ours[name] / theirs[name])
