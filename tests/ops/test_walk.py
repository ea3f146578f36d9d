"""A dense block that the CPU backend walks over by itself, against the op's own walk and float64."""

import copy

import pytest
import torch

import densenet_fast
from densenet_fast import functional
from densenet_fast.backends import cpu
from densenet_fast.functional import BatchNorm, BNReLUConv
from helpers import error, pack

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled kernels")

BLOCKS = {
    "plain": dict(),
    "one layer": dict(depth=1),
    "recomputed within G": dict(width=8),
    "recomputed within G, new features first": dict(width=8, prepend=True),
    "odd sizes": dict(channels=5, width=7, k=3, spatial=(5, 7)),
    "frozen": dict(frozen=(1, 1)),
    "frozen first": dict(frozen=(1, 0)),
    "frozen second": dict(frozen=(0, 1)),
    "without weights": dict(affine=False),
    "unlike epsilons": dict(eps=(1e-5, 0.3, 1e-2, 1e-5, 0.1, 1.0)),
    "wide": dict(channels=64, width=128, k=32, spatial=(14, 14)),
    "few pixels": dict(channels=40, width=96, k=8, spatial=(2, 2)),
    "channels last weights": dict(memory_format=torch.channels_last),
    "new features first": dict(prepend=True),
    "new features first, odd sizes": dict(channels=5, width=7, k=3, spatial=(5, 7), prepend=True),
    "volumes": dict(spatial=(5, 6, 7)),
    "volumes, odd sizes": dict(channels=5, width=7, k=3, spatial=(9, 3, 5)),
    "volumes, channels last weights": dict(spatial=(4, 4, 4), memory_format=torch.channels_last_3d),
    "one plane": dict(spatial=(1, 6, 4), frozen=(0, 1)),
    "lines": dict(spatial=(33,)),
    "lines, odd sizes": dict(channels=5, width=7, k=3, spatial=(7,), prepend=True),
    "one voxel": dict(channels=5, width=7, k=3, spatial=(1,)),
}


def make(
    dtype,
    *,
    depth=3,
    channels=8,
    width=16,
    k=4,
    spatial=(10, 10),
    frozen=(0, 0),
    affine=True,
    eps=(1e-5,) * 6,
    memory_format=torch.contiguous_format,
    prepend=False,
):
    """x, the layers of a block, whose convolutions are in ``dtype``, and whether they prepend."""

    def norm(columns, is_frozen, e):
        weight, bias = torch.randn(2, columns).unbind() if affine else (None, None)
        running = (torch.randn(columns), torch.rand(columns) + 0.5)
        return BatchNorm(weight, bias, *running, torch.tensor(0), not is_frozen, 0.1, e)

    layers = []
    for i in range(depth):
        ones, threes = [1] * len(spatial), [3] * len(spatial)
        w1 = torch.randn(width, channels + i * k, *ones) / (channels + i * k) ** 0.5
        w2 = torch.randn(k, width, *threes) / (3 ** (len(spatial) / 2) * width**0.5)
        w1, w2 = (w.to(dtype).contiguous(memory_format=memory_format) for w in (w1, w2))
        first = BNReLUConv(norm(channels + i * k, frozen[0], eps[2 * i]), w1)
        layers.append((first, BNReLUConv(norm(width, frozen[1], eps[2 * i + 1]), w2)))
    return torch.randn(3, channels, *spatial), layers, prepend


def run(x, layers, prepend, dtype, memory_efficient, autocast=False):
    """Output, gradients of x and of every parameter, and running statistics of one step in ``dtype``."""
    x, layers = x.to(dtype), copy.deepcopy(layers)
    half = dtype == torch.bfloat16 and not autocast
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def leaf(t, into):
        return None if t is None else t.to(into).requires_grad_()

    def converted(unit):
        n = unit.norm
        running = (n.running_mean.to(wide), n.running_var.to(wide))
        n = n._replace(weight=leaf(n.weight, wide), bias=leaf(n.bias, wide))
        n = n._replace(running_mean=running[0], running_var=running[1])
        return BNReLUConv(n, leaf(unit.weight, dtype if half or dtype == torch.float64 else torch.float32))

    layers = [tuple(map(converted, layer)) for layer in layers]
    units = [unit for layer in layers for unit in layer]
    leaves = [x.requires_grad_()] + [t for u in units for t in (u.norm.weight, u.norm.bias, u.weight) if t is not None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = functional.dense_block(x, layers, memory_efficient=memory_efficient, prepend=prepend)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(output, leaves, cotangent.to(output.dtype))
    buffers = [t for u in units for t in (u.norm.running_mean, u.norm.running_var)]
    return [output.detach(), *gradients, *buffers]


@pytest.fixture
def counted(monkeypatch):
    """How often the backend walked, forward and backward."""
    calls = []
    for name in ("dense_block", "dense_block_backward"):
        own = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *a, own=own, name=name, **k: (calls.append(name), own(*a, **k))[1])
    return calls


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
def test_both_walks_agree(options, mode, memory_efficient, counted, monkeypatch):
    """Under autocast weights are rounded where they are packed, in the op before: not equal, but as exact. Gradients
    jump where a ReLU's input is near 0, so their errors there are summed over several blocks."""
    dtype, autocast = torch.float32 if mode == "float32" else torch.bfloat16, mode == "autocast"
    errors = torch.zeros(2, 2)
    for repetition in range(6 if autocast else 1):
        x, *block = make(torch.bfloat16 if mode == "bfloat16" else torch.float32, **options)
        truth = run(x.to(dtype), *block, torch.float64, memory_efficient)
        assert len(counted) == 2 * repetition
        arguments = (x, *block, dtype, memory_efficient, autocast)
        walked = run(*arguments)
        assert counted[-2:] == ["dense_block", "dense_block_backward"]
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "runs_whole_blocks", lambda grid: False)
            stepwise = run(*arguments)
        assert len(counted) == 2 * repetition + 2
        assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(walked, stepwise, strict=True))
        if autocast:
            for i, part in enumerate((slice(0, 1), slice(1, None))):
                exact = torch.cat([t.flatten() for t in truth[part]])
                for j, result in enumerate((walked, stepwise)):
                    errors[i, j] += error(torch.cat([t.double().flatten() for t in result[part]]), exact)
        else:
            for got, other in zip(walked, stepwise):
                assert error(got, other) <= 4 * torch.finfo(dtype).eps
    assert errors[0, 0] <= 1.05 * errors[0, 1] and errors[1, 0] <= 2 * errors[1, 1], errors


