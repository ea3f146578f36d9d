"""The models' stem and head: fused where they can be, on stock modules with the same result where they cannot."""

import copy
from collections import OrderedDict

import pytest
import torch
import torchvision
import torchvision.models.feature_extraction
from torch import nn

import densenet_fast
from densenet_fast import functional, ops
from densenet_fast.functional import chain
from densenet_fast.nn.features import Features
from densenet_fast.nn.memory_format import is_channels_last
from helpers import assert_same, error, randomise, step, twin

SMALL = dict(growth_rate=8, block_config=(2, 3), num_init_features=12, num_classes=5)


def small(**options):
    return densenet_fast.DenseNet(**{**SMALL, **options})


def small_stock():
    return torchvision.models.DenseNet(**SMALL)


@pytest.fixture
def calls(monkeypatch):
    """The names of the stem's and head's ops as they are called, the head's also together with a block."""
    seen = []
    for name in ("bn_relu_maxpool", "bn_relu_global_avgpool"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *args, n=name, op=op: (seen.append(n), op(*args))[1])
    head = chain.HEAD
    monkeypatch.setattr(chain, "HEAD", lambda *args: (seen.append("bn_relu_global_avgpool"), head(*args))[1])
    return seen


BOTH = ["bn_relu_maxpool", "bn_relu_global_avgpool"]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [(33, 42), (46, 35)])
@pytest.mark.parametrize("training", [True, False])
def test_fused_equals_torchvision(calls, training, size, channels_last):
    expected = randomise(small_stock().double()).train(training)
    got = twin(expected, small())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    if channels_last:
        x, got = x.to(memory_format=torch.channels_last), got.to(memory_format=torch.channels_last)
    assert_same(got, expected, x, 1e-9)
    assert calls == BOTH


def test_features_are_normalised_as_torchvisions(calls):
    expected = randomise(small_stock().double())
    got = twin(expected, small())
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    features = got.features(x)
    assert calls == BOTH[:1] and features.is_contiguous()
    assert error(features, expected.features(x)) < 1e-10
    for (name, value), reference_value in zip(got.named_buffers(), expected.buffers()):
        assert error(value, reference_value) < 1e-12 or value.equal(reference_value), name
    assert error(got.features[:-1](x), expected.features[:-1](x)) < 1e-10
    assert error(got.features[:3](x), expected.features[:3](x)) < 1e-12
    assert error(got.features[:4](x), expected.features[:4](x)) < 1e-12


@pytest.mark.parametrize("hooked", [False, True])
def test_the_stem_reads_what_the_first_convolution_makes_in_place(hooked, monkeypatch):
    """A hook on the convolution sees the memory format of the images all the same."""
    model, read, seen, run = small(num_init_features=16), [], [], functional.run_bn_relu_maxpool
    monkeypatch.setattr(
        functional, "run_bn_relu_maxpool", lambda x, *a, **kw: (read.append(is_channels_last(x)), run(x, *a, **kw))[1]
    )
    if hooked:
        model.features.conv0.register_forward_hook(lambda m, i, o: seen.append(is_channels_last(o)))
    model(torch.randn(2, 3, 40, 40))
    assert read == [not hooked] and seen == [False] * hooked


def test_a_model_without_a_stem(calls):
    model = small(small_inputs=True)
    model(torch.randn(2, 3, 12, 12)).sum().backward()
    assert calls == BOTH[1:]
    assert [row.kind for row in densenet_fast.explain(model)][::3] == ["DenseBlock", "Head"]


def replace(name, module):
    return lambda model: setattr(model.features, name, module)


def insert(name, module):
    """Puts ``module`` before the child ``name`` of features, or at their end."""

    def change(model):
        children = list(model.features._modules.items())
        at = next((i for i, (n, _) in enumerate(children) if n == name), len(children))
        model.features = Features(OrderedDict([*children[:at], ("inserted", module), *children[at:]]))

    return change


class Other(Features):
    pass


def nothing(*_):
    return None


