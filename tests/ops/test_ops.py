"""The custom ops: opcheck, accuracy, what they do to their inputs and refuse."""

import pytest
import torch

from densenet_fast import functional
from densenet_fast.functional import BatchNorm, BNReLUConv
from helpers import error, pack
from ops.units import BLOCKS, SPATIAL, leaves, make_layers, make_unit, stock_block, untracked

OPS = torch.ops.densenet_fast


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
