"""The kernels of the stem and the head against stock differentiable torch functions in float64.

Inputs are column ranges of wider buffers.
"""

import pytest
import torch
import torch.nn.functional as F

from backends.comparison import served
from densenet_fast.backends.affine import Affine, accumulation_dtype, empty_statistics
from densenet_fast.backends.layout import to_image, to_matrix
from helpers import EPS, assert_statistics

GRIDS = [(2, 5, 7), (1, 1, 1), (3, 1, 4), (2, 2, 2), (1, 2, 1), (2, 9), (1, 2), (2, 3, 4, 2), (3, 50, 13), (40, 3, 3)]
CHANNELS = [1, 5, 24, 33]
SERVED = served([torch.float64, torch.float32, torch.bfloat16, torch.float16])

pytestmark = [
    pytest.mark.parametrize("backend, dtype", SERVED.values(), ids=SERVED),
    pytest.mark.parametrize("channels", CHANNELS),
    pytest.mark.parametrize("grid", GRIDS, ids=str),
]


def column_range(rows, cols, dtype):
    return torch.randn(rows, cols + 5).to(dtype)[:, 2 : 2 + cols]


class Case:
    """A matrix x [M, C] and its normalisation; ``exact`` ones hold small integers and halves, so that many values of a
    window are equal and every backend computes the same."""

    def __init__(self, grid, channels, dtype, exact=False):
        self.grid, self.dtype, self.channels = grid, dtype, channels
        self.x = column_range(torch.Size(grid).numel(), channels, dtype)
        vectors = torch.randn(3, channels).to(accumulation_dtype(dtype))
        if exact:
            self.x.copy_(self.x.mul(2).round())
            vectors = vectors.sign() * torch.tensor([1.0, 2.0, 0.5], dtype=vectors.dtype)[:, None]
        self.affine = Affine(vectors[0] * 0.3 if not exact else vectors[0], vectors[1], vectors[2] * 0.5)

    def activation(self, dtype):
        """relu(bn(x)) [N, C, *spatial] and its leaves x and scale, in ``dtype``."""
        x, scale = (t.detach().to(dtype).clone().requires_grad_() for t in (self.x, self.affine.scale))
        y = (x - self.affine.mean.to(dtype)) * scale + self.affine.bias.to(dtype)
        return to_image(F.relu(y), self.grid), (x, scale)

    def stock(self, pooling, dtype):
        """The pooled activation as a matrix, and its leaves."""
        a, leaves = self.activation(dtype)
        return to_matrix(pooling(a)), leaves


def max_pool(a, **options):
    return (F.max_pool1d, F.max_pool2d, F.max_pool3d)[a.dim() - 3](a, 3, 2, 1, **options)


def average(a):
    return a.flatten(2).mean(2)


def close(got, truth, stock, dtype, magnitude):
    """No less accurate than stock: twice its error, and the rounding of the result or of its summands."""
    allowed = 2 * (stock.double() - truth).norm() + 4 * torch.finfo(dtype).eps * magnitude.norm()
    return bool((got.double() - truth).norm() <= allowed)


def assert_gradients(case, pooling, grad, scaled, sums):
    """scale * D and the sums against autograd's in float64, and its error in the case's dtype."""
    gradients = []
    for dtype in (torch.float64, case.dtype):
        out, leaves = case.stock(pooling, dtype)
        gradients.append(torch.autograd.grad(out, leaves, grad.to(dtype)))
    (truth, truth_scale), (stock, stock_scale) = gradients
    assert close(scaled, truth, stock, case.dtype, truth) and scaled.dtype == case.dtype
    scale, centred = case.affine.scale.double(), case.x.double() - case.affine.mean.double()
    d, stock_d = truth / scale, stock / case.affine.scale.to(case.dtype)
    assert close(sums[0], d.sum(0), stock_d.sum(0), case.dtype, d.abs().sum(0))
    assert close(sums[1], truth_scale, stock_scale, case.dtype, (d * centred).abs().sum(0))
    assert sums[0].dtype == sums[1].dtype == accumulation_dtype(case.dtype)


