"""The 3x3 convolution in CUDA C++ and its gradients: on a GPU if there is one, else emulated on CPU tensors.

``test_emulation.py`` runs this file on CPUs, ``make gpu`` on a GPU. The truth is ``aten``'s in float64; results in half
precision may be off by twice what torch's own convolution is.
"""

import pytest
import torch

from backends.cuda.on_device import DEVICE, assert_statistics
from densenet_fast.backends import aten, cuda_conv3x3
from densenet_fast.backends import cuda_kernels as kernels
from densenet_fast.backends.affine import Affine, ThroughStatistics, empty_statistics
from densenet_fast.backends.triton import config
from densenet_fast.backends.triton.config import Device
from launches.conv3x3_counts import Conv3x3

pytestmark = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))
DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [
    # grid, B, k, the first column of Y and dY in a wider buffer
    ((1, 1, 1), 1, 1, 0),
    ((2, 5, 7), 33, 12, 3),
    ((3, 9, 13), 48, 12, 4),  # DenseNet-BC-100's
    ((1, 1, 40), 20, 8, 0),
    ((2, 40, 1), 16, 17, 8),
    ((2, 7, 7), 128, 32, 64),  # DenseNet-121's
    ((1, 13, 28), 192, 48, 96),  # DenseNet-161's
    ((3, 23, 11), 72, 32, 0),  # tiles of 256 and 64 across images
    ((1, 64, 2), 40, 24, 8),
    ((1, 3, 70), 20, 40, 8),  # tiles of one image
    ((2, 18, 65), 40, 24, 8),
    ((1, 33, 97), 16, 12, 0),
]
PROCESSORS = 2
"""So few that large tiles are made of small images."""

by_case = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def default_device():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


class Case:
    """A layer's second half: Z [M, B] and its affine, W2 [k, B, 3, 3], dY [M, k]."""

    def __init__(self, shape, dtype):
        self.grid, channels, self.outputs, self.first = shape
        self.rows, self.dtype = torch.Size(self.grid).numel(), dtype
        self.z = torch.randn(self.rows, channels).to(dtype)
        mean, scale, shift = torch.randn(3, channels)
        self.affine = Affine(mean * 0.3, scale.abs() + 0.5, shift, scale.sign() * 1.5)
        self.weight = (torch.randn(self.outputs, channels, 3, 3) / (3 * channels**0.5)).to(dtype)
        self.taps_first = self.weight.permute(0, 2, 3, 1).contiguous()
        self.columns = slice(self.first, self.first + self.outputs)
        self.grad = self.buffer()[:, self.columns]

    def buffer(self):
        """Y's or dY's, wider by some columns on both sides."""
        return torch.randn(self.rows, self.first + self.outputs + 8).to(self.dtype)

    def in_dtype(self, dtype):
        affine = Affine(*(t.double() if dtype == torch.float64 else t for t in self.affine))
        return self.z.to(dtype), affine, self.weight.to(dtype)


def assert_near(got, stock, truth):
    """Off by at most twice stock's error, or by what rounding the result may add."""
    allowed = 2 * (stock.double() - truth).norm() + torch.finfo(stock.dtype).eps * truth.norm() + 1e-30
    assert (got.double() - truth).norm() <= allowed


def forward(case, dtype, bias, mask, affine=True):
    """By ``aten``, in ``dtype``."""
    z, normalisation, weight = case.in_dtype(dtype)
    out = z.new_empty(case.rows, case.outputs)
    bias = None if bias is None else bias.to(dtype)
    aten.bn_relu_conv3x3(z, normalisation if affine else None, weight, bias, case.grid, out, mask=mask, keep_scale=2.0)
    return out


@by_shape
@by_case
def test_forward(shape, dtype):
    """With bias, dropout and statistics and without; of a finished A; and nothing beside its columns is written."""
    case = Case(shape, dtype)
    n, height, width = case.grid
    mask = torch.rand(n, height, case.outputs, width).permute(0, 2, 1, 3) > 0.3
    for bias, keep, affine, asks in [
        (None, None, True, True),
        (torch.randn(case.outputs), mask, True, True),
        (torch.randn(case.outputs).to(dtype), None, False, False),
    ]:
        buffer = case.buffer()
        before, out = buffer.clone(), buffer[:, case.columns]
        statistics = empty_statistics(out, case.outputs, 1e-3) if asks else None
        given = (case.z, case.affine if affine else None, case.taps_first, bias, case.grid, out)
        options = dict(mask=keep, keep_scale=2.0, statistics=statistics, processors=PROCESSORS)
        cuda_conv3x3.bn_relu_conv3x3(*given, **options)
        references = (forward(case, d, bias, keep, affine) for d in (dtype, torch.float64))
        assert_near(out, *references)
        if asks:
            assert_statistics(statistics, out)
        changed = (buffer != before).any(0)
        assert not changed[: case.first].any() and not changed[case.first + case.outputs :].any()


