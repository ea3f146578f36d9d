"""Every kernel of every backend against stock differentiable torch functions in float64.

Inputs are column ranges of wider buffers, as in a dense block; neighbouring columns must stay as they were.
"""

import pytest
import torch
import torch.nn.functional as F

from backends.comparison import served
from densenet_fast.backends.affine import Affine, ThroughStatistics, Unfinished, accumulation_dtype, empty_statistics
from densenet_fast.backends.layout import to_image, to_matrix
from helpers import EPS, assert_statistics, error

GRIDS = [(2, 5, 7), (1, 1, 1), (3, 1, 4), (2, 9), (2, 3, 4, 2), (1, 16, 16), (1, 31, 3, 5)]
CHANNELS = [(1, 1), (5, 3), (48, 12), (33, 48)]
SERVED = served([torch.float64, torch.float32, torch.bfloat16, torch.float16])

pytestmark = [
    pytest.mark.parametrize("backend, dtype", SERVED.values(), ids=SERVED),
    pytest.mark.parametrize("channels", CHANNELS, ids=str),
    pytest.mark.parametrize("grid", GRIDS, ids=str),
]


class Case:
    """A matrix x [M, C] within a wider buffer, its normalisation, and a 1x1 and a 3x3 weight to k channels."""

    def __init__(self, grid, channels, dtype):
        self.grid, (self.c, self.k) = grid, channels
        rows = torch.Size(grid).numel()
        self.buffer = torch.randn(rows, self.c + 5).to(dtype)
        self.x = self.buffer[:, 2 : 2 + self.c]
        vectors = torch.randn(3, self.c).to(accumulation_dtype(dtype))
        self.affine = Affine(vectors[0] * 0.3, vectors[1], vectors[2] * 0.5)
        ones, threes = [1] * (len(grid) - 1), [3] * (len(grid) - 1)
        self.w1 = (torch.randn(self.k, self.c, *ones) / self.c**0.5).to(dtype)
        self.w3 = (torch.randn(self.k, self.c, *threes) / (3 * self.c**0.5)).to(dtype)
        self.bias = torch.randn(self.k).to(dtype)

    def stock(self, dtype, weight, bias, pool=False):
        """The output [N, k, *spatial], and the leaves x, scale and weight it comes from, in ``dtype``."""
        x, scale, w = (t.detach().to(dtype).clone().requires_grad_() for t in (self.x, self.affine.scale, weight))
        mean, shift = self.affine.mean.to(dtype), self.affine.bias.to(dtype)
        a = to_image(F.relu((x - mean) * scale + shift), self.grid)
        ones = [1] * (len(self.grid) - 1)
        y = torch.convolution(
            a, w, None if bias is None else bias.to(dtype), ones, [s // 2 for s in w.shape[2:]], ones, False, [0], 1
        )
        if pool:
            pooled = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(self.grid) - 2]
            y = pooled(y.to(torch.promote_types(dtype, torch.float32)), 2).to(dtype)
        return y, (x, scale, w)


def close(got, truth, stock, dtype, magnitude=None):
    """No less accurate than stock: twice its error, and the rounding of the result, or of its summands' ``magnitude``
    where they may cancel."""
    scale = truth if magnitude is None else magnitude
    allowed = 2 * (stock.double() - truth).norm() + 4 * torch.finfo(dtype).eps * scale.norm()
    return bool((got.double() - truth).norm() <= allowed)


def assert_gradients(case, dtype, got, weight, grad, pool=False):
    """``got``: scale * D, dW and the sums, against autograd's in float64 and in ``dtype``."""
    results = []
    for working, cotangent in ((torch.float64, grad), (dtype, grad), (torch.float64, grad.abs())):
        y, leaves = case.stock(working, weight, None, pool)
        cotangent = to_image(cotangent, (case.grid[0], *y.shape[2:])).to(working)
        results.append(torch.autograd.grad(y, leaves, cotangent))
    scaled, grad_weight, (sum_d, sum_dx) = got
    (truth_x, truth_scale, truth_w), (stock_x, stock_scale, stock_w), (_, _, magnitude) = results
    assert close(scaled, truth_x, stock_x, dtype)
    assert close(grad_weight.view_as(truth_w), truth_w, stock_w, dtype, magnitude)
    d = truth_x / case.affine.scale.double()
    assert close(sum_d, d.sum(0), (stock_x / case.affine.scale.to(dtype)).sum(0), dtype, d.abs().sum(0))
    dx = d * (case.x.double() - case.affine.mean.double())
    assert close(sum_dx, truth_scale, stock_scale, dtype, dx.abs().sum(0))
    assert sum_d.dtype == sum_dx.dtype == accumulation_dtype(dtype)


