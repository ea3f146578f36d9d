"""Feature maps of 2^31 elements and more: shapes on the meta device, and the compiled kernels' index arithmetic."""

import math
import mmap

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import densenet_fast
from densenet_fast.backends import cpu
from densenet_fast.backends.affine import Affine, ThroughStatistics, empty_statistics

LIMIT = 2**31


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("mode", ["meta", "fake"])
def test_shapes_of_a_training_step(mode, memory_efficient):
    """DenseNet-121 on 4096 images: the stem's first map, and the first block's features, have more elements."""
    device = torch.device("meta" if mode == "meta" else "cpu")
    with FakeTensorMode() if mode == "fake" else torch.device("meta"):
        model = densenet_fast.densenet121(memory_efficient=memory_efficient)
        shapes = []
        for name in ("conv0", "denseblock1", "transition1", "denseblock4"):
            model.features.get_submodule(name).register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape)))
        output = model(torch.empty(4096, 3, 224, 224, device=device))
        output.sum().backward()
        assert all(p.grad.shape == p.shape for p in model.parameters())
    expected = [(64, 112), (256, 56), (128, 28), (1024, 7)]
    assert shapes == [(4096, channels, size, size) for channels, size in expected]
    assert [math.prod(shape) > LIMIT for shape in shapes] == [True, True, False, False]
    assert all(row.fused for row in densenet_fast.explain(model))


@pytest.fixture(scope="module")
def memory():
    """Room for 2^31 elements and more, of which no page exists until it is written; the kernels are loaded."""
    assert cpu.unavailable() is None
    return mmap.mmap(-1, 4 * (LIMIT + 2**26))


def spread(memory: mmap.mmap, values: torch.Tensor) -> torch.Tensor:
    """``values`` [rows, columns] with rows so far apart that the last begins behind element 2^31."""
    rows, columns = values.shape
    distance = LIMIT // (rows - 1) + 64
    flat = torch.frombuffer(memory, dtype=values.dtype)
    result = flat.as_strided((rows, columns), (distance, 1))
    assert distance * (rows - 1) > LIMIT
    return result.copy_(values)


def bn_relu(x, affine, grid):
    return torch.ops.densenet_fast.cpu_bn_relu(x, affine.mean, affine.scale, affine.bias)


def statistics(x, affine, grid):
    own = empty_statistics(x, x.shape[1], 1e-5)
    cpu.channel_statistics(x, own)
    return own[:3]


def conv1x1(x, affine, grid):
    out = torch.empty(x.shape[0], 8, dtype=x.dtype)
    weight = torch.linspace(-1, 1, 8 * x.shape[1]).view(8, -1).to(x.dtype)
    own = empty_statistics(x, 8, 1e-5)
    cpu.bn_relu_conv1x1(x, affine, weight, None, out, own)
    return out, own[:3]


def conv1x1_backward(x, affine, grid):
    grad = torch.linspace(-1, 1, x.shape[0] * 8).view(-1, 8).to(x.dtype)
    weight = torch.linspace(-1, 1, 8 * x.shape[1]).view(8, -1).to(x.dtype)
    grad_x = torch.zeros(x.shape, dtype=x.dtype)
    return grad_x, cpu.bn_relu_conv1x1_backward(grad, x, affine, weight, grad_x, need_weight=True, need_sums=True)


def conv3x3(x, affine, grid):
    weight = torch.linspace(-1, 1, 4 * x.shape[1] * 9).view(4, -1, 3, 3).to(x.dtype)
    out = torch.empty(x.shape[0], 4, dtype=x.dtype)
    own = empty_statistics(x, 4, 1e-5)
    cpu.bn_relu_conv3x3(x, affine, weight, None, grid, out, statistics=own)
    return out, own[:3]


def conv3x3_backward(x, affine, grid):
    weight = torch.linspace(-1, 1, 4 * x.shape[1] * 9).view(4, -1, 3, 3).to(x.dtype)
    grad = torch.linspace(-1, 1, x.shape[0] * 4).view(-1, 4).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    return out, cpu.bn_relu_conv3x3_backward(grad, x, affine, weight, grid, out, need_weight=True)


