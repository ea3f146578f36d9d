"""The gradients of the ops, through their functional interface: first, second, some, batched."""

import pytest
import torch
import torch.nn.functional as F

from densenet_fast import functional
from densenet_fast.functional import BatchNorm
from helpers import error
from ops.units import BLOCKS, SPATIAL, leaves, make_layers, make_unit, stock, stock_block, untracked


@pytest.mark.parametrize("options", BLOCKS, ids=str)
def test_gradcheck_dense_block(options):
    dims, prepend = options.get("dims", 2), options.get("prepend", False)
    layers = [tuple(map(untracked, layer)) for layer in make_layers(3, **options)]
    x = torch.randn(2, 3, *SPATIAL[dims], dtype=torch.float64, requires_grad=True)

    inputs = (x, *leaves(u for layer in layers for u in layer))

    def block(x, *_):
        return functional.dense_block(x, layers, prepend=prepend)

    assert torch.autograd.gradcheck(block, inputs)
    output = block(x)
    cotangent = torch.randn_like(output)
    recomputed = functional.dense_block(x, layers, memory_efficient=True, prepend=prepend)
    assert torch.equal(recomputed, output)
    for got, expected in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (recomputed, output)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("rates", [(0.4, 0.0), (1.0, 0.5), (0.5, 0.2, 0.3, 0.0)], ids=str)
def test_gradcheck_dense_block_with_dropout(rates, recomputed):
    """Of each layer's new features, or of what each of its convolutions makes."""
    layers = [tuple(map(untracked, layer)) for layer in make_layers(3, bias=recomputed)]
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)

    def block(x, *_):
        torch.manual_seed(1)
        return functional.dense_block(x, layers, rates, recomputed)

    assert torch.autograd.gradcheck(block, (x, *leaves(u for layer in layers for u in layer)))


