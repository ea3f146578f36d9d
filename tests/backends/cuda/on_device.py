"""The CUDA kernels' results: on a GPU if there is one, else emulated on CPU tensors.

``test_emulation.py`` runs this file on CPUs, ``make gpu`` on a GPU. The truth is autograd's in float64: the gradients
that reach a normalisation's weight, bias, mean and variance are what the kernels collect.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

from densenet_fast.backends import cuda_kernels as kernels
from densenet_fast.backends.affine import Norm, ThroughStatistics, accumulation_dtype
from densenet_fast.backends.layout import to_image, to_matrix

assert kernels.unavailable() is None, kernels.unavailable()
DEVICE = "cpu" if kernels.emulated() else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GRIDS = [(2, 5, 7), (1, 1, 1), (2, 9), (2, 3, 4, 2), (3, 40, 13)]
COLUMNS = [
    (1, 2, 5),
    (5, 1, 7),
    (24, 8, 40),
    (12, 0, 32),
    (33, 8, 48),
    (64, 0, 64),
    (288, 32, 320),
    (300, 4, 308),
    (33, 8, 41),
]
"""Columns C, the first of them, and the buffer's: aligned to 16 bytes with and without a tail, and not aligned."""
FEW = [(0, 2), (0, 4), (0, 7), (1, 3), (1, 8), (1, 7), (2, 1), (2, 5), (3, 2), (3, 0), (4, 3), (4, 0)]
SHAPES = list(itertools.product(GRIDS, COLUMNS)) if DEVICE == "cuda" else [(GRIDS[i], COLUMNS[j]) for i, j in FEW]
EPS = 1e-3

by_shape = pytest.mark.parametrize("grid, columns", SHAPES, ids=str)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def every(function):
    """Over all shapes and dtypes."""
    return by_shape(by_dtype(function))


@pytest.fixture(autouse=True)
def default_device():
    with torch.device(DEVICE):
        yield


def column_range(rows, columns, dtype):
    """The columns of a wider buffer, and the buffer."""
    cols, first, width = columns
    buffer = torch.randn(rows, width).to(dtype)
    return buffer[:, first : first + cols], buffer


def rounding(dtype):
    return 2 * torch.finfo(dtype).eps


def close(got, truth, tolerance, magnitude=None):
    """Within a relative error of the truth, or of its summands' magnitude."""
    scale = (truth if magnitude is None else magnitude).double().norm()
    return bool((got.double() - truth.double()).norm() <= tolerance * scale + 1e-30)


class Case:
    """x [M, C], a normalisation of it with a weight and a bias of x's dtype, and P and Q."""

    def __init__(self, grid, columns, dtype, affine=True):
        self.grid, self.cols, self.dtype = grid, columns[0], dtype
        self.vector_dtype = accumulation_dtype(dtype)
        self.x, self.buffer = column_range(torch.Size(grid).numel(), columns, dtype)
        mean, weight, bias, p, q = torch.randn(5, self.cols)
        var = torch.rand(self.cols, dtype=self.vector_dtype) + 0.5
        parameters = (weight.to(dtype), bias.to(dtype)) if affine else (None, None)
        self.norm = Norm(mean.to(self.vector_dtype) * 0.3, var, *parameters, EPS)
        self.into = p.to(self.vector_dtype), q.to(self.vector_dtype)

    def differentiable(self):
        """relu(bn(x)) [N, C, *spatial] in float64, and the leaves x, weight, bias, mean and var."""
        cols, given = self.cols, self.norm
        weight = torch.ones(cols) if given.weight is None else given.weight
        bias = torch.zeros(cols) if given.bias is None else given.bias
        leaves = [t.double().clone().requires_grad_() for t in (self.x, weight, bias, given.mean, given.var)]
        x, weight, bias, mean, var = leaves
        y = F.relu((x - mean) * (weight * torch.rsqrt(var + EPS)) + bias)
        return to_image(y, self.grid), leaves

    def assert_gradients(self, y, leaves, grad, run):
        """``run(collect_into)`` against autograd's gradients, with and without P and Q."""
        by_x, *by_vectors = torch.autograd.grad(y, leaves, grad.double())
        x, _, bias, mean, var = leaves
        r = torch.rsqrt(var + EPS).detach()
        d = (by_x / (leaves[1].detach() * r)).detach().abs()
        centred = (x - mean).detach().abs()
        magnitudes = [
            (r * d * centred).sum(0),
            d.sum(0),
            (leaves[1] * r * d).sum(0),
            (leaves[1] * r**3 * d * centred).sum(0),
        ]
        tolerance = 1e-12 if self.dtype == torch.float64 else 1e-5
        into = tuple(t.clone() for t in self.into)
        scaled, gradients = run(into)
        again, gradients_again = run(None)
        assert scaled.equal(again) and all(a.equal(b) for a, b in zip(gradients, gradients_again))
        assert scaled.dtype == self.dtype and close(scaled, by_x, 2 * rounding(self.dtype))
        got = (*gradients, *(after.double() - before for after, before in zip(into, self.into)))
        for value, truth, magnitude, start in zip(got, by_vectors, magnitudes, (0, 0, *self.into)):
            assert value.isfinite().all()
            assert close(value, truth, tolerance, magnitude.abs() + abs(start) + truth.abs())


