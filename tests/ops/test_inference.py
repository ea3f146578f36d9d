"""Inference on CPUs by kernels of whole parts, against the ops that it stands for."""

import contextlib
import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import densenet_fast
from densenet_fast import inference
from densenet_fast.backends import cpu
from helpers import error, randomise

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled kernels")

PARTS = ["stem", "dense_block", "transition", "dense_block", "global_avgpool"]
SMALL = dict(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)
NETWORKS = {
    "small": SMALL,
    "odd sizes": dict(SMALL, growth_rate=3, num_init_features=5, bn_size=3),
    "several panels": dict(SMALL, growth_rate=40, num_init_features=70, bn_size=2),
    "of one channel": dict(SMALL, in_channels=1),
}


def network(**options):
    torch.manual_seed(0)
    return randomise(densenet_fast.DenseNet(**(options or SMALL))).eval()


def images(*size):
    return torch.randn(*(size or (2, 3, 45, 38)), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def served(monkeypatch):
    """The parts that ran by these kernels, in turn."""
    seen = []

    def noting(name, own):
        def run(*args):
            made = own(*args)
            seen.extend([name] * (made is not None))
            return made

        return run

    for name in {*PARTS}:
        monkeypatch.setattr(inference, name, noting(name, getattr(inference, name)))
    run = inference.Network.run
    monkeypatch.setattr(inference.Network, "run", lambda *args: (run(*args), seen.extend(PARTS))[0])
    return seen


def through_ops(model, x):
    """What the ops make that are differentiable."""
    return model(x.clone().requires_grad_()).detach()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_equals_the_ops(options, layout, autocast, threads, served):
    model = network(**options).to(memory_format=layout)
    x = images(2, options.get("in_channels", 3), 45, 38).to(memory_format=layout)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            with torch.no_grad():
                got = model(x)
            assert served == PARTS
            expected = through_ops(model, x)
    finally:
        torch.set_num_threads(before)
    assert served == PARTS and got.dtype == expected.dtype
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
    assert error(got, truth) <= 1.5 * error(expected, truth) + (1e-3 if autocast else 1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_later_calls_are_bitwise_the_first(options, prepend, autocast, served, monkeypatch):
    """They do not go through the parts again."""
    model = network(**options)
    for block in (model.features.denseblock1, model.features.denseblock2):
        block.prepend = prepend
    x = images(2, options.get("in_channels", 3), 45, 38)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        first = model(x)
        monkeypatch.setattr(inference, "dense_block", None)
        assert model(x).equal(first) and model(x.to(memory_format=torch.channels_last)).equal(first)
    assert served == 3 * PARTS


@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("rows", [(1, 7, 7), (1, 14, 14), (2, 2, 2), (40, 3, 3), (3, 20, 9)])
def test_a_block_is_bitwise_the_ops(rows, prepend, served):
    block = randomise(densenet_fast.nn.DenseBlock(3, 40, 4, 32, prepend=prepend)).eval()
    x = images(rows[0], 40, *rows[1:])
    with torch.inference_mode():
        got = block(x)
    assert served == ["dense_block"] and got.equal(through_ops(block, x)) and got.is_contiguous()


def moved(model):
    conv = model.features.denseblock1.denselayer1.conv1
    conv.weight = nn.Parameter(2 * conv.weight)


def stepped(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(images()).square().sum().backward()
    optimizer.step()
    model.eval()


def each(change):
    def run(model):
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.dtype.is_floating_point)]:
            change(tensor)

    return run


def exchanged_twice(tensor):
    """The second time, memory may be where it was at first."""
    tensor.data = tensor.data * 1.5
    tensor.data = tensor.data * 0.5


CHANGES = {
    "in place": each(lambda t: t.detach().mul_(1.25)),
    "unseen by version counters": each(lambda t: t.data.mul_(1.25)),
    "through numpy": each(lambda t: t.detach().numpy().__imul__(1.25)),
    "one value": lambda model: model.features.denseblock2.denselayer2.conv2.weight.data[0, 0, 1, 1].add_(3),
    "data exchanged": each(exchanged_twice),
    "an optimizer's step": stepped,
    "a state dict": lambda model: model.load_state_dict(randomise(densenet_fast.DenseNet(**SMALL)).state_dict()),
    "a parameter": moved,
    "the layout": lambda model: model.to(memory_format=torch.channels_last),
    "epsilon": lambda model: setattr(model.features.norm5, "eps", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_weight_is_stale(change, served):
    model, x = network(), images()
    with torch.no_grad():
        before = model(x), model(x)
    change(model)
    with torch.no_grad():
        got, expected = model(x), copy.deepcopy(model)(x)
    assert served == 4 * PARTS and before[0].equal(before[1])
    assert got.equal(expected) and got.equal(before[0]) == (change is CHANGES["the layout"])


def spread(tensor):
    tensor.data = tensor.data.repeat_interleave(2, 0)[::2]


def retyped(model):
    for tensor in model.parameters():
        tensor.data = tensor.data.to(torch.bfloat16)


def hooked(model):
    model.features.denseblock1.denselayer1.norm1.register_forward_hook(lambda module, args, out: 2 * out)


@contextlib.contextmanager
def forward_mode():
    with torch.autograd.forward_ad.dual_level():
        yield


def unchanged(model):
    pass


LATER = {
    "nothing": (unchanged, contextlib.nullcontext),
    "strides": (each(spread), contextlib.nullcontext),
    "dtypes": (retyped, contextlib.nullcontext),
    "another dtype": (lambda model: model.double(), contextlib.nullcontext),
    "a hook": (hooked, contextlib.nullcontext),
    "training": (lambda model: model.train(), contextlib.nullcontext),
    "batch statistics": (lambda model: model.features.norm5.train(), contextlib.nullcontext),
    "another transition": (
        lambda model: setattr(model.features, "transition1", nn.AvgPool2d(2)),
        contextlib.nullcontext,
    ),
    "no parts": (
        lambda model: [model.features._modules.pop(name) for name in [*model.features._modules][:-1]],
        contextlib.nullcontext,
    ),
    "autograd": (unchanged, torch.enable_grad),
    "inference mode": (unchanged, torch.inference_mode),
    "autocast": (unchanged, lambda: torch.autocast("cpu", torch.bfloat16)),
    "switched off": (unchanged, lambda: densenet_fast.set_fused(False)),
    "a counter": (unchanged, lambda: FlopCounterMode(display=False)),
    "forward mode": (unchanged, forward_mode),
}


def outcome(model, x, served):
    """What a call returns, what ran, and what is said of it; or the error that it raises."""
    served.clear()
    try:
        made = model(x)
    except Exception as error:
        return str(error)
    return made.dtype, made.requires_grad, made.tolist(), [*served], str(densenet_fast.explain(model))


@pytest.mark.parametrize("change, around", LATER.values(), ids=LATER)
def test_earlier_calls_make_no_difference(change, around, served):
    model = network()
    with torch.no_grad():
        for sizes in ((2, 3, 40, 40), (1, 3, 45, 38), (2, 3, 40, 40)):
            model(images(*sizes))
        new = copy.deepcopy(model)
        change(model), change(new)
        for x in (images(2, 3, 40, 40), images(1, 3, 48, 48), images(2, 4, 40, 40), images(2, 3, 40, 40).double()):
            with around():
                got = outcome(model, x, served)
            with around():
                assert got == outcome(new, x, served)


def test_the_profiler_and_tracing_see_the_parts(served):
    model, x = network(), images()
    with torch.no_grad():
        model(x), model(x)
        with torch.profiler.profile() as profiler:
            model(x)
        traced = torch.jit.trace(model, x)
    names = [event.name for event in profiler.events() if event.name.startswith("densenet_fast::")]
    assert sum("dense_block" in name and "cpu" not in name for name in names) == 2
    assert "aten::batch_norm" in str(traced.inlined_graph) and error(traced(x), model(x)) < 1e-5


def of_other_kind(**options):
    return lambda model: setattr(model.features, "conv0", nn.Conv2d(3, 8, bias=False, **options))


LEFT = {
    "a bias": (lambda m: setattr(m.features, "conv0", nn.Conv2d(3, 8, 7, 2, 3)), PARTS[1:]),
    "other padding": (of_other_kind(kernel_size=5, padding=(1, 2), stride=2), PARTS[1:]),
    "circular padding": (of_other_kind(kernel_size=5, padding=2, padding_mode="circular"), PARTS[1:]),
    "dilation": (of_other_kind(kernel_size=3, dilation=2), PARTS[1:]),
    "another kernel": (of_other_kind(kernel_size=5, stride=3, padding=1), PARTS),
    "padding by name": (of_other_kind(kernel_size=3, padding="same"), PARTS[1:]),
    "batch statistics": (
        lambda m: m.features.denseblock2.denselayer1.norm1.train(),
        ["stem", "dense_block"] + PARTS[-1:],
    ),
    "no weights": (lambda m: setattr(m.features, "norm5", nn.BatchNorm2d(16, affine=False).eval()), PARTS),
    "a hook": (lambda m: m.features.transition1.register_forward_hook(lambda *_: None), PARTS),
}


@pytest.mark.parametrize("change, parts", LEFT.values(), ids=LEFT)
def test_what_is_of_another_kind_is_left_to_the_ops(change, parts, served):
    model, x = network(), images()
    change(model)
    with torch.no_grad():
        got = model(x)
        seen = [*served]
        with densenet_fast.set_fused(False):
            expected = model(x)
    assert seen == parts and error(got, expected) < 1e-5


def test_where_autograd_follows_something_the_ops_run(served):
    model = network()
    assert model(images()).requires_grad and not served
    model.requires_grad_(False)
    assert not model(images()).requires_grad and served == PARTS
    with torch.no_grad():
        model.double()(images().double())
        model.train()(images().double())
    assert served == PARTS


def test_nothing_that_is_handed_out_shares_its_memory(served):
    """A transition writes among the features of the block behind it: what a caller gets stands alone."""
    model, x, seen = network().to(memory_format=torch.channels_last), images(), []
    model.features.denseblock2.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(x)
        part = model.features[:6](x)
    assert served.count("transition") == 2
    for made in (*seen, part):
        assert made.untyped_storage().nbytes() == made.numel() * made.element_size()


def test_converted_networks_too(served):
    stock = randomise(torchvision.models.DenseNet(**SMALL)).eval()
    model, x = densenet_fast.convert(copy.deepcopy(stock)), images()
    with torch.no_grad():
        assert error(model(x), stock(x)) < 1e-5
    assert served[:4] == PARTS[:4]


def test_nan_and_infinity_pass_the_stem_as_in_stock(served):
    model, x = network(), images()
    x[0, 0, 20, 20], x[1, 1, 3, 3] = torch.nan, torch.inf
    with torch.no_grad():
        got = model.features[:4](x)
        with densenet_fast.set_fused(False):
            expected = model.features[:4](x)
    assert served == ["stem"] and got.isnan().equal(expected.isnan())
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_wrong_arguments_raise():
    kernels = torch.ops.densenet_fast
    norm = [torch.ones(8), torch.zeros(8), torch.zeros(8), torch.ones(8)]
    second = [torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4)]
    layer = [*norm, torch.zeros(4, 8, 1, 1), *second, torch.zeros(2, 4, 3, 3)]
    features, eps, grid = torch.zeros(36, 10), [1e-5, 1e-5], [1, 6, 6]

    def refused(message, op, *arguments):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)

    block = kernels.cpu_dense_block_inference
    block(features, 8, layer, eps, grid)
    refused("tensors: expected five", block, features, 8, layer[1:], eps, grid)
    refused("features: expected 10 columns, got 9", block, features[:, 1:], 8, layer, eps, grid)
    refused("weight: expected 7 columns, got 8", block, features, 7, layer, eps, grid)
    refused("grid: expected the product 36, got 42", block, features, 8, layer, eps, [1, 6, 7])
    refused("grid: expected two spatial sizes, got 3", block, features, 8, layer, eps, [1, 1, 6, 6])
    refused("running_var: expected 4", block, features, 8, [*layer[:8], norm[3], layer[9]], eps, grid)
    pool, out = kernels.cpu_bn_relu_pool_conv1x1_inference, torch.zeros(9, 4)
    refused("tensors: expected five", pool, features[:, :8], norm, 1e-5, grid, out)
    refused(r"out: expected \[9, 4\]", pool, features[:, :8], layer[:5], 1e-5, grid, out[1:])
    refused("tensors: expected four", kernels.cpu_bn_relu_global_avgpool_inference, features[:, :8], layer, 1e-5, 1)
    x = torch.zeros(1, 3, 12, 12).to(memory_format=torch.channels_last)
    stem, taps = kernels.cpu_stem_inference, torch.zeros(8, 7, 7, 3)
    stem(x, taps, norm, 1e-5, 2, 3, torch.zeros(9, 8))
    refused("images, weight: expected", stem, x, taps.permute(0, 3, 1, 2), norm, 1e-5, 2, 3, out)
    refused("images: expected adjacent channels", stem, x.contiguous(), taps, norm, 1e-5, 2, 3, out)
    refused("at least the kernel's size", stem, x[:, :, :0], taps, norm, 1e-5, 2, 3, out)
    refused("out: expected a row for each", stem, x, taps, norm, 1e-5, 2, 3, out)
    refused("stride, padding", stem, x, taps, norm, 1e-5, 0, 3, out)