@pytest.mark.parametrize("options", BLOCKS[:8] + BLOCKS[9:11], ids=str)
def test_double_backward_of_dense_block(options):
    dims = options.get("dims", 2)
    layers = [tuple(map(untracked, layer)) for layer in make_layers(2, k=1, width=2, **options)]
    x = torch.randn(2, 2, *SPATIAL[dims][:-1], 3, dtype=torch.float64, requires_grad=True)
    inputs = (x, *leaves(u for layer in layers for u in layer))
    twice = []
    for block in (functional.dense_block, stock_block):
        output = block(x, layers)
        generator = torch.Generator(torch.get_default_device()).manual_seed(2)
        first = torch.autograd.grad(
            output, inputs, torch.randn(output.shape, generator=generator, dtype=torch.float64), create_graph=True
        )
        energy = sum((g * torch.randn(g.shape, generator=generator, dtype=torch.float64)).sum() for g in first)
        twice.append(torch.autograd.grad(energy, inputs, allow_unused=True))
    for got, expected in zip(*twice, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or (got - expected).norm() <= 1e-9 * expected.norm().clamp_min(1e-3)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dims, spatial", [(1, (5,)), (2, (3, 4)), (2, (2, 5)), (3, (2, 3, 2))])
@pytest.mark.parametrize("options", [dict(), dict(bias=True), dict(affine=False), dict(training=False)], ids=str)
def test_gradcheck_bn_relu_conv1x1(options, dims, spatial, pool):
    unit = untracked(make_unit(3, 4, 1, dims, **options))
    x = torch.randn(2, 3, *spatial, dtype=torch.float64, requires_grad=True)
    function = functional.bn_relu_conv1x1_avgpool if pool else functional.bn_relu_conv1x1

    def run(x, *_):
        return function(x, *unit)

    assert torch.autograd.gradcheck(run, (x, *leaves([unit])))
    assert torch.autograd.gradgradcheck(run, (x, *leaves([unit])), fast_mode=True)
    expected = stock(x, unit)
    if pool:
        expected = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1](expected, 2)
    assert error(run(x), expected) < 1e-13


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("asked", range(8))
def test_only_gradients_asked_for_are_computed(asked, bottleneck, monkeypatch):
    """Every subset keeps its values; and no product is made for a gradient that nobody asked for."""
    from densenet_fast.backends import aten

    layers = [tuple(map(untracked, layer)) for layer in make_layers(3, depth=3, bias=True, bottleneck=bottleneck)]
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    everything = [x, *leaves(u for layer in layers for u in layer)]
    for t in everything:
        t.requires_grad_()
    cotangent = torch.randn(2, 9, 3, 4, dtype=torch.float64)
    complete = torch.autograd.grad(functional.dense_block(x, layers), everything, cotangent)

    names = ("bn_relu_conv1x1_backward", "bn_relu_conv3x3_backward")
    calls = []
    for name in names:
        kernel = getattr(aten, name)
        monkeypatch.setattr(
            aten, name, lambda *args, n=name, k=kernel, **options: (calls.append(n), k(*args, **options))[1]
        )
    chosen = [i for i in range(len(everything)) if (i * 2654435761 >> 7) % 8 == asked]
    for i, t in enumerate(everything):
        t.requires_grad_(i in chosen)
    some = torch.autograd.grad(functional.dense_block(x, layers), [everything[i] for i in chosen], cotangent)
    for i, gradient in zip(chosen, some, strict=True):
        assert (gradient - complete[i]).norm() <= 1e-12 * complete[i].norm().clamp_min(1)

    per_layer = (len(everything) - 1) // 3
    first = 0 if 0 in chosen else min((i - 1) // per_layer for i in chosen)
    assert calls.count("bn_relu_conv3x3_backward") == 3 - first


def test_last_convolution_alone_needs_no_input_gradient(monkeypatch):
    from densenet_fast.backends import aten

    layers = [tuple(map(untracked, layer)) for layer in make_layers(3, depth=3)]
    for t in leaves(u for layer in layers for u in layer):
        t.requires_grad_(False)
    layers[1][1].weight.requires_grad_()
    wanted = []
    kernel = aten.bn_relu_conv3x3_backward

    def recorded(*args, **options):
        wanted.append((args[5] is not None, options["need_weight"]))
        return kernel(*args, **options)

    monkeypatch.setattr(aten, "bn_relu_conv3x3_backward", recorded)
    functional.dense_block(torch.randn(2, 3, 3, 4, dtype=torch.float64), layers).sum().backward()
    assert wanted == [(True, False), (False, True)]


@pytest.mark.parametrize("pool", [False, True])
def test_derivatives_are_partial_where_inputs_depend_on_each_other(pool):
    """Weights that are computed from x or are the same, in the graph of a second derivative."""
    run = functional.bn_relu_conv1x1_avgpool if pool else functional.bn_relu_conv1x1
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    norm = untracked(make_unit(3, 4, 1, 2)).norm

    def twice(x):
        weight = x.mean((0, 2, 3)).outer(x.mean((0, 2, 3))).reshape(3, 3, 1, 1)
        y = run(x, norm, weight, weight.sum((1, 2, 3)))
        return y if pool else run(y, norm, weight)

    assert torch.autograd.gradcheck(twice, x)
    cotangent = torch.randn(twice(x).shape, dtype=torch.float64)
    first = [torch.autograd.grad(twice(x), x, cotangent, create_graph=create)[0] for create in (False, True)]
    assert error(first[1], first[0]) < 1e-12


def test_batched_cotangents():
    layers = [tuple(map(untracked, layer)) for layer in make_layers(3)]
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *leaves(u for layer in layers for u in layer)]
    weight = torch.randn(2, 7, 1, 1, dtype=torch.float64)
    output = functional.bn_relu_conv1x1_avgpool(functional.dense_block(x, layers), BatchNorm(), weight)
    cotangents = torch.randn(3, *output.shape, dtype=torch.float64)
    together = torch.autograd.grad(output, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda c: torch.autograd.grad(output, inputs, c, retain_graph=True))(cotangents)
    assert all((a - b).norm() <= 1e-12 * b.norm().clamp_min(1) for a, b in zip(mapped, together))
    for i in range(3):
        alone = torch.autograd.grad(output, inputs, cotangents[i], retain_graph=True)
        assert all((a[i] - b).norm() <= 1e-12 * b.norm().clamp_min(1) for a, b in zip(together, alone))