def gradients(case, dtype):
    """scale * D and dW2 by ``aten`` in ``dtype``, and the sums of D and of D * (Z - mean)."""
    z, affine, weight = case.in_dtype(dtype)
    scaled = torch.empty_like(z)
    grad_weight, sums = aten.bn_relu_conv3x3_backward(
        case.grad.to(dtype), z, affine, weight, case.grid, scaled, need_weight=True
    )
    return scaled, grad_weight, sums


@by_shape
@by_case
def test_gradients(shape, dtype):
    case = Case(shape, dtype)
    stock, truth = (gradients(case, d) for d in (dtype, torch.float64))
    buffer = torch.randn(case.rows, case.z.shape[1] + 8).to(dtype)
    before, scaled = buffer.clone(), buffer[:, 4:-4]
    given = (case.grad, case.z, case.affine)
    sums = cuda_conv3x3.grad_input(*given, case.taps_first, case.grid, scaled, PROCESSORS)
    assert_near(scaled, stock[0], truth[0])
    assert torch.equal(buffer[:, :4], before[:, :4]) and torch.equal(buffer[:, -4:], before[:, -4:])
    d = (truth[0] / case.affine.scale.double()).abs()
    centred = (case.z.double() - case.affine.mean.double()).abs()
    for got, exact, size in zip(sums.sum(0).chunk(2), truth[2], (d.sum(0), (d * centred).sum(0))):
        assert (got.double() - exact).norm() <= 1e-5 * size.norm()
    partials = cuda_conv3x3.grad_weight(*given, case.grid, None, None, PROCESSORS)
    grad_weight = partials.double().sum(0).view(case.outputs, 3, 3, -1).permute(0, 3, 1, 2)
    # relu(bn(Z)) is rounded on its way to the product, as stock's is, a few values the other way than in float64; the
    # sums of products are not rounded.
    rounded = aten.bn_relu_conv3x3_backward(*of_rounded(case), case.grid, None, need_weight=True)[0]
    few = 3 * torch.finfo(dtype).eps / case.z.numel() ** 0.5
    assert (grad_weight - rounded).norm() <= (2e-6 + few) * rounded.norm() + 1e-30
    assert_near(grad_weight, stock[1], truth[1])


def of_rounded(case):
    """dY, A as it is rounded, an affine that leaves it as it is, and W2, in float64."""
    z, affine, weight = case.in_dtype(torch.float64)
    a = ((z - affine.mean) * affine.scale + affine.bias).relu().to(case.dtype).double()
    zero, one = torch.zeros_like(affine.mean), torch.ones_like(affine.mean)
    return case.grad.double(), a, Affine(zero, one, zero), weight


@by_shape
@by_case
def test_the_weight_gradient_completes_dz(shape, dtype):
    case = Case(shape, dtype)
    p, q = torch.randn(2, case.z.shape[1])
    through = ThroughStatistics(case.z, case.affine.mean, p, q, case.rows)
    dz = torch.randn_like(case.z)
    exact = through._replace(x=case.z.double(), mean=case.affine.mean.double(), p=p.double(), q=q.double())
    truth = aten.finalise_gradient(dz.double(), exact, torch.empty_like(dz, dtype=torch.float64))
    stock = aten.finalise_gradient(dz, through, torch.empty_like(dz))
    given = (case.grad, case.z, case.affine, case.grid)
    with_dz = cuda_conv3x3.grad_weight(*given, through, dz, PROCESSORS)
    assert_near(dz, stock, truth)
    assert torch.equal(with_dz, cuda_conv3x3.grad_weight(*given, None, None, PROCESSORS))