def finalise(x, affine, grid):
    through = ThroughStatistics(x, affine.mean, affine.scale, affine.bias, x.shape[0])
    return cpu.finalise_gradient(torch.ones(x.shape, dtype=x.dtype), through, torch.empty(x.shape, dtype=x.dtype))


def transition(x, affine, grid):
    weight = torch.linspace(-1, 1, 8 * x.shape[1]).view(8, -1).to(x.dtype)
    out = cpu.bn_relu_pool_conv1x1(x, affine, weight, None, grid, None)
    return out, cpu.bn_relu_pool_conv1x1_backward(out, x, affine, weight, grid, need_input=True, need_weight=True)


def stem(x, affine, grid):
    out, argmax = cpu.bn_relu_maxpool(x, affine, grid, None)
    return out, argmax, cpu.bn_relu_maxpool_backward(out, argmax, x, affine, grid)


def head(x, affine, grid):
    out = cpu.bn_relu_global_avgpool(x, affine, grid)
    return out, cpu.bn_relu_global_avgpool_backward(out, x, affine, grid)


def tensors(values):
    return [values] if isinstance(values, torch.Tensor) else [t for value in values for t in tensors(value)]


KERNELS = [bn_relu, statistics, conv1x1, conv1x1_backward, conv3x3, conv3x3_backward, finalise, transition, stem, head]


@pytest.mark.library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_kernels_read_beyond_element_2_31(kernel, dtype, memory):
    grid = (2, 4, 4)
    x = torch.randn(32, 37).to(dtype)
    affine = Affine(torch.randn(37), torch.randn(37), torch.randn(37))
    expected, got = kernel(x, affine, grid), kernel(spread(memory, x), affine, grid)
    assert all(a.equal(b) for a, b in zip(tensors(got), tensors(expected), strict=True))


@pytest.mark.library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_write_beyond_element_2_31(dtype, memory):
    """The matrices that kernels write into: Z, the new columns of F, and the gradient G."""
    x, weight = torch.randn(32, 37).to(dtype), torch.randn(8, 37).to(dtype)
    affine = Affine(torch.randn(37), torch.randn(37), torch.randn(37))
    results = []
    for place in (lambda t: t.clone(), lambda t: spread(memory, t)):
        z = place(torch.zeros(32, 8, dtype=dtype))
        cpu.bn_relu_conv1x1(x, affine, weight, None, z, None)
        results.append([z.clone()])
        y = place(torch.zeros(32, 4, dtype=dtype))
        filters = torch.linspace(-1, 1, 4 * 37 * 9).view(4, 37, 3, 3).to(dtype)
        cpu.bn_relu_conv3x3(x, affine, filters, None, (2, 4, 4), y)
        results[-1].append(y.clone())
        g = place(torch.ones(32, 37, dtype=dtype))
        cpu.bn_relu_conv1x1_backward(results[0][0], x, affine, weight, g, need_weight=False, need_sums=True)
        results[-1].append(g.clone())
        d = place(torch.zeros(32, 37, dtype=dtype))
        cpu.bn_relu_conv3x3_backward(results[0][1], x, affine, filters, (2, 4, 4), d, need_weight=False)
        results[-1].append(d.clone())
    assert all(a.equal(b) for a, b in zip(*results))


def test_on_a_gpu(gpu):
    """A head behind 2^31 elements and more: each image's result as if it were alone, under running statistics."""
    model = densenet_fast.DenseNet(16, (1,), 64, small_inputs=True).cuda().bfloat16().eval()
    x = torch.randn(8, 3, 2048, 2048, dtype=torch.bfloat16, device="cuda")
    assert 8 * 80 * 2048 * 2048 > LIMIT
    with torch.no_grad():
        together = model(x)
        for i in (0, 7):
            assert together[i].allclose(model(x[i : i + 1])[0], rtol=1e-2, atol=1e-2)