def positions(index, grid):
    """The positions in their windows of what max_pool's flat ``index`` [N, C, *spatial'] names, as a matrix."""
    coordinates = torch.unravel_index(index, grid[1:])
    total = torch.zeros_like(index)
    for dim, coordinate in enumerate(coordinates):
        start = 2 * torch.arange(index.shape[2 + dim]) - 1
        total = 3 * total + coordinate - start.view(-1, *[1] * (index.dim() - 3 - dim))
    return to_matrix(total)


def test_bn_relu_maxpool(backend, dtype, channels, grid):
    case = Case(grid, channels, dtype)
    statistics = empty_statistics(case.x, channels, EPS)
    out, argmax = backend.bn_relu_maxpool(case.x, case.affine, grid, statistics)
    truth, stock = (case.stock(max_pool, d)[0] for d in (torch.float64, dtype))
    assert close(out, truth, stock, dtype, truth) and out.dtype == dtype
    assert argmax.dtype == torch.uint8 and argmax.is_contiguous() and argmax.shape == out.shape
    assert_statistics(statistics, out)
    without = backend.bn_relu_maxpool(case.x, case.affine, grid, None)
    assert without[0].equal(out) and without[1].equal(argmax)


def test_bn_relu_maxpool_backward(backend, dtype, channels, grid):
    case = Case(grid, channels, dtype)
    out, argmax = backend.bn_relu_maxpool(case.x, case.affine, grid, None)
    grad = column_range(out.shape[0], channels, dtype)
    scaled, sums = backend.bn_relu_maxpool_backward(grad, argmax, case.x, case.affine, grid)
    assert_gradients(case, max_pool, grad, scaled, sums)


@pytest.mark.parametrize("nan", [False, True])
def test_the_maximum_of_equals_and_of_nan_is_stocks(backend, dtype, channels, grid, nan):
    case = Case(grid, channels, dtype, exact=True)
    if nan:
        case.x[torch.rand(case.x.shape) < 0.1] = float("nan")
        case.x[0, 0] = float("nan")
    out, argmax = backend.bn_relu_maxpool(case.x, case.affine, grid, None)
    a, leaves = case.activation(dtype)
    expected, index = max_pool(a, return_indices=True)
    assert torch.equal(out.nan_to_num(-1.0), to_matrix(expected).nan_to_num(-1.0))
    assert torch.equal(argmax.long(), positions(index, grid))
    grad = torch.randn(out.shape).mul(4).round().to(dtype)
    scaled, _ = backend.bn_relu_maxpool_backward(grad, argmax, case.x, case.affine, grid)
    stock = torch.autograd.grad(to_matrix(expected), leaves[0], grad)[0]
    assert torch.equal(scaled, stock) and stock.isfinite().all()


def test_bn_relu_global_avgpool(backend, dtype, channels, grid):
    case = Case(grid, channels, dtype)
    out = backend.bn_relu_global_avgpool(case.x, case.affine, grid)
    truth, stock = (case.stock(average, d)[0] for d in (torch.float64, dtype))
    assert out.shape == (grid[0], channels) and out.dtype == dtype
    assert close(out, truth, stock, dtype, truth)


def test_bn_relu_global_avgpool_backward(backend, dtype, channels, grid):
    case = Case(grid, channels, dtype)
    grad = column_range(grid[0], channels, dtype)
    scaled, sums = backend.bn_relu_global_avgpool_backward(grad, case.x, case.affine, grid)
    assert_gradients(case, average, grad, scaled, sums)


def test_nan_reaches_the_average_and_its_gradient_as_in_stock(backend, dtype, channels, grid):
    case = Case(grid, channels, dtype)
    case.x[0, 0] = float("nan")
    out = backend.bn_relu_global_avgpool(case.x, case.affine, grid)
    expected, leaves = case.stock(average, dtype)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()
    grad = torch.ones_like(out)
    scaled, sums = backend.bn_relu_global_avgpool_backward(grad, case.x, case.affine, grid)
    by_x, by_scale = torch.autograd.grad(expected, leaves, grad)
    assert scaled[0, 0].isfinite() and scaled[0, 0] != 0 and by_x[0, 0].isfinite()
    assert torch.equal(sums[1].isnan(), by_scale.isnan()) and sums[1].isnan().any()