@by_shape
def test_the_counts_know_how_work_is_divided(shape):
    """``launches.conv3x3_counts`` models a step by it."""
    case = Case(shape, torch.bfloat16)
    scaled = torch.empty_like(case.z)
    for processors in (2, 132):
        layer = Conv3x3(case.grid, case.z.shape[1], case.outputs, 2, Device(90, processors))
        sums = cuda_conv3x3.grad_input(case.grad, case.z, case.affine, case.taps_first, case.grid, scaled, processors)
        partials = cuda_conv3x3.grad_weight(case.grad, case.z, case.affine, case.grid, None, None, processors)
        assert (len(sums), len(partials)) == (layer.row_blocks(), layer.ranges())


def test_where_they_serve():
    """In 16 bits, two dimensions, and up to a width that depends on the GPU; nowhere if Triton's are asked for."""
    z, grid = torch.empty(12, 16, dtype=torch.float16), (2, 2, 3)
    for generation, most in {90: 48, 80: 32, 0: 48}.items():
        with config.assume(Device(generation, 4)):
            assert config.convolution_in_cuda(z, most, grid)
            assert not config.convolution_in_cuda(z, most + 1, grid)
            assert not config.convolution_in_cuda(z.float(), most, grid)
            assert not config.convolution_in_cuda(z, most, (2, 6))
            with config.convolution_in_triton():
                assert not config.convolution_in_cuda(z, most, grid)


@by_case
def test_equal_inputs_give_equal_bits(dtype):
    case = Case(((3, 23, 11), 72, 32, 0), dtype)
    results = []
    for _ in range(2):
        out, scaled = torch.empty(case.rows, case.outputs, dtype=dtype), torch.empty_like(case.z)
        statistics = empty_statistics(out, case.outputs, 1e-3)
        given = (case.z, case.affine, case.taps_first, None, case.grid, out)
        cuda_conv3x3.bn_relu_conv3x3(*given, statistics=statistics, processors=PROCESSORS)
        sums = cuda_conv3x3.grad_input(case.grad, case.z, case.affine, case.taps_first, case.grid, scaled, PROCESSORS)
        partials = cuda_conv3x3.grad_weight(case.grad, case.z, case.affine, case.grid, None, None, PROCESSORS)
        results.append((out, *statistics[:3], scaled, sums, partials))
    assert all(map(torch.equal, *results))


def test_a_nan_reaches_the_windows_that_hold_it_alone():
    case = Case(((2, 6, 9), 24, 16, 0), torch.bfloat16)
    out = torch.empty(case.rows, case.outputs, dtype=case.dtype)
    case.z.view(*case.grid, -1)[1, 0, 4, 5] = torch.nan
    given = (case.z, case.affine, case.taps_first, None, case.grid, out)
    cuda_conv3x3.bn_relu_conv3x3(*given, processors=PROCESSORS)
    expected = torch.zeros(case.grid, dtype=torch.bool)
    expected[1, :2, 3:6] = True
    assert torch.equal(out.isnan().any(1).view(case.grid), expected)
    scaled = torch.empty_like(case.z)
    cuda_conv3x3.grad_input(case.grad, case.z, case.affine, case.taps_first, case.grid, scaled, PROCESSORS)
    assert not scaled.isnan().any()  # a NaN is not below zero: the gradient passes, as in stock


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.update(grid=(1, 5, 8)), "grid: expected three positive sizes of product 35"),
        (lambda a: a.update(weight=a["weight"][:, :, :, 1:]), r"weight: expected contiguous \[8, 3, 3, 16\]"),
        (lambda a: a.update(out=a["out"][1:]), r"out: expected a matrix \[35, 8\]"),
        (lambda a: a.update(mask=torch.ones(1, 8, 7, 5, dtype=torch.bool)), r"mask: expected bool \[N, k, H, W\]"),
        (lambda a: a.update(z=a["z"].float()), "x: expected float16 or bfloat16"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    case = Case(((1, 5, 7), 16, 8, 0), torch.bfloat16)
    out = torch.empty(case.rows, case.outputs, dtype=case.dtype)
    arguments = {"z": case.z, "grid": case.grid, "weight": case.taps_first, "out": out, "mask": None}
    change(arguments)
    z, grid, weight, out, mask = arguments.values()
    with pytest.raises(RuntimeError, match=message):
        given = (z, case.affine, weight, None, grid, out.to(z.dtype))
        cuda_conv3x3.bn_relu_conv3x3(*given, mask=mask, processors=PROCESSORS)
