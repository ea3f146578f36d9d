"""What torch's counters and profiler, and others' counters, say of a model: what they say of torchvision's."""

import contextlib
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop

import densenet_fast
from densenet_fast import functional
from densenet_fast.functional import BatchNorm, BNReLUConv
from densenet_fast.ops import stock

ARGUMENTS = (8, (2, 3), 64)


def pair(**options):
    return [
        make(*ARGUMENTS, num_classes=10, **options) for make in (densenet_fast.DenseNet, torchvision.models.DenseNet)
    ]


def images(dtype=torch.float32):
    return torch.randn(2, 3, 64, 64, dtype=dtype)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_counter_around_a_training_step(device, memory_efficient):
    with torch.device(device):
        models, x = pair(memory_efficient=memory_efficient), images()
    ours, theirs = (counted(lambda model=model: model(x).sum().backward()) for model in models)
    assert ours == theirs > 1e7


@pytest.mark.parametrize("change", [lambda f: None, lambda f: f[:5].requires_grad_(False)], ids=["whole", "frozen"])
def test_counter_around_a_backward_pass(change):
    counts = []
    for model in pair():
        change(model.features)
        loss = model(images()).sum()
        counts.append(counted(loss.backward))
    assert counts[0] == counts[1] > 1e7


def unit(channels, out, kernel, requires_grad=True):
    weight = torch.randn(out, channels, kernel, kernel, requires_grad=requires_grad)
    return BNReLUConv(BatchNorm(torch.ones(channels, requires_grad=requires_grad)), weight)


def flat(layers):
    return [[unit.stage() for unit in layer] for layer in layers]


@pytest.mark.parametrize("need_input", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["all", "second"])
@pytest.mark.parametrize("bottleneck", [True, False])
def test_counter_around_a_dense_block(need_input, first, bottleneck):
    """Of the first layer's parameters some need gradients, or none."""

    def layer(channels, trained):
        last = unit(8 if bottleneck else channels, 4, 3, trained)
        return (unit(channels, 8, 1, trained), last) if bottleneck else (last,)

    layers = [layer(12, first), layer(16, True)]
    x = torch.randn(2, 12, 6, 5, requires_grad=need_input)
    fused = counted(lambda: functional.dense_block(x, layers).sum().backward())
    assert fused == counted(lambda: stock.dense_block(x, flat(layers), [], [0.0] * 2).sum().backward()) > 0
    recomputed = counted(lambda: functional.dense_block(x, layers, memory_efficient=True).sum().backward())
    assert recomputed == fused + bottleneck * 2 * 60 * 8 * (first * 12 + need_input * (not first) * 12 + 16)


@pytest.mark.parametrize("need_input", [True, False])
@pytest.mark.parametrize(
    "fused, plain",
    [
        (functional.bn_relu_conv1x1, stock.bn_relu_conv),
        (functional.bn_relu_conv1x1_avgpool, stock.bn_relu_conv_pool),
    ],
    ids=["conv1x1", "transition"],
)
def test_counter_around_a_1x1_convolution(fused, plain, need_input):
    given, x = unit(12, 6, 1), torch.randn(2, 12, 6, 5, requires_grad=need_input)
    ours = counted(lambda: fused(x, *given).sum().backward())
    assert ours == counted(lambda: plain(x, given.stage(), None, None).sum().backward()) > 0


class Convolutions(TorchDispatchMode):
    """Counts as others' counters do: it knows torch's convolution alone."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.flops += conv_flop(*args, out_val=out)
        return out


@pytest.mark.parametrize("convert", [False, True])
def test_others_counters_see_torchs_operations(convert):
    ours, theirs = pair()
    counts = [count_by(Convolutions(), theirs)]
    ours = densenet_fast.convert(theirs) if convert else ours
    counts.append(count_by(Convolutions(), ours))
    assert counts[0] == counts[1] > 1e7
    assert {row.last_call for row in densenet_fast.explain(ours)} == {"stock: Convolutions looks at torch's operations"}
    ours(images())
    assert {row.last_call for row in densenet_fast.explain(ours)} == {"fused"}


def count_by(mode, model):
    with mode:
        model(images())
    return mode.flops


def test_ptflops():
    ptflops = pytest.importorskip("ptflops")
    count = partial(ptflops.get_model_complexity_info, as_strings=False, print_per_layer_stat=False, backend="aten")
    ours, theirs = (count(model, (3, 64, 64)) for model in pair())
    assert ours == theirs and ours[0] > 5e6


def profiled(model, x, train):
    model.train(train)
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        with contextlib.nullcontext() if train else torch.no_grad():
            loss = model(x).sum()
        if train:
            loss.backward()
    return profiler


def total(profiler):
    return sum(event.flops or 0 for event in profiler.key_averages())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_profiler(fused, dtype, train):
    """float64 runs on torch operations, some of which the profiler counts inside the ops."""
    x = images(dtype)
    ours, theirs = (model.to(dtype) for model in pair())
    with densenet_fast.set_fused(fused):
        ours(x)
        profiler = profiled(ours, x, train)
    densenet_fast.add_flops(profiler)
    once = total(profiler)
    densenet_fast.add_flops(profiler)
    assert total(profiler) == once == pytest.approx(total(profiled(theirs, x, train)), rel=0.01)


def test_names_in_the_profiler():
    model = densenet_fast.DenseNet(*ARGUMENTS)
    names = {event.name for event in profiled(model, images(), True).events()}
    names |= {event.name for event in profiled(model.features, images(), True).events()}
    shown = {f"densenet_fast::{op}{end}" for op in ("dense_block", "bn_relu_conv1x1") for end in ("", "_backward")}
    assert names >= shown | {"DenseBlock", "DenseBlockBackward", "DenseBlockAndBnReluConv1x1Backward"}
    assert not [name for name in names if "Direct" in name or "_Node" in name]


def unfinished():
    return profile(activities=[ProfilerActivity.CPU])


def without_flops():
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.zeros(1)
    return profiler


@pytest.mark.parametrize(
    "given, error, words",
    [
        (lambda: "trace.json", TypeError, "profile: expected a torch.profiler.profile that has ended, got str"),
        (unfinished, ValueError, "profile: expected one that has ended, got one that has not"),
        (without_flops, ValueError, "profile: expected with_flops=True, got False"),
    ],
)
def test_bad_profiles_are_named(given, error, words):
    with pytest.raises(error, match=words):
        densenet_fast.add_flops(given())


def test_formulas_are_registered_with_a_counter_that_is_imported_already():
    """Whichever of the two is imported first; the other order is in test_package.py."""
    from densenet_fast.ops import flops

    seen = {}
    counter = SimpleNamespace(register_flop_formula=lambda op, get_raw: lambda formula: seen.update({op: formula}))
    watched, sys.modules[flops.COUNTER] = sys.modules[flops.COUNTER], counter
    try:
        flops.register()
    finally:
        sys.modules[flops.COUNTER] = watched
    assert len(seen) == len(flops.FORMULAS)
