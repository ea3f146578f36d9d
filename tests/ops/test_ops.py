"""The custom ops through their functional interface: derivatives, opcheck, batch normalisation's modes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_fast import functional
from densenet_fast.functional import BatchNorm, BNReLUConv
from helpers import error, make_norm, pack

OPS = torch.ops.densenet_fast

SPATIAL = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}


def make_unit(channels, out, kernel, dims, *, bias=False, dtype=torch.float64, **norm):
    weight = torch.randn(out, channels, *[kernel] * dims, dtype=dtype) / channels**0.5
    b = torch.randn(out, dtype=dtype).requires_grad_() if bias else None
    return BNReLUConv(make_norm(channels, dtype=dtype, **norm), weight.requires_grad_(), b)


def make_layers(c0, k=2, width=3, depth=2, dims=2, bottleneck=True, prepend=False, **options):
    layers = []
    for i in range(depth):
        channels = c0 + i * k
        if bottleneck:
            layers.append((make_unit(channels, width, 1, dims, **options), make_unit(width, k, 3, dims, **options)))
        else:
            layers.append((make_unit(channels, k, 3, dims, **options),))
    return layers


def leaves(units):
    return [t for u in units for t in (u.norm.weight, u.norm.bias, u.weight, u.bias) if t is not None]


def untracked(unit):
    """The unit without side effects, for gradcheck's many evaluations."""
    norm = unit.norm
    if norm.frozen:
        return unit
    return unit._replace(norm=norm._replace(running_mean=None, running_var=None, num_batches_tracked=None))