def test_channel_statistics(backend, dtype, channels, grid):
    case = Case(grid, channels, dtype)
    statistics = empty_statistics(case.x, case.c, EPS)
    backend.channel_statistics(case.x, statistics)
    assert_statistics(statistics, case.x)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_append_features(backend, dtype, channels, grid, channels_last, masked):
    case = Case(grid, channels, dtype)
    new = torch.randn(grid[0], case.c, *grid[1:]).to(dtype)
    if channels_last:
        new = new.movedim(1, -1).contiguous().movedim(-1, 1)
    dropout = (torch.rand(grid[0], case.c, *grid[1:]) > 0.3, 1.5) if masked else ()
    expected = new * dropout[0] * dropout[1] if masked else new.clone()
    before = case.buffer.clone()
    statistics = empty_statistics(case.x, case.c, EPS)
    backend.append_features(new, case.x, statistics, *dropout)
    assert_statistics(statistics, case.x)
    before[:, 2 : 2 + case.c] = to_matrix(expected)
    assert case.buffer.equal(before)
    case.x.zero_()
    backend.append_features(new, case.x, None, *dropout)
    assert case.buffer.equal(before)
    if masked:
        case.x.copy_(to_matrix(new))
        backend.append_features(to_image(case.x, grid), case.x, statistics, *dropout)
        assert case.buffer.equal(before)
        assert_statistics(statistics, case.x)


@pytest.mark.parametrize("bias", [True, False])
def test_bn_relu_conv1x1(backend, dtype, channels, grid, bias):
    case = Case(grid, channels, dtype)
    bias = case.bias if bias else None
    buffer = torch.full((case.x.shape[0], case.k + 4), 3.0, dtype=dtype)
    z = buffer[:, 1 : 1 + case.k]
    arguments, statistics = (case.x, case.affine, case.w1.flatten(1), bias), empty_statistics(z, case.k, EPS)
    backend.bn_relu_conv1x1(*arguments, z, statistics)
    truth, stock = (to_matrix(case.stock(d, case.w1, bias)[0]) for d in (torch.float64, dtype))
    assert close(z, truth, stock, dtype)
    assert buffer[:, 0].eq(3).all() and buffer[:, 1 + case.k :].eq(3).all()
    assert_statistics(statistics, z)
    again = torch.empty_like(z)
    backend.bn_relu_conv1x1(*arguments, again, None)
    assert again.equal(z)


def test_bn_relu_conv1x1_normalised_again(backend, dtype, channels, grid):
    """``then``: what follows a frozen normalisation is stored, and the 3x3 convolution takes it as it is."""
    case = Case(grid, channels, dtype)
    then = Affine(*torch.randn(3, case.k).to(accumulation_dtype(dtype)))
    buffer = torch.full((case.x.shape[0], case.k + 4), 3.0, dtype=dtype)
    a = buffer[:, 1 : 1 + case.k]
    backend.bn_relu_conv1x1(case.x, case.affine, case.w1.flatten(1), case.bias, a, None, then=then)

    def stock(dtype):
        z = to_matrix(case.stock(dtype, case.w1, case.bias)[0])
        return F.relu((z - then.mean.to(dtype)) * then.scale.to(dtype) + then.bias.to(dtype))

    assert close(a, stock(torch.float64), stock(dtype), dtype)
    assert buffer[:, 0].eq(3).all() and buffer[:, 1 + case.k :].eq(3).all()
    identity = Affine(*(torch.full_like(t, v) for t, v in zip(case.affine, (0.0, 1.0, 0.0))))
    case.x.relu_()
    results = [torch.empty_like(a) for _ in range(2)]
    for affine, out in zip((None, identity), results):
        backend.bn_relu_conv3x3(case.x, affine, case.w3, None, grid, out)
    assert results[0].equal(results[1])


