"""The CUDA kernels' results: on a GPU if there is one, else emulated on CPU tensors.

``test_emulation.py`` runs this file on CPUs, ``make gpu`` on a GPU. The truth is autograd's in float64: the sums
that kernels return are the gradients that reach an affine's scale and shift.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_fast.backends import aten, cuda
from densenet_fast.backends import cuda_kernels as kernels
from densenet_fast.backends.affine import Affine, Statistics, ThroughStatistics, accumulation_dtype
from densenet_fast.backends.layout import to_image, to_matrix

pytestmark = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))
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
    (13, 4, 20),
    (13, 2, 22),
    (14, 2, 22),
]
"""Columns C, the first of them, and the buffer's: aligned to 16 bytes and to 8, with and without a tail, and not."""
FEW = {0: (2, 4, 7, 9, 10, 11), 1: (3, 8, 7), 2: (1, 5), 3: (2, 0), 4: (3, 0)}
SHAPES = list(itertools.product(GRIDS, COLUMNS))
if DEVICE == "cpu":
    SHAPES = [(GRIDS[i], COLUMNS[j]) for i, those in FEW.items() for j in those]
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
    """x [M, C], its affine, and P and Q."""

    def __init__(self, grid, columns, dtype):
        self.grid, self.cols, self.dtype = grid, columns[0], dtype
        self.x, self.buffer = column_range(torch.Size(grid).numel(), columns, dtype)
        mean, scale, shift, p, q = torch.randn(5, self.cols).to(accumulation_dtype(dtype)).unbind()
        self.affine = Affine(mean * 0.3, scale, shift)
        self.p, self.q = p, q

    def differentiable(self):
        """relu(bn(x)) [N, C, *spatial] in float64, and the leaves x, scale and shift."""
        leaves = [t.double().clone().requires_grad_() for t in (self.x, self.affine.scale, self.affine.bias)]
        x, scale, shift = leaves
        return to_image(F.relu((x - self.affine.mean.double()) * scale + shift), self.grid), leaves

    def assert_gradients(self, y, leaves, grad, run):
        """``run()``, which returns scale * D and (sum D, sum D * (x - mean)), against autograd's gradients."""
        by_x, by_scale, by_shift = torch.autograd.grad(y, leaves, grad.double())
        x, scale, _ = leaves
        d = (by_x / scale).detach().abs()
        centred = (x - self.affine.mean.double()).detach().abs()
        tolerance = 1e-12 if self.dtype == torch.float64 else 1e-5
        scaled, (sum_d, sum_dx) = run()
        assert scaled.dtype == self.dtype and close(scaled, by_x, 2 * rounding(self.dtype))
        assert close(sum_d, by_shift, tolerance, d.sum(0)) and close(sum_dx, by_scale, tolerance, (d * centred).sum(0))
        assert {sum_d.dtype, sum_dx.dtype} == {accumulation_dtype(self.dtype)}


def assert_statistics(statistics, stored):
    var, mean = torch.var_mean(stored.double(), 0, correction=0)
    tolerance = 1e-12 if stored.dtype == torch.float64 else 2e-6
    magnitude = stored.double().square().mean(0)
    assert close(statistics.mean, mean, tolerance, magnitude.sqrt())
    assert close(statistics.var, var, tolerance, magnitude)
    rstd = torch.rsqrt(statistics.var.double() + statistics.eps)
    assert close(statistics.rstd, rstd, rounding(statistics.var.dtype))


def empty_statistics(cols, dtype):
    """Views of a packed vector, what is around them still NaN."""
    packed = torch.full((3, cols + 6), torch.nan, dtype=accumulation_dtype(dtype))
    return packed, Statistics(*packed[:, 3 : 3 + cols], EPS)


@every
def test_channel_statistics(grid, columns, dtype):
    case = Case(grid, columns, dtype)
    packed, statistics = empty_statistics(case.cols, dtype)
    kernels.channel_statistics(case.x, statistics)
    assert_statistics(statistics, case.x)
    assert packed.isnan().sum() == 18


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
    assert packed.isnan().sum() == 18
    case.x.zero_()
    kernels.append_features(new, case.x, None, mask, 1.5)
    assert case.buffer.equal(expected)