@pytest.mark.parametrize(
    "change, backward",
    {
        "a bias": (lambda net: setattr(net.denselayer1.conv1, "bias", torch.nn.Parameter(torch.zeros(16))), 0),
        "dropout": (lambda net: setattr(net.denselayer2, "drop_rate", 0.5), 0),
        "a frozen weight": (lambda net: net.denselayer2.conv2.weight.requires_grad_(False), 0),
        "nothing": (lambda net: None, 1),
    }.values(),
)
def test_what_is_not_plain_is_left_to_the_op(change, backward, counted):
    net = densenet_fast.nn.DenseBlock(2, 8, 4, 4)
    change(net)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    net(x).sum().backward()
    assert counted.count("dense_block_backward") == backward
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_g_stands_in_the_memory_of_a_gradient_that_nobody_else_needs(monkeypatch):
    own, shared = cpu.dense_block_backward, []

    def recorded(grad, total, *arguments, **options):
        shared.append(total.data_ptr() == grad.data_ptr())
        own(grad, total, *arguments, **options)

    monkeypatch.setattr(cpu, "dense_block_backward", recorded)
    net = densenet_fast.DenseNet(8, (2, 2), 16, num_classes=5)
    for norm in (net.features.transition1.norm, net.features.norm5):
        norm.weight.requires_grad_(False)  # else a block and what reads it run in one call
    net(torch.randn(2, 3, 64, 64)).sum().backward()
    assert shared == [True, True]
    densenet_fast.nn.DenseBlock(2, 8, 4, 4)(torch.randn(2, 8, 6, 6, requires_grad=True)).sum().backward()
    assert shared == [True, True, False]


def test_wrong_arguments_raise():
    kernels = torch.ops.densenet_fast
    x, layers, _ = make(torch.float32, spatial=(6, 6))
    stages = [unit.stage() for layer in layers for unit in layer]
    tensors, eps = pack(stages, x)
    features, mean, var = torch.zeros(3 * 36, 8 + 3 * 4), torch.zeros(20 + 48), torch.ones(20 + 48)

    def refused(message, *arguments):
        with pytest.raises(RuntimeError, match=message):
            kernels.cpu_dense_block(*arguments)

    grid = [3, 6, 6]
    refused("tensors: expected six", features, 8, tensors[:-1], eps, grid, [], mean, var, False)
    refused("expected 20 columns, got 19", features[:, 1:], 8, tensors, eps, grid, [], mean, var, False)
    refused("weight: expected 9 contiguous", features, 9, tensors, eps, grid, [], mean, var, False)
    refused("mean: expected 68 contiguous", features, 8, tensors, eps, grid, [], mean[1:], var, False)
    refused("bottlenecks: expected none or one", features, 8, tensors, eps, grid, [features], mean, var, False)
    refused("grid: expected the product 108, got 126", features, 8, tensors, eps, [3, 6, 7], [], mean, var, False)
    refused("weight: expected 3 spatial dimensions", features, 8, tensors, eps, [3, 1, 6, 6], [], mean, var, False)
    biased = [torch.zeros(16) if i == 5 else t for i, t in enumerate(tensors)]
    refused("expected no bias", features, 8, biased, eps, grid, [], mean, var, False)
    whole = (features, 8, tensors, eps, grid, [], mean, var, True, False)
    refused(r"x: expected \[108, 8\]", *whole, features[:, :7])
    refused("x_mean: expected with x_var", *whole, features[:, :8], mean[:8])
    refused("x_var: expected 8 contiguous", *whole, features[:, :8], mean[:8], var[:7])
    grads = [torch.zeros_like(t) for t in tensors]
    for wrong in (0, 4, 10):
        bad = [g.double() if i == wrong else g for i, g in enumerate(grads)]
        with pytest.raises(RuntimeError, match="grad"):
            kernels.cpu_dense_block_backward(
                *(features, features.clone(), features, [], mean, var, 108.0, tensors, eps, grid),
                *(features[:, :8].clone(), bad),
                *(mean.clone(), var.clone(), True),
            )