def test_bn_relu_conv1x1_backward(backend, dtype, channels, grid):
    case = Case(grid, channels, dtype)
    grad = torch.randn(case.x.shape[0], case.k).to(dtype)
    buffer = torch.zeros_like(case.buffer)
    grad_x = buffer[:, 2 : 2 + case.c]
    arguments = (grad, case.x, case.affine, case.w1.flatten(1))
    grad_weight, sums = backend.bn_relu_conv1x1_backward(*arguments, grad_x, need_weight=True, need_sums=True)
    assert_gradients(case, dtype, (grad_x.clone(), grad_weight, sums), case.w1, grad)
    assert buffer[:, :2].eq(0).all() and buffer[:, 2 + case.c :].eq(0).all()

    once = grad_x.clone()
    backend.bn_relu_conv1x1_backward(*arguments, grad_x, need_weight=False, need_sums=False)
    assert error(grad_x, 2 * once.double()) <= 2 * torch.finfo(dtype).eps
    other = torch.randn_like(case.buffer)[:, 1 : 1 + case.c]
    for source in (other, other[0].expand_as(other)):
        from_source = torch.full_like(once, torch.nan)
        backend.bn_relu_conv1x1_backward(*arguments, from_source, need_weight=False, need_sums=False, source=source)
        assert error(from_source, source.double() + once.double()) <= 2 * torch.finfo(dtype).eps
    nothing = backend.bn_relu_conv1x1_backward(*arguments, None, need_weight=False, need_sums=False)
    assert nothing == (None, None)
    assert backend.bn_relu_conv1x1_backward(*arguments, None, need_weight=True, need_sums=False)[0].equal(grad_weight)


def test_bn_relu_conv1x1_backward_completes_its_gradient(backend, dtype, channels, grid):
    case = Case(grid, channels, dtype)
    rows = case.x.shape[0]
    buffers = torch.randn(2, rows, case.k + 3).to(dtype)
    z, grad = buffers[:, :, 1 : 1 + case.k]
    vectors = torch.randn(3, case.k).to(accumulation_dtype(dtype))
    through = ThroughStatistics(z, *vectors, 2 * rows)
    results = []
    for complete in (True, False):
        grad_x = torch.zeros_like(case.x)
        dz = buffers[1].clone()[:, 1 : 1 + case.k]
        dz = backend.finalise_gradient(grad, through, dz) if complete else dz
        unfinished = Unfinished(None if complete else through)
        arguments = (dz, case.x, case.affine, case.w1.flatten(1), grad_x)
        options = dict(need_weight=True, need_sums=True, unfinished=unfinished)
        grad_weight, sums = backend.bn_relu_conv1x1_backward(*arguments, **options)
        results.append((grad_x, grad_weight, *sums))
    for got, expected in zip(*results):
        assert got.equal(expected)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_bn_relu_conv3x3(backend, dtype, channels, grid, bias, mask):
    case = Case(grid, channels, dtype)
    bias = case.bias if bias else None
    buffer = torch.full((case.x.shape[0], case.k + 4), 3.0, dtype=dtype)
    out = buffer[:, 1 : 1 + case.k]
    mask = torch.rand(grid[0], case.k, *grid[1:]) > 0.5 if mask else None
    statistics = empty_statistics(out, case.k, EPS)
    options = dict(mask=mask, keep_scale=2.0, statistics=statistics)
    backend.bn_relu_conv3x3(case.x, case.affine, case.w3, bias, grid, out, **options)
    truth, stock = (case.stock(d, case.w3, bias)[0] for d in (torch.float64, dtype))
    if mask is not None:
        truth, stock = truth * mask * 2, stock * mask * 2
    assert close(out, to_matrix(truth), to_matrix(stock), dtype)
    assert_statistics(statistics, out)
    assert buffer[:, 0].eq(3).all() and buffer[:, 1 + case.k :].eq(3).all()