def assert_statistics(statistics, stored):
    var, mean = torch.var_mean(stored.double(), 0, correction=0)
    tolerance = 1e-12 if stored.dtype == torch.float64 else 2e-6
    magnitude = stored.double().square().mean(0)
    assert close(statistics[0], mean, tolerance, magnitude.sqrt()) and close(statistics[1], var, tolerance, magnitude)


def empty_statistics(cols, dtype):
    """Views of a packed vector, what is around them still NaN."""
    packed = torch.full((2, cols + 6), torch.nan, dtype=accumulation_dtype(dtype))
    return packed, (packed[0, 3 : 3 + cols], packed[1, 3 : 3 + cols])


@every
def test_channel_statistics(grid, columns, dtype):
    case = Case(grid, columns, dtype)
    packed, statistics = empty_statistics(case.cols, dtype)
    kernels.channel_statistics(case.x, statistics)
    assert_statistics(statistics, case.x)
    assert packed.isnan().sum() == 12


SOURCES = {
    "contiguous": lambda n, c, s: torch.randn(n, c, *s),
    "channels last": lambda n, c, s: torch.randn(n, *s, c).movedim(-1, 1),
    "columns": lambda n, c, s: torch.randn(n, *s, c + 8)[..., 8:].movedim(-1, 1),
    "every other pixel": lambda n, c, s: torch.randn(n, *(2 * k for k in s), c).movedim(-1, 1)[
        (..., *(slice(1, None, 2) for _ in s))
    ],
    "one value": lambda n, c, s: torch.randn(n, 1, *[1] * len(s)).expand(n, c, *s),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("source", SOURCES)
@every
def test_append_features(grid, columns, dtype, source, masked):
    case = Case(grid, columns, dtype)
    new = SOURCES[source](grid[0], case.cols, grid[1:]).to(dtype)
    mask = torch.rand(grid[0], case.cols, *grid[1:]) > 0.3 if masked else None
    expected = case.buffer.clone()
    first = columns[1]
    dropped = new if mask is None else new * mask * 1.5
    expected[:, first : first + case.cols] = to_matrix(dropped)
    packed, statistics = empty_statistics(case.cols, dtype)
    kernels.append_features(new, case.x, statistics, mask, 1.5)
    assert case.buffer.equal(expected)
    assert_statistics(statistics, case.x)
    assert packed.isnan().sum() == 12
    case.x.zero_()
    kernels.append_features(new, case.x, None, mask, 1.5)
    assert case.buffer.equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_statistics_of_many_rows_far_from_zero(dtype):
    """More tiles than are combined at once, and a mean that is large against the deviation."""
    spread, mean = (1e-2, 100) if dtype != torch.bfloat16 else (1, 30)
    x = (torch.randn(5000 if DEVICE == "cpu" else 3_000_000, 12) * spread + mean).to(dtype)
    _, (got_mean, got_var) = empty_statistics(12, dtype)
    kernels.channel_statistics(x, (got_mean, got_var))
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    assert close(got_mean, mean, tolerance) and close(got_var, var, 100 * tolerance)


@every
def test_finalise_gradient(grid, columns, dtype):
    case = Case(grid, columns, dtype)
    rows = case.x.shape[0]
    grad, _ = column_range(rows, columns, dtype)
    p, q = case.into
    truth = grad.double() + (p.double() + 2 * q.double() * (case.x.double() - case.norm.mean.double())) / 7
    for count in (7, torch.tensor(7.0, dtype=torch.float64)):
        through = ThroughStatistics(case.x, case.norm.mean, p, q, count)
        out, buffer = column_range(rows, columns, dtype)
        before = buffer.clone()
        assert kernels.finalise_gradient(grad, through, out) is out
        assert close(out, truth, rounding(dtype))
        before[:, columns[1] : columns[1] + case.cols] = out
        assert buffer.equal(before)
        in_place = grad.clone()
        kernels.finalise_gradient(in_place, through, in_place)
        assert in_place.equal(out)


def max_pool(a):
    return to_matrix((F.max_pool1d, F.max_pool2d, F.max_pool3d)[a.dim() - 3](a, 3, 2, 1))


@every
def test_bn_relu_maxpool(grid, columns, dtype):
    case = Case(grid, columns, dtype)
    activation, leaves = case.differentiable()
    truth = max_pool(activation)
    out, argmax = kernels.bn_relu_maxpool(case.x, case.norm, grid)
    assert out.dtype == dtype and close(out, truth, rounding(dtype))
    grad, _ = column_range(out.shape[0], columns, dtype)

    def run(into):
        return kernels.bn_relu_maxpool_backward(grad, argmax, case.x, case.norm, grid, into)

    case.assert_gradients(truth, leaves, grad, run)


@every
def test_bn_relu_global_avgpool(grid, columns, dtype):
    case = Case(grid, columns, dtype)
    activation, leaves = case.differentiable()
    truth = activation.flatten(2).mean(2)
    out = kernels.bn_relu_global_avgpool(case.x, case.norm, grid)
    assert out.dtype == dtype and close(out, truth, rounding(dtype))
    grad, _ = column_range(grid[0], columns, dtype)

    def run(into):
        return kernels.bn_relu_global_avgpool_backward(grad, case.x, case.norm, grid, into)

    case.assert_gradients(truth, leaves, grad, run)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fold_and_collect(dtype, parameters, affine):
    for cols in (1, 37, 600):
        case = Case((1, 1, 1), (cols, 0, cols), dtype, affine)
        norm = case.norm
        if affine:
            norm = norm._replace(weight=norm.weight.to(parameters), bias=norm.bias.to(parameters))
        got = kernels.fold(norm)
        r = torch.rsqrt(norm.var.double() + EPS)
        scale = r if norm.weight is None else norm.weight.double() * r
        assert got.mean.equal(norm.mean) and close(got.scale, scale, rounding(dtype))
        assert got.shift.equal(torch.zeros_like(norm.mean) if norm.bias is None else norm.bias.to(dtype))
        sums = torch.randn(cols, dtype=dtype), torch.randn(cols, dtype=dtype)
        p, q = (t.clone() for t in case.into)
        grad_weight, grad_bias = kernels.collect(sums, norm, p, q)
        assert grad_bias.equal(sums[0]) and close(grad_weight, r * sums[1].double(), rounding(dtype))
        added = scale * sums[0].double(), scale * r**2 * sums[1].double() / 2
        for after, before, part in zip((p, q), case.into, added):
            assert close(after, before - part, 2 * rounding(dtype), before.abs() + part.abs())
        assert kernels.collect(sums, norm, None, None)[0].equal(grad_weight)


def test_nan_and_equal_maxima_are_stocks():
    grid, cols = (2, 7, 6), 8
    x = torch.randn(84, cols).round()
    x[torch.rand(84, cols) < 0.1] = torch.nan
    norm = Norm(torch.zeros(cols), torch.ones(cols), None, None, 0.0)
    out, argmax = kernels.bn_relu_maxpool(x, norm, grid)
    stock, index = F.max_pool2d(F.relu(to_image(x, grid)), 3, 2, 1, return_indices=True)
    assert out.isnan().any() and out.nan_to_num(-1).equal(to_matrix(stock).nan_to_num(-1))
    rows, columns = (torch.arange(n).view(shape) for n, shape in ((4, (4, 1)), (3, (1, 3))))
    positions = 3 * (index // 6 - 2 * rows + 1) + index % 6 - 2 * columns + 1
    assert argmax.long().equal(to_matrix(positions))


def test_wrong_arguments_raise():
    x, vector = torch.randn(6, 4), torch.randn(4)
    norm = Norm(vector, vector.abs(), None, None, EPS)
    through = ThroughStatistics(x, vector, vector, vector, 6)
    bad = [
        (lambda: kernels.channel_statistics(x, (vector[:3], vector)), "mean: expected 4 contiguous float32 values"),
        (lambda: kernels.channel_statistics(x.long(), (vector, vector)), "x: expected float32, float64, float16"),
        (lambda: kernels.append_features(x, x[:5], None), r"out: expected a matrix \[6, 4\]"),
        (lambda: kernels.append_features(x, x, None, torch.ones(6, 3) > 0), r"mask: expected \[6, 4\], got \[6, 3\]"),
        (lambda: kernels.finalise_gradient(x.double(), through, x), "grad: dtype unlike the others'"),
        (lambda: kernels.bn_relu_maxpool(x, norm, (1, 2, 4)), "grid: expected the product 6, got 8"),
        (lambda: kernels.bn_relu_maxpool(x, norm._replace(weight=vector[:2]), (1, 2, 3)), "weight: expected 4"),
        (lambda: kernels.bn_relu_global_avgpool(x, norm, (4, 2)), r"images: expected a divisor of x's rows, got 4"),
        (lambda: kernels.fold(Norm(vector[:0], vector[:0], None, None, EPS)), "fold: x: expected at least one value"),
    ]
    for call, message in bad:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_schemas_name_what_is_changed():
    x, mean, var, p, q = torch.randn(12, 8), *torch.rand(4, 8)
    norm, ops = (mean, var, None, None, EPS), torch.ops.densenet_fast
    argmax = torch.zeros(4, 8, dtype=torch.uint8)
    calls = [
        (ops.cuda_append_features, (x.clone(), None, 1.0, x, p, q, 0)),
        (ops.cuda_finalise_gradient, (x.clone(), x.clone(), mean, p, q, None, 3.0, x, 0)),
        (ops.cuda_fold, (*norm, 0)),
        (ops.cuda_collect, (mean, var, *norm, p, q, 0)),
        (ops.cuda_bn_relu_maxpool, (x, *norm, (1, 3, 4), 0)),
        (ops.cuda_bn_relu_maxpool_backward, (x[:4], argmax, x, *norm, (1, 3, 4), p, q, 0)),
        (ops.cuda_bn_relu_global_avgpool, (x, *norm, 2, 0)),
        (ops.cuda_bn_relu_global_avgpool_backward, (x[:2], x, *norm, 2, p, q, 0)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils="test_schema")


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: emulated threads run in one order")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_over_ten_runs(dtype):
    case = Case((64, 56, 56), (64, 0, 256), dtype)
    results = []
    for _ in range(10):
        _, statistics = empty_statistics(64, dtype)
        kernels.channel_statistics(case.x, statistics)
        out, argmax = kernels.bn_relu_maxpool(case.x, case.norm, case.grid)
        scaled, gradients = kernels.bn_relu_maxpool_backward(out, argmax, case.x, case.norm, case.grid)
        results.append((*statistics, out, argmax, scaled, *gradients))
    assert all(a.equal(b) for result in results[1:] for a, b in zip(result, results[0]))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: four gigabytes of features")
def test_more_than_two_to_the_31_elements():
    rows, width = (1 << 31) // 1024 + 77, 1024
    buffer = torch.zeros(rows, width, dtype=torch.bfloat16)
    new = torch.randn(77, 32, dtype=torch.bfloat16)
    tail = buffer[:, -32:]
    tail[-77:] = new
    out = torch.empty(rows, 32, dtype=torch.bfloat16)
    kernels.append_features(tail, out, None)
    assert out[-77:].equal(new) and out[:-77].eq(0).all()
    kernels.append_features(out, buffer[:, :32], None)
    assert buffer[-77:, :32].equal(new)
    statistics = torch.empty(32), torch.empty(32)
    kernels.channel_statistics(buffer[:, -32:], statistics)
    assert_statistics(statistics, out)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs and streams")
def test_captured_in_a_cuda_graph():
    case = Case((2, 14, 14), (64, 0, 128), torch.bfloat16)
    statistics = torch.empty(64), torch.empty(64)

    def run():
        kernels.channel_statistics(case.x, statistics)
        return kernels.bn_relu_maxpool(case.x, case.norm, case.grid)[0]

    expected = run().clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    statistics[0].zero_()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert captured.equal(expected)
    assert_statistics(statistics, case.x)