def stock(x: Tensor, unit: BNReLUConv) -> Tensor:
    n = unit.norm
    x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, not n.frozen, n.momentum or 0.0, n.eps)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return convolve(F.relu(x), unit.weight, unit.bias, padding=unit.weight.shape[-1] // 2)


def stock_block(x: Tensor, layers) -> Tensor:
    for layer in layers:
        new = x
        for unit in layer:
            new = stock(new, unit)
        x = torch.cat([x, new], 1)
    return x


BLOCKS = [
    dict(),
    dict(bias=True),
    dict(bottleneck=False),
    dict(bottleneck=False, bias=True),
    dict(affine=False),
    dict(tracked=False, training=False),
    dict(training=False),
    dict(training=False, bottleneck=False, affine=False),
    dict(eps=0.3),
    dict(dims=1),
    dict(dims=3),
    dict(dims=1, bottleneck=False),
    dict(dims=3, bottleneck=False),
    dict(prepend=True),
    dict(prepend=True, bottleneck=False, training=False),
]


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


def opcheck_arguments(options, save, known):
    dims = options.get("dims", 2)
    layers = make_layers(16, k=16, width=32, dtype=torch.float32, **options)
    units = [unit for layer in layers for unit in layer]
    x = torch.randn(2, 16, *SPATIAL[dims], requires_grad=True)
    tensors, eps = pack([unit.stage() for unit in units], x)
    masks = [torch.rand(2, 16, *SPATIAL[dims]) > 0.5, x.new_empty(0)]
    link = x.new_zeros(()).expand(x.shape)
    statistics = (torch.zeros(16), torch.ones(16)) if known else (None, None)
    stages = (tensors, eps, masks, [0.5, 0.0], options.get("bottleneck", True))
    return x, *statistics, *stages, save, known, None, link, options.get("prepend", False)


KEPT = [([False, False], False), ([True, True], True), ([True, False], True)]
"""Whose bottlenecks are saved, and whether the statistics of x are known."""


@pytest.mark.parametrize(
    "options, save, known",
    [(options, *KEPT[i % 3]) for i, options in enumerate(BLOCKS)] + [(BLOCKS[0], *kept) for kept in KEPT[1:]],
    ids=str,
)
def test_opcheck_dense_block(options, save, known):
    torch.library.opcheck(OPS.dense_block.default, opcheck_arguments(options, save, known))


FAKE = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("k", [2, 4, 16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_opcheck_dense_block_backward(k, channels_last, bottleneck):
    """Shapes and strides of the gradients, which are their tensors', whatever the convolution returns."""
    layers = make_layers(16, k=k, width=4 * k, bottleneck=bottleneck, bias=True, dtype=torch.float32)
    x = torch.randn(2, 16, 8, 8)
    tensors, eps = pack([unit.stage() for layer in layers for unit in layer], x)
    if channels_last:
        tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    tensors = [t.detach() for t in tensors]
    masks = [torch.rand(2, k, 8, 8) > 0.5, x.new_empty(0)]
    stages = (tensors, eps, masks, [0.5, 0.0], bottleneck)
    kept = [True, False]
    features, *saved = OPS.dense_block(x, None, None, *stages, kept, True, None, None)
    needs = [True] + [t.numel() > 0 for t in tensors]
    for grad in (torch.randn_like(features), torch.randn(features.shape), torch.ones(()).expand(features.shape)):
        for read in ((None, None), tuple(torch.randn(2, *saved[0].shape))):
            arguments = (grad, *read, features, *saved, kept, *stages, 16, None, needs)
            torch.library.opcheck(OPS.dense_block_backward.default, arguments, test_utils=FAKE)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("options", [dict(), dict(bias=True), dict(training=False), dict(affine=False)], ids=str)
def test_opcheck_bn_relu_conv1x1(options, pool):
    unit = make_unit(3, 4, 1, 2, dtype=torch.float32, **options)
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    tensors, eps = pack([unit.stage()], x)
    known = (torch.zeros(3), torch.ones(3))
    for statistics in ((None, None), known, tuple(t.clone().requires_grad_() for t in known)):
        torch.library.opcheck(OPS.bn_relu_conv1x1.default, (x, *statistics, tensors, eps, pool, True, None))
    tensors = [t.detach() for t in tensors]
    out, mean, var, count, *_ = OPS.bn_relu_conv1x1(x.detach(), None, None, tensors, eps, pool, False, None)
    for apart in (False, True):
        needs = [True, apart] + [t.numel() > 0 and not unit.norm.frozen for t in tensors]
        arguments = (torch.randn(out.shape), x.detach(), mean, var, count, tensors, eps, pool, False, None, needs)
        torch.library.opcheck(OPS.bn_relu_conv1x1_backward.default, arguments, test_utils=FAKE)


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


MODES = [
    dict(),
    dict(momentum=None),
    dict(momentum=0.7),
    dict(tracked=False),
    dict(tracked=False, training=False),
    dict(training=False),
    dict(affine=False, momentum=None),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_running_statistics_follow_batch_norm(mode):
    """Three steps against torch.nn.BatchNorm2d: values, running statistics, counter."""
    unit = make_unit(5, 4, 1, 2, **mode)
    layers = make_layers(5, **mode)
    for run, first in (
        (lambda x: functional.bn_relu_conv1x1(x, *unit), unit.norm),
        (lambda x: functional.bn_relu_conv1x1_avgpool(x, *unit), unit.norm),
        (lambda x: functional.dense_block(x, layers), layers[0][0].norm),
    ):
        tracked = mode.get("tracked", True)
        norm = torch.nn.BatchNorm2d(5, momentum=mode.get("momentum", 0.1), track_running_stats=tracked).double()
        if tracked:
            norm.running_mean.copy_(first.running_mean)
            norm.running_var.copy_(first.running_var)
            norm.num_batches_tracked.copy_(first.num_batches_tracked)
        norm.train(mode.get("training", True))
        for _ in range(3):
            x = torch.randn(3, 5, 4, 4, dtype=torch.float64) * 2 + 1
            run(x), norm(x)
        if tracked:
            assert error(first.running_mean, norm.running_mean) < 1e-13
            assert error(first.running_var, norm.running_var) < 1e-13
            assert first.num_batches_tracked == norm.num_batches_tracked


def test_every_normalisation_of_a_block_is_updated_once():
    """Each layer with a momentum and an epsilon of its own, one of them frozen, against stock layers."""
    options = [dict(momentum=0.3), dict(momentum=None, eps=1e-2), dict(training=False), dict(momentum=0.9, eps=1e-3)]
    layers = [(make_unit(3 + 2 * i, 3, 1, 2, **o), make_unit(3, 2, 3, 2, **o)) for i, o in enumerate(options)]
    norms = [unit.norm for layer in layers for unit in layer]
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    functional.dense_block(x, layers)
    after = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
    assert [n.num_batches_tracked.item() for n in norms] == [1, 1, 1, 1, 0, 0, 1, 1]
    for n, (mean, var) in zip(norms, before):
        n.running_mean.copy_(mean)
        n.running_var.copy_(var)
    stock_block(x, [[u._replace(norm=u.norm._replace(momentum=u.norm.momentum or 1.0)) for u in la] for la in layers])
    for n, got in zip(norms, after):
        assert error(got[0], n.running_mean) < 1e-12 and error(got[1], n.running_var) < 1e-12


def test_bfloat16_running_statistics():
    unit = make_unit(5, 4, 1, 2, dtype=torch.bfloat16)
    norm = torch.nn.BatchNorm2d(5).bfloat16()
    norm.running_mean.copy_(unit.norm.running_mean)
    norm.running_var.copy_(unit.norm.running_var)
    x = torch.randn(3, 5, 4, 4).bfloat16()
    functional.bn_relu_conv1x1(x, *unit), norm(x)
    assert error(unit.norm.running_mean, norm.running_mean) < 2**-7
    assert error(unit.norm.running_var, norm.running_var) < 2**-7


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mean_ten_thousand_times_the_deviation(dtype, bottleneck):
    """Error against float64 at most twice stock's, where E[x^2] - E[x]^2 would leave no digit."""
    layers = make_layers(6, k=4, width=8, depth=3, dtype=torch.float64, bottleneck=bottleneck)

    def cast(dtype):
        def tensor(t):
            return None if t is None else t.detach().to(dtype)

        return [
            [BNReLUConv(BatchNorm(tensor(u.norm.weight), tensor(u.norm.bias)), tensor(u.weight)) for u in layer]
            for layer in layers
        ]

    scale = 1e4 if dtype == torch.float32 else 32
    x = (torch.randn(4, 6, 9, 9, dtype=torch.float64) + scale).to(dtype)
    truth = stock_block(x.double(), cast(torch.float64))
    theirs, mine = stock_block(x, cast(dtype)), functional.dense_block(x, cast(dtype))
    assert mine[:, :6].equal(x)
    assert error(mine[:, 6:], truth[:, 6:]) <= 2 * error(theirs[:, 6:], truth[:, 6:])


def test_in_place_change_of_the_output_is_noticed():
    layers = make_layers(3)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    output = functional.dense_block(x, layers)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.relu_().sum().backward()


def test_in_place_change_of_the_input_after_the_call_is_harmless():
    layers = make_layers(3)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 7, 3, 4, dtype=torch.float64)
    expected = torch.autograd.grad(functional.dense_block(x, layers), x, cotangent)
    y = x.clone()
    output = functional.dense_block(y, layers)
    y.zero_()
    assert torch.autograd.grad(output, x, cotangent)[0].equal(expected[0])


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_bitwise_the_same_from_run_to_run(memory_efficient):
    layers = make_layers(16, k=8, width=24, depth=4, dtype=torch.float32)
    x = torch.randn(4, 16, 20, 20, requires_grad=True)
    inputs = [x, *leaves(u for layer in layers for u in layer)]
    results = []
    for _ in range(2):
        output = functional.dense_block(x, layers, memory_efficient=memory_efficient)
        cotangent = torch.randn(output.shape, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
        results.append([output, *torch.autograd.grad(output, inputs, cotangent)])
    assert all(a.equal(b) for a, b in zip(*results))


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


def test_transforms_are_refused_not_answered_with_zeros():
    weight, x = torch.randn(4, 3, 1, 1), torch.randn(2, 3, 4, 4)
    calls = [
        lambda z: functional.bn_relu_conv1x1(z, BatchNorm(), weight),
        lambda z: functional.dense_block(z, [[BNReLUConv(BatchNorm(), torch.randn(4, 3, 3, 3))]]),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="torch.func transform|forward-mode"):
            torch.func.jvp(call, (x,), (x,))
        with pytest.raises(RuntimeError, match="torch.func transform"):
            torch.func.grad(lambda z, call=call: call(z).sum())(x)
        with torch.autograd.forward_ad.dual_level():
            with pytest.raises(RuntimeError, match="forward-mode"):
                call(torch.autograd.forward_ad.make_dual(x, x))


def test_running_statistics_of_half_precision_are_no_less_accurate_than_stock():
    norms = [torch.nn.BatchNorm2d(512, dtype=dtype) for dtype in (torch.float16, torch.float16, torch.float64)]
    ours, stock, exact = norms
    weight = torch.randn(1, 512, 1, 1).half()
    for _ in range(50):
        x = (torch.randn(4, 512, 4, 4) * 3 + 1).half()
        buffers = (ours.running_mean, ours.running_var, ours.num_batches_tracked)
        functional.bn_relu_conv1x1(x, BatchNorm(None, None, *buffers), weight)
        stock(x), exact(x.double())
    for name in ("running_mean", "running_var"):
        got, expected, truth = (getattr(norm, name) for norm in norms)
        assert error(got, truth) <= 1.2 * error(expected, truth)


@pytest.mark.parametrize("pool", [False, True])
def test_tensors_of_any_strides(pool):
    run = functional.bn_relu_conv1x1_avgpool if pool else functional.bn_relu_conv1x1
    weight, vectors, x = torch.randn(3, 4, 1, 1).transpose(0, 1), torch.rand(3, 4), torch.randn(2, 3, 4, 4)
    norm = BatchNorm(vectors[:, 1], vectors[:, 2], vectors[:, 0], vectors[:, 3], training=False)
    same = BatchNorm(*(t.contiguous() for t in norm[:4]), training=False)
    results = []
    for n, w in ((norm, weight), (same, weight.contiguous())):
        leaf = x.clone().requires_grad_()
        y = run(leaf, n, w)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    assert all(a.equal(b) for a, b in zip(*results))


def test_counter_without_running_statistics_is_incremented():
    counter = torch.tensor(0)
    functional.bn_relu_conv1x1(torch.randn(2, 3, 4, 4), BatchNorm(num_batches_tracked=counter), torch.randn(4, 3, 1, 1))
    assert counter == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_meta_tensors_give_the_shape(dtype):
    layers = [[untracked(u) for u in layer] for layer in make_layers(3, dtype=dtype)]
    on_meta = [
        [BNReLUConv(BatchNorm(*(t.to("meta") for t in u.norm[:2])), u.weight.to("meta")) for u in layer]
        for layer in layers
    ]
    output = functional.dense_block(torch.empty(2, 3, 3, 4, dtype=dtype, device="meta"), on_meta)
    real = functional.dense_block(torch.randn(2, 3, 3, 4, dtype=dtype), layers)
    assert (output.shape, output.stride()) == (real.shape, real.stride())


def bad_calls():
    good = dict(x=torch.randn(2, 3, 4, 4, dtype=torch.float64), layers=make_layers(3))
    unit = make_unit(3, 4, 1, 2)
    yield "channels", {**good, "x": torch.randn(2, 4, 4, 4, dtype=torch.float64)}, RuntimeError, "x: expected 3 ch"
    yield "dimensions", {**good, "x": torch.randn(3, 4, dtype=torch.float64)}, ValueError, "x: expected"
    yield "integers", {**good, "x": torch.ones(2, 3, 4, 4, dtype=torch.int64)}, RuntimeError, "floating"
    yield "dtype", {**good, "x": torch.randn(2, 3, 4, 4)}, RuntimeError, "dtype torch.float32, got torch.float64"
    yield "device", {**good, "x": torch.empty(2, 3, 4, 4, dtype=torch.float64, device="meta")}, RuntimeError, "on meta"
    yield "one value", {**good, "x": torch.randn(1, 3, 1, 1, dtype=torch.float64)}, ValueError, "more than 1 value"
    yield "empty", {**good, "x": torch.randn(0, 3, 4, 4, dtype=torch.float64)}, ValueError, "at least one value"
    yield "no layers", {**good, "layers": []}, ValueError, "layers"
    yield "unlike layers", {**good, "layers": [(unit,), *make_layers(3)]}, ValueError, "layers"
    yield "rates", {**good, "drop_rates": [0.5]}, ValueError, "drop_rates: expected 2 or 4 rates, got 1"
    yield "kernel", {**good, "layers": [(unit,)]}, RuntimeError, r"weight \(4, 3, 3, 3\), got \(4, 3, 1, 1\)"
    (a, b), rest = good["layers"]
    yield "weight", {**good, "layers": [(b, a), rest]}, RuntimeError, "layers|channels"
    yield "unit", {**good, "layers": [(torch.nn.Conv2d(3, 4, 1),)]}, TypeError, "BNReLUConv"
    yield "no list", {**good, "layers": [a]}, ValueError, "layers"
    yield "rate", {**good, "drop_rates": [0.5, float("nan")]}, ValueError, "drop_rates: expected probabilities"
    plain = {**good, "layers": make_layers(3, bottleneck=False), "drop_rates": [0.5]}
    yield "rates of plain layers", plain, ValueError, "drop_rates: expected 2 rates, got 1"
    half = a._replace(norm=a.norm._replace(running_var=None))
    yield "half of the statistics", {**good, "layers": [(half, b), rest]}, ValueError, "running_mean and running_var"
    meta = a._replace(norm=a.norm._replace(running_var=a.norm.running_var.to("meta")))
    yield "statistics elsewhere", {**good, "layers": [(meta, b), rest]}, RuntimeError, "all tensors on cpu, got meta"
    single = a._replace(norm=a.norm._replace(running_var=a.norm.running_var.float()))
    yield "statistics' dtype", {**good, "layers": [(single, b), rest]}, RuntimeError, "running_var of torch.float64"
    yield "eps", {**good, "layers": make_layers(3, eps=0.0)}, ValueError, "eps"


@pytest.mark.parametrize("call, error_type, words", [pytest.param(*c[1:], id=c[0]) for c in bad_calls()])
def test_bad_input_is_named(call, error_type, words):
    units = [u for layer in call["layers"] for u in layer if isinstance(u, BNReLUConv)]
    norms = [u.norm for u in units]
    before = [n.running_mean.clone() for n in norms]
    with pytest.raises(error_type, match=words):
        functional.dense_block(**call)
    assert all(n.num_batches_tracked == 0 and n.running_mean.equal(m) for n, m in zip(norms, before))