STEM_OBSTACLES = {
    "hook": (lambda m: m.features.relu0.register_forward_hook(nothing), "relu0 has a hook"),
    "pre-hook": (lambda m: m.features.norm0.register_forward_pre_hook(nothing), "norm0 has a hook"),
    "backward hook": (lambda m: m.features.pool0.register_full_backward_hook(nothing), "pool0 has a hook"),
    "forward": (lambda m: setattr(m.features.norm0, "forward", m.features.norm0.forward), "norm0 has a hook or"),
    "compiled": (lambda m: m.features.pool0.compile(backend="eager"), "pool0 has a hook or"),
    "other norm": (replace("norm0", nn.InstanceNorm2d(12, affine=True)), "norm0 is a InstanceNorm2d"),
    "other activation": (replace("relu0", nn.ReLU6()), "relu0 is a ReLU6"),
    "no pool": (replace("pool0", nn.Identity()), "pool0 is not a plain maximum"),
    "average": (replace("pool0", nn.AvgPool2d(3, 2, 1)), "pool0 is not a plain maximum"),
    "window": (replace("pool0", nn.MaxPool2d(2, 2, 1)), "pool0 is not a plain maximum"),
    "stride": (replace("pool0", nn.MaxPool2d(3, (2, 1), 1)), "pool0 is not a plain maximum"),
    "padding": (replace("pool0", nn.MaxPool2d(3, 2)), "pool0 is not a plain maximum"),
    "dilation": (replace("pool0", nn.MaxPool2d(3, 2, 1, dilation=2)), "pool0 is not a plain maximum"),
    "ceiling": (replace("pool0", nn.MaxPool2d(3, 2, 1, ceil_mode=True)), "pool0 is not a plain maximum"),
    "order": (insert("relu0", nn.Hardtanh()), "norm0, relu0, pool0 do not follow each other"),
}
HEAD_OBSTACLES = {
    "hook": (lambda m: m.features.norm5.register_forward_hook(nothing), "norm5 has a hook"),
    "backward hook": (lambda m: m.features.norm5.register_full_backward_hook(nothing), "norm5 has a hook"),
    "hook on features": (lambda m: m.features.register_forward_hook(nothing), "features has a hook"),
    "forward": (lambda m: setattr(m.features, "forward", m.features.forward), "features has a hook or"),
    "compiled": (lambda m: m.features.compile(backend="eager"), "features has a hook or"),
    "other features": (
        lambda m: setattr(m, "features", Other(OrderedDict(m.features._modules))),
        "features is a Other",
    ),
    "other norm": (replace("norm5", nn.GroupNorm(2, 38)), "norm5 is a GroupNorm"),
    "not the last": (insert(None, nn.Hardtanh()), "norm5 is not the last"),
}
OBSTACLES = {f"stem, {name}": ("Stem", *case) for name, case in STEM_OBSTACLES.items()}
OBSTACLES |= {f"head, {name}": ("Head", *case) for name, case in HEAD_OBSTACLES.items()}


@pytest.mark.parametrize("kind, change, reason", OBSTACLES.values(), ids=OBSTACLES)
def test_what_cannot_be_fused_runs_on_stock_modules(kind, change, reason, calls):
    torch.compiler.reset()
    model = small()
    change(model)
    randomise(model.double())
    (row,) = [row for row in densenet_fast.explain(model) if row.kind == kind]
    assert not row.fused and row.backend == "stock torch" and reason in row.reason, row.reason
    x = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    state = copy.deepcopy(model.state_dict())
    got = dict(step(model, x))
    got = {name: value.clone() for name, value in got.items()}
    assert calls == [name for name in BOTH if (name == BOTH[0]) != (kind == "Stem")]
    model.load_state_dict(state)
    with densenet_fast.set_fused(False):
        expected = dict(step(model, x))
    for name, value in expected.items():
        assert (got[name].double() - value.double()).norm() <= 1e-9 * value.double().norm().clamp_min(1e-3), name


@pytest.mark.parametrize("equal", [nn.MaxPool2d((3, 3), [2, 2], (1, 1)), nn.MaxPool2d(3, stride=2, padding=1)])
def test_the_same_pool_otherwise_written_is_fused(equal, calls):
    model = small()
    model.features.pool0 = equal
    model(torch.randn(2, 3, 40, 40))
    assert calls == BOTH


@pytest.mark.parametrize("name", ["norm0", "relu0", "pool0", "norm5"])
def test_hooks_fire_and_change_the_result(name):
    model, x, seen = randomise(small()), torch.randn(2, 3, 40, 40), []
    with densenet_fast.set_fused(False):
        handle = model.features.get_submodule(name).register_forward_hook(lambda m, i, o: o.sin())
        expected = copy.deepcopy(model)(x)
        handle.remove()
    plain = copy.deepcopy(model)(x)
    model.features.get_submodule(name).register_forward_hook(lambda m, i, o: (seen.append(o.shape), o.sin())[1])
    got = model(x)
    assert len(seen) == 1 and error(got, expected) < 1e-5 and error(got, plain) > 1e-2