class Operations(TorchDispatchMode):
    """The names of the operations of a ``with`` block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


@by_dtype
def test_dropout_and_statistics_take_one_pass_over_what_torchs_convolution_makes(dtype):
    grid, rows = (2, 9), 18
    x, affine = torch.randn(rows, 24).to(dtype), Affine(*torch.randn(3, 24).to(accumulation_dtype(dtype)))
    weight, mask = (torch.randn(12, 24, 3) / 8).to(dtype), torch.rand(2, 12, 9) > 0.3
    out, (_, statistics) = torch.empty(rows, 12, dtype=dtype), empty_statistics(12, dtype)
    with Operations() as operations:
        cuda.bn_relu_conv3x3(x, affine, weight, None, grid, out, mask=mask, keep_scale=1.5, statistics=statistics)
    made = operations.names.index("aten::convolution")
    views = ("aten::view", "aten::permute", "aten::alias", "aten::detach")
    after = [name for name in operations.names[made + 1 :] if name not in views]
    assert after == ["densenet_fast::cuda_append_features"]
    plain, again = torch.empty_like(out), empty_statistics(12, dtype)[1]
    aten.bn_relu_conv3x3(x, affine, weight, None, grid, plain, mask=mask, keep_scale=1.5, statistics=again)
    assert out.eq(0).equal(plain.eq(0)) and close(out, plain, 2 * rounding(dtype))
    assert_statistics(statistics, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_statistics_of_many_rows_far_from_zero(dtype):
    """More tiles than are combined at once, and a mean that is large against the deviation."""
    spread, mean = (1e-2, 100) if dtype != torch.bfloat16 else (1, 30)
    x = (torch.randn(5000 if DEVICE == "cpu" else 3_000_000, 12) * spread + mean).to(dtype)
    _, got = empty_statistics(12, dtype)
    kernels.channel_statistics(x, got)
    var, mean = torch.var_mean(x.double(), 0, correction=0)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    assert close(got.mean, mean, tolerance) and close(got.var, var, 100 * tolerance)
    identity = Affine(*(torch.full_like(got.mean, value) for value in (0, 1, 0)))
    out, _ = kernels.bn_relu_maxpool(x, identity, (1, len(x)), got)
    var, mean = torch.var_mean(out.double(), 0, correction=0)
    assert close(got.mean, mean, tolerance) and close(got.var, var, 100 * tolerance)


@every
def test_finalise_gradient(grid, columns, dtype):
    case = Case(grid, columns, dtype)
    rows = case.x.shape[0]
    grad, _ = column_range(rows, columns, dtype)
    mean, p, q = case.affine.mean, case.p, case.q
    truth = grad.double() + (p.double() + 2 * q.double() * (case.x.double() - mean.double())) / 7
    for count in (7, torch.tensor(7.0, dtype=torch.float64)):
        through = ThroughStatistics(case.x, mean, p, q, count)
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
    packed, statistics = empty_statistics(case.cols, dtype)
    out, argmax = kernels.bn_relu_maxpool(case.x, case.affine, grid, statistics)
    assert out.dtype == dtype and close(out, truth, rounding(dtype))
    assert_statistics(statistics, out)
    assert packed.isnan().sum() == 18
    without = kernels.bn_relu_maxpool(case.x, case.affine, grid, None)
    assert without[0].equal(out) and without[1].equal(argmax)
    grad, _ = column_range(out.shape[0], columns, dtype)

    def run():
        return kernels.bn_relu_maxpool_backward(grad, argmax, case.x, case.affine, grid)

    case.assert_gradients(truth, leaves, grad, run)


@every
def test_bn_relu_global_avgpool(grid, columns, dtype):
    case = Case(grid, columns, dtype)
    activation, leaves = case.differentiable()
    truth = activation.flatten(2).mean(2)
    out = kernels.bn_relu_global_avgpool(case.x, case.affine, grid)
    assert out.dtype == dtype and close(out, truth, rounding(dtype))
    grad, _ = column_range(grid[0], columns, dtype)

    def run():
        return kernels.bn_relu_global_avgpool_backward(grad, case.x, case.affine, grid)

    case.assert_gradients(truth, leaves, grad, run)


def test_nan_and_equal_maxima_are_stocks():
    grid, cols = (2, 7, 6), 8
    x = torch.randn(84, cols).round()
    x[torch.rand(84, cols) < 0.1] = torch.nan
    affine = Affine(torch.zeros(cols), torch.ones(cols), torch.zeros(cols))
    _, statistics = empty_statistics(cols, torch.float32)
    out, argmax = kernels.bn_relu_maxpool(x, affine, grid, statistics)
    stock, index = F.max_pool2d(F.relu(to_image(x, grid)), 3, 2, 1, return_indices=True)
    assert out.isnan().any() and out.nan_to_num(-1).equal(to_matrix(stock).nan_to_num(-1))
    assert statistics.mean.isnan().equal(out.isnan().any(0)) and statistics.var.isnan().equal(out.isnan().any(0))
    rows, columns = (torch.arange(n).view(shape) for n, shape in ((4, (4, 1)), (3, (1, 3))))
    positions = 3 * (index // 6 - 2 * rows + 1) + index % 6 - 2 * columns + 1
    assert argmax.long().equal(to_matrix(positions))


def test_wrong_arguments_raise():
    x, vector = torch.randn(6, 4), torch.randn(4)
    affine, own = Affine(vector, vector, vector), Statistics(vector, vector, vector, EPS)
    through = ThroughStatistics(x, vector, vector, vector, 6)
    bad = [
        (lambda: kernels.channel_statistics(x, own._replace(mean=vector[:3])), "mean: expected 4 contiguous float32"),
        (lambda: kernels.channel_statistics(x, own._replace(rstd=None)), "mean, var and rstd: expected all or none"),
        (lambda: kernels.channel_statistics(x.long(), own), "x: expected float32, float64, float16"),
        (lambda: kernels.channel_statistics(x[:0], own), r"x: expected at least one value, got \[0, 4\]"),
        (lambda: kernels.append_features(x, x[:5], None), r"out: expected a matrix \[6, 4\]"),
        (lambda: kernels.append_features(x, x, None, torch.ones(6, 3) > 0), r"mask: expected \[6, 4\], got \[6, 3\]"),
        (lambda: kernels.finalise_gradient(x.double(), through, x), "grad: dtype unlike the others'"),
        (lambda: kernels.bn_relu_maxpool(x, affine, (1, 2, 4), None), "grid: expected the product 6, got 8"),
        (lambda: kernels.bn_relu_maxpool(x, affine._replace(rstd=vector[:2]), (1, 2, 3), None), "rstd: expected 4"),
        (
            lambda: kernels.bn_relu_maxpool(x, affine._replace(bias=vector.double()), (1, 2, 3), None),
            "bias: expected 4 contiguous float32",
        ),
        (
            lambda: kernels.bn_relu_global_avgpool(x, affine._replace(weight=vector.half()), (1, 6)),
            "weight: expected 4 contiguous float32",
        ),
        (lambda: kernels.bn_relu_global_avgpool(x.half(), affine._replace(weight=vector.half()[:3]), (1, 6)), "weight"),
        (lambda: kernels.bn_relu_maxpool(x, affine, (1, 2, 3), own._replace(var=None)), "rstd: expected all or none"),
        (lambda: kernels.bn_relu_global_avgpool(x, affine, (4, 2)), r"images: expected a divisor of x's rows, got 4"),
    ]
    for call, message in bad:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_schemas_name_what_is_changed():
    x, vectors = torch.randn(12, 8), torch.rand(3, 8).unbind()
    affine, ops = Affine(*torch.rand(3, 8)), torch.ops.densenet_fast
    argmax = torch.zeros(4, 8, dtype=torch.uint8)
    asked, sums = [*torch.rand(6, 8).unbind(), None, None], [*[None] * 6, *torch.rand(2, 8).unbind()]
    calls = [
        (ops.cuda_append_features, (x.clone(), None, 1.0, x, *vectors, EPS, 0)),
        (ops.cuda_finalise_gradient, (x.clone(), x.clone(), *vectors, None, 3.0, x, 0)),
        (ops.cuda_bn_relu_maxpool, (x, *affine, (1, 3, 4), *vectors, EPS, 0)),
        (ops.cuda_bn_relu_maxpool_backward, (x[:4], argmax, x, *affine, (1, 3, 4), *asked, 0)),
        (ops.cuda_bn_relu_global_avgpool, (x, *affine, 2, 0)),
        (ops.cuda_bn_relu_global_avgpool_backward, (x[:2], x, *affine, 2, *sums, 0)),
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
        _, of_maxima = empty_statistics(64, dtype)
        out, argmax = kernels.bn_relu_maxpool(case.x, case.affine, case.grid, of_maxima)
        scaled, sums = kernels.bn_relu_maxpool_backward(out, argmax, case.x, case.affine, case.grid)
        results.append((*statistics[:3], *of_maxima[:3], out, argmax, scaled, *sums))
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
    _, statistics = empty_statistics(32, torch.bfloat16)
    kernels.channel_statistics(buffer[:, -32:], statistics)
    assert_statistics(statistics, out)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs and streams")
def test_captured_in_a_cuda_graph():
    case = Case((2, 14, 14), (64, 0, 128), torch.bfloat16)
    _, statistics = empty_statistics(64, torch.bfloat16)

    def run():
        kernels.channel_statistics(case.x, statistics)
        return kernels.bn_relu_maxpool(case.x, case.affine, case.grid, None)[0]

    expected = run().clone()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    statistics.mean.zero_()
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert captured.equal(expected)
    assert_statistics(statistics, case.x)