def test_bn_relu_conv3x3_backward(backend, dtype, channels, grid):
    case = Case(grid, channels, dtype)
    wide = torch.randn(case.x.shape[0], case.k + 3).to(dtype)
    grad = wide[:, 1 : 1 + case.k]
    buffer = torch.full((case.x.shape[0], case.c + 4), 3.0, dtype=dtype)
    scaled = buffer[:, 1 : 1 + case.c]
    arguments = (grad, case.x, case.affine, case.w3, grid)
    grad_weight, sums = backend.bn_relu_conv3x3_backward(*arguments, scaled, need_weight=True)
    assert_gradients(case, dtype, (scaled, grad_weight, sums), case.w3, grad)
    assert buffer[:, 0].eq(3).all() and buffer[:, 1 + case.c :].eq(3).all()
    only_weight = backend.bn_relu_conv3x3_backward(*arguments, None, need_weight=True)
    assert only_weight[1] is None
    assert error(only_weight[0], grad_weight) <= 2 * torch.finfo(dtype).eps
    if len(grid) == 3:
        channels_last = case.w3.to(memory_format=torch.channels_last)
        other = backend.bn_relu_conv3x3_backward(*arguments[:3], channels_last, grid, scaled, need_weight=True)
        assert error(other[0], grad_weight) <= 2 * torch.finfo(dtype).eps
        assert_gradients(case, dtype, (scaled, *other), case.w3, grad)
    again = torch.empty_like(case.x)
    only_input = backend.bn_relu_conv3x3_backward(*arguments, again, need_weight=False)
    assert only_input[0] is None and error(again, scaled) <= 2 * torch.finfo(dtype).eps
    total = torch.randn_like(buffer)[:, 1 : 1 + case.c]
    expected = total + again
    total_sums = backend.bn_relu_conv3x3_backward(*arguments, total, need_weight=False, source=total)[1]
    assert error(total, expected) <= 4 * torch.finfo(dtype).eps
    assert all(a.equal(b) for a, b in zip(total_sums, only_input[1]))


def test_finalise_gradient(backend, dtype, channels, grid):
    case = Case(grid, channels, dtype)
    grad = torch.randn_like(case.buffer)[:, 1 : 1 + case.c]
    p, q = torch.randn(2, case.c).to(accumulation_dtype(dtype))
    for count in (case.x.shape[0], torch.tensor(3.0 * case.x.shape[0], dtype=torch.float64)):
        buffer = torch.zeros_like(case.buffer)
        through = ThroughStatistics(case.x, case.affine.mean, p, q, count)
        backend.finalise_gradient(grad, through, buffer[:, 3 : 3 + case.c])
        got = buffer[:, 3 : 3 + case.c].clone()
        centred = case.x.double() - case.affine.mean.double()
        truth = grad.double() + (p.double() + 2 * q.double() * centred) / float(count)
        assert error(got, truth) <= 2 * torch.finfo(dtype).eps
        assert buffer[:, :3].eq(0).all() and buffer[:, 3 + case.c :].eq(0).all()
        in_place = grad.clone()
        backend.finalise_gradient(in_place, through, in_place)
        assert in_place.equal(got)


@pytest.mark.parametrize("bias", [True, False])
def test_bn_relu_pool_conv1x1(backend, dtype, channels, grid, bias):
    if min(grid[1:]) < 2:
        grid = (grid[0], *(size + 1 for size in grid[1:]))
    case = Case(grid, channels, dtype)
    bias = case.bias if bias else None
    arguments = (case.x, case.affine, case.w1.flatten(1), bias, grid)
    statistics = empty_statistics(case.x, case.k, EPS)
    out = backend.bn_relu_pool_conv1x1(*arguments, statistics)
    truth, stock = (to_matrix(case.stock(d, case.w1, bias, pool=True)[0]) for d in (torch.float64, dtype))
    assert close(out, truth, stock, dtype) and out.dtype == dtype
    assert_statistics(statistics, out)
    assert backend.bn_relu_pool_conv1x1(*arguments, None).equal(out)


def test_bn_relu_pool_conv1x1_backward(backend, dtype, channels, grid):
    if min(grid[1:]) < 2:
        grid = (grid[0], *(size + 1 for size in grid[1:]))
    case = Case(grid, channels, dtype)
    grad = torch.randn(torch.Size((grid[0], *(size // 2 for size in grid[1:]))).numel(), case.k).to(dtype)
    arguments = (grad, case.x, case.affine, case.w1.flatten(1), grid)
    got = backend.bn_relu_pool_conv1x1_backward(*arguments, need_input=True, need_weight=True)
    assert_gradients(case, dtype, got, case.w1, grad, pool=True)
    only_weight = backend.bn_relu_pool_conv1x1_backward(*arguments, need_input=False, need_weight=True)
    assert only_weight[0] is None and only_weight[1].equal(got[1]) and only_weight[2] is None
    assert backend.bn_relu_pool_conv1x1_backward(*arguments, need_input=True, need_weight=False)[1] is None