def test_global_hooks_see_every_module(calls):
    model, seen = small(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        model(torch.randn(2, 3, 40, 40))
    finally:
        handle.remove()
    assert not calls and len(seen) == len(set(seen)) == len(list(model.modules()))


def test_switched_off(calls):
    with densenet_fast.set_fused(False):
        model = small()
        model(torch.randn(2, 3, 40, 40))
        assert not calls
        assert {row.reason for row in densenet_fast.explain(model)} == {"switched off by set_fused(False)"}


@pytest.mark.library
def test_explain_lists_them():
    report = densenet_fast.explain(nn.ModuleDict({"a": small(), "b": nn.Linear(2, 2)}))
    rows = [(row.name, row.kind, row.fused, row.backend) for row in report]
    assert rows[0] == ("a.features.norm0", "Stem", True, "cpu")
    assert rows[-1] == ("a.features.norm5", "Head", True, "cpu")
    assert densenet_fast.explain(small().half())[0].backend == "aten"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_frozen_normalisations(dtype, calls):
    expected = randomise(small_stock().double())
    got = twin(expected, small()).to(dtype)
    for model in (got, expected):
        model.features.norm0.eval().requires_grad_(False)
        model.features.norm5.eval()
    x = torch.randn(4, 3, 40, 36).to(dtype)
    results = [dict(step(model, x.to(model.classifier.weight.dtype))) for model in (got, expected)]
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 0.15)
    for name in ("output", "grad features.norm5.weight", "grad features.norm5.bias", "grad classifier.weight"):
        assert error(results[0][name], results[1][name]) < tolerance, name
    assert results[0]["grad features.norm0.weight"] is None
    assert results[0]["features.norm0.num_batches_tracked"] == results[0]["features.norm5.num_batches_tracked"] == 0
    assert calls == BOTH


class Rounded(nn.Conv2d):
    """A convolution that leaves autocast."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def test_under_autocast_dtypes_are_stocks(calls):
    model, seen = small(), []
    model.features.conv0 = Rounded(3, 12, 7, 2, 3, bias=False)
    model.features.denseblock1.register_forward_pre_hook(lambda m, i: seen.append(i[0].dtype))
    model.classifier.register_forward_pre_hook(lambda m, i: seen.append(i[0].dtype))
    for fused in (True, False):
        with densenet_fast.set_fused(fused), torch.autocast("cpu", torch.bfloat16):
            seen.append(model(torch.randn(2, 3, 40, 40)).dtype)
    assert seen[:3] == seen[3:] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert calls == BOTH


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_equals_eager(training, channels_last):
    torch.compiler.reset()
    model = randomise(small(num_init_features=16)).train(training)
    expected = twin(model, small(num_init_features=16))
    x = torch.randn(4, 3, 64, 64)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    assert_same(torch.compile(model, backend=backend, fullgraph=True), expected, x, 1e-4)
    assert all(any(f"densenet_fast.{name}" in code for code in graphs) for name in BOTH)
    torch.compiler.reset()


def test_traces_see_stock_modules():
    model, x = randomise(small()).eval(), torch.randn(2, 3, 40, 40)
    expected = model(x)
    exported = torch.export.export(model, (x,))
    assert "densenet_fast" not in str(exported.graph) and error(exported.module()(x), expected) < 1e-5
    names = ["features.norm0", "features.pool0", "features.norm5", "classifier"]
    nodes = torchvision.models.feature_extraction.create_feature_extractor(model, names)(x)
    assert error(nodes["classifier"], expected) < 1e-5 and nodes["features.norm0"].shape == (2, 12, 20, 20)


def test_func_transforms():
    model, x = randomise(small().double()).eval(), torch.randn(2, 3, 40, 40, dtype=torch.float64)
    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    expected = torch.autograd.grad(model(x).square().sum(), list(parameters.values()))
    assert all(error(g, e) < 1e-10 for g, e in zip(gradients.values(), expected))
    per_sample = torch.func.vmap(lambda one: model(one[None])[0])(x)
    assert error(per_sample, model(x)) < 1e-10
    tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))[1]
    shifted = (model(x + 1e-6) - model(x - 1e-6)) / 2e-6
    assert error(tangent, shifted) < 1e-4


def test_features_without_pixels_leave_the_head_to_stock(calls):
    class Cut(nn.Module):
        def forward(self, x):
            return x[:, :, :0]

    model = small().eval()
    insert("norm5", Cut())(model)
    results = []
    for fused in (True, False):
        with densenet_fast.set_fused(fused):
            results.append(model(torch.randn(2, 3, 40, 40)))
    assert results[0].shape == (2, 5) and results[0].isnan().equal(results[1].isnan())
    assert calls == BOTH[:1]


def test_no_normalised_copy_is_kept():
    """Of what is as large as the stem's result, a training step keeps the images, the first convolution's output and
    the dense blocks' features."""
    model = small(memory_efficient=True, num_init_features=16)
    x = torch.randn(2, 3, 128, 128)
    saved, seen = {}, []

    def pack(t):
        seen.append(t)  # no freed address may be counted as an earlier storage
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    stem = 4 * 2 * 16 * 64 * 64
    sizes = sorted((size for size in saved.values() if size >= stem / 16), reverse=True)
    first, second = 4 * 2 * (16 + 16) * 32 * 32, 4 * 2 * (16 + 24) * 16 * 16
    assert sizes == sorted([4 * x.numel(), stem, first, second, stem // 16], reverse=True)
