"""The modules: fused and one by one they agree, they say which they do and why, and hooks fire."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import densenet_fast
from densenet_fast import ops, reference
from densenet_fast.nn import BNReLUConv1x1, DenseBlock, DenseLayer, Transition
from helpers import assert_same, error, randomise, step, twin

SHAPES = {1: (11,), 2: (7, 6), 3: (4, 5, 6)}


@pytest.fixture
def fresh_compiler():
    """Nothing compiled before, and nothing left behind."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def block(**options):
    return randomise(DenseBlock(3, 6, 4, 4, **options).double())


def fused_calls(monkeypatch):
    """Counts the calls of the fused dense block."""
    calls = []
    fused = ops.dense_block
    monkeypatch.setattr(ops, "dense_block", lambda *args: (calls.append(1), fused(*args))[1])
    return calls


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make, stock",
    [
        (lambda d: DenseBlock(3, 6, 4, 4, spatial_dims=d), lambda d: reference.DenseBlock(3, 6, 4, 4, spatial_dims=d)),
        (
            lambda d: DenseBlock(3, 6, None, 4, 0.2, True, bias=True, spatial_dims=d),
            lambda d: reference.DenseBlock(3, 6, None, 4, 0.2, bias=True, spatial_dims=d),
        ),
        (
            lambda d: DenseBlock(3, 6, 4, 4, 0.3, spatial_dims=d, prepend=True),
            lambda d: reference.DenseBlock(3, 6, 4, 4, 0.3, spatial_dims=d, prepend=True),
        ),
        (lambda d: Transition(6, 5, spatial_dims=d), lambda d: reference.Transition(6, 5, spatial_dims=d)),
        (
            lambda d: Transition(6, 9, bias=True, spatial_dims=d),
            lambda d: reference.Transition(6, 9, bias=True, spatial_dims=d),
        ),
        (
            lambda d: BNReLUConv1x1(6, 5, bias=True, spatial_dims=d),
            lambda d: nn.Sequential(*list(reference.Transition(6, 5, bias=True, spatial_dims=d))[:3]),
        ),
    ],
)
def test_fused_equals_stock(make, stock, training, dims):
    got = randomise(make(dims).double()).train(training)
    assert got.obstacle() is None
    expected = stock(dims).double().train(training)
    state = got.state_dict()
    expected.load_state_dict(dict(zip(expected.state_dict(), state.values(), strict=True)))
    x = torch.randn(2, 6, *SHAPES[dims], dtype=torch.float64)
    assert_same(got, expected, x, 1e-10)
    with densenet_fast.set_fused(False):
        assert_same(got, expected, x, 1e-10)


def test_switching_off_and_on(monkeypatch):
    calls, module, x = fused_calls(monkeypatch), block(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    module(x)
    assert len(calls) == 1
    with densenet_fast.set_fused(False):
        module(x)
        with densenet_fast.set_fused(True):
            module(x)
        module(x)
    assert len(calls) == 2
    densenet_fast.set_fused(False)
    module(x)
    densenet_fast.set_fused(True)
    module(x)
    assert len(calls) == 3


def test_a_kept_switch_and_a_decorator(monkeypatch):
    calls, module, x = fused_calls(monkeypatch), block(), torch.randn(2, 6, 5, 5, dtype=torch.float64)

    @densenet_fast.set_fused(False)
    def unfused(depth=1):
        module(x)
        if depth:
            unfused(depth - 1)

    unfused(), module(x)
    assert len(calls) == 1
    kept = densenet_fast.set_fused(False)
    densenet_fast.set_fused(True)
    for _ in range(2):
        with kept:
            module(x)
        module(x)
    assert len(calls) == 3
    with pytest.raises(KeyError), densenet_fast.set_fused(False):
        raise KeyError
    module(x)
    assert len(calls) == 4


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_normalisation_shared_by_layers(momentum):
    got = block()
    got.denselayer1.norm2.momentum = momentum
    got.denselayer2.norm2 = got.denselayer3.norm2 = got.denselayer1.norm2
    got.denselayer3.conv2 = got.denselayer1.conv2
    expected = copy.deepcopy(got)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    with densenet_fast.set_fused(False):
        stock = list(step(expected, x))
    for (name, value), (_, reference_value) in zip(step(got, x), stock, strict=True):
        assert error(value, reference_value) < 1e-10 or value.equal(reference_value), name


def test_second_derivatives_through_a_block_used_twice():
    results = []
    for fused in (True, False):
        torch.manual_seed(2)
        module, transition = block().eval(), randomise(Transition(18, 6).double()).eval()
        z = torch.randn(2, 6, 8, 8, dtype=torch.float64, requires_grad=True)
        inputs = [z, *module.parameters(), *transition.parameters()]
        with densenet_fast.set_fused(fused):
            output = module(transition(module(z)))
            gradients = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
            energy = sum(g.square().sum() for g in gradients)
            results.append([*gradients, *torch.autograd.grad(energy, inputs)])
    assert all(error(a, b) < 1e-9 for a, b in zip(*results))


COMPILED_TANGENT = """
import torch
from densenet_fast.nn import DenseBlock

module, x = DenseBlock(2, 6, 4, 4).double().eval(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
tangent = lambda x: torch.func.jvp(module, (x,), (torch.ones_like(x),))[1]
expected = tangent(x)
try:
    print(torch.compile(tangent, backend="aot_eager")(x).allclose(expected))
except RuntimeError:
    print("refused")
"""


def test_compiled_forward_mode_is_right_or_refused():
    """In a process of its own: torch refuses to compile a tangent of batch_norm and is not itself afterwards."""
    output = subprocess.run([sys.executable, "-c", COMPILED_TANGENT], capture_output=True, text=True).stdout
    assert output.strip() in ("True", "refused")


def replace(path, module):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)

    return change


OBSTACLES = {
    "hook": (lambda m: m.denselayer2.norm2.register_forward_hook(lambda *_: None), "denselayer2.norm2 has a hook"),
    "pre-hook": (lambda m: m.denselayer1.register_forward_pre_hook(lambda *_: None), "denselayer1 has a hook"),
    "backward hook": (
        lambda m: m.denselayer1.conv1.register_full_backward_hook(lambda *_: None),
        "denselayer1.conv1 has a hook",
    ),
    "parametrised": (
        lambda m: nn.utils.parametrizations.weight_norm(m.denselayer3.conv2),
        "denselayer3.conv2 is a ParametrizedConv2d",
    ),
    "spectral norm": (lambda m: nn.utils.spectral_norm(m.denselayer3.conv2), "denselayer3.conv2 has a hook"),
    "forward replaced": (
        lambda m: setattr(m.denselayer1, "forward", m.denselayer1.forward),
        "denselayer1 has a hook or a forward of its own",
    ),
    "other activation": (replace("denselayer1.relu1", nn.ELU()), "denselayer1.relu1 is a ELU"),
    "other norm": (replace("denselayer2.norm1", nn.GroupNorm(2, 10)), "denselayer2.norm1 is a GroupNorm"),
    "no norm": (replace("denselayer2.norm2", nn.Identity()), "denselayer2.norm2 is a Identity"),
    "dilated": (
        replace("denselayer1.conv2", nn.Conv2d(16, 4, 3, padding=2, dilation=2)),
        "denselayer1.conv2 is not a plain convolution of kernel size 3",
    ),
    "reflected": (
        replace("denselayer1.conv2", nn.Conv2d(16, 4, 3, padding=1, padding_mode="reflect")),
        "denselayer1.conv2 is not a plain",
    ),
    "grouped": (replace("denselayer1.conv1", nn.Conv2d(6, 16, 1, groups=2)), "denselayer1.conv1 is not a plain"),
    "other layer": (replace("denselayer1", reference.DenseLayer(6, 4)), "denselayer1 is a DenseLayer, not"),
    "mixed layers": (
        replace("denselayer1", DenseLayer(6, 4, None)),
        "some of its layers have a bottleneck and some none",
    ),
}


@pytest.mark.parametrize("change, reason", OBSTACLES.values(), ids=OBSTACLES)
def test_what_cannot_be_fused_runs_on_stock_ops(change, reason, monkeypatch):
    module = block()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        change(module)
    module.double()
    calls = fused_calls(monkeypatch)
    (row,) = densenet_fast.explain(module)
    assert not row.fused and row.backend == "stock torch" and reason in row.reason, row.reason
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(module)
    output, stock = module(x), reference.DenseBlock.forward(expected, x)
    assert output.equal(stock) and not calls


def test_hooks_fire_and_change_the_result():
    module, x = block(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    seen = []
    handle = module.denselayer2.register_forward_hook(lambda m, i, o: seen.append(o.shape) or o * 2)
    doubled = copy.deepcopy(module)(x)
    handle.remove()
    plain = module(x)
    assert seen == [(2, 4, 5, 5)]
    assert doubled[:, :10].allclose(plain[:, :10]) and doubled[:, 10:14].allclose(2 * plain[:, 10:14])


def test_hooks_outside_the_layers_leave_the_block_fused(monkeypatch):
    calls, module, x = fused_calls(monkeypatch), block(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    x.requires_grad_()
    seen = []
    module.register_forward_hook(lambda m, i, o: seen.append("forward"))
    module.register_forward_pre_hook(lambda m, i: seen.append("pre"))
    module.register_full_backward_hook(lambda m, i, o: seen.append((i[0].shape, o[0].shape)))
    module.denselayer1.conv1.weight.register_hook(lambda g: seen.append(g.shape))
    module(x).sum().backward()
    assert len(calls) == 1
    assert seen[:2] == ["pre", "forward"]
    assert set(seen[2:]) == {((2, 6, 5, 5), (2, 18, 5, 5)), (16, 6, 1, 1)}


def test_global_hooks_see_the_inner_modules():
    module, seen = block(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        module(torch.randn(2, 6, 5, 5, dtype=torch.float64))
    finally:
        handle.remove()
    assert seen.count("Conv2d") == 6


def test_traces_see_stock_ops():
    module, x = block().eval(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.trace(module, x)
    assert "densenet_fast::" not in str(traced.inlined_graph) and traced(x).allclose(expected)
    exported = torch.export.export(module, (x,))
    assert "densenet_fast" not in str(exported.graph) and exported.module()(x).allclose(expected)
    symbolic = torch.fx.symbolic_trace(module)
    assert symbolic(x).allclose(expected)


def test_func_transforms_run_on_stock_ops():
    module, x = block().eval(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters)
    expected = torch.autograd.grad(module(x).square().sum(), list(parameters.values()))
    assert all(error(g, e) < 1e-12 for g, e in zip(gradients.values(), expected))
    _, tangent = torch.func.jvp(lambda x: module(x), (x,), (torch.ones_like(x),))
    assert tangent.isfinite().all() and tangent[:, :6].eq(1).all()
    per_sample = torch.func.vmap(lambda one: module(one[None]))(x)
    assert per_sample.squeeze(1).allclose(module(x))


def test_functional_call_swaps_parameters():
    module, other, x = block(), block(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(other)(x)
    assert torch.func.functional_call(module, other.state_dict(), (x,)).equal(expected)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_checkpointed_and_nested_autograd(memory_efficient):
    module = block(memory_efficient=memory_efficient).eval()
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 18, 5, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad(module(x), x, cotangent)
    again = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)
    assert torch.autograd.grad(again, x, cotangent)[0].equal(expected)
    with torch.autograd.set_detect_anomaly(True):
        assert torch.autograd.grad(module(x), x, cotangent)[0].equal(expected)


def test_backward_under_autocast_computes_in_the_dtypes_of_forward():
    module, x = block(memory_efficient=True).float(), torch.randn(2, 6, 5, 5)
    cotangent, gradients = torch.randn(2, 18, 5, 5), []
    for enabled in (False, True):
        output = module(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(output, list(module.parameters()), cotangent))
    assert all(a.equal(b) for a, b in zip(*gradients))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_equals_eager(training, channels_last, fresh_compiler):
    """With channels enough that the convolutions choose their own memory formats."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    module = randomise(DenseBlock(2, 16, 4, 16, 0.2)).train(training)
    expected = twin(module, DenseBlock(2, 16, 4, 16, 0.2))
    module, x = module.to(memory_format=memory_format), torch.randn(2, 16, 9, 9).to(memory_format=memory_format)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same(compiled, expected, x, 1e-5)


def test_replaced_pool_of_a_transition():
    for pool in (nn.MaxPool2d(2), nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2), nn.Identity()):
        module = Transition(6, 4).double()
        module.pool = pool
        x = torch.randn(2, 6, 7, 7, dtype=torch.float64)
        assert "pool is not a plain average" in module.obstacle()
        assert module(x).equal(nn.Sequential.forward(module, x))
    module.pool = nn.AvgPool2d((2, 2), stride=(2, 2))
    assert module.obstacle() is None


def test_output_of_a_transition_may_be_changed_in_place():
    results = []
    for fused in (True, False):
        torch.manual_seed(1)
        module, x = randomise(Transition(6, 4).double()), torch.randn(2, 6, 7, 7, dtype=torch.float64)
        x.requires_grad_()
        with densenet_fast.set_fused(fused):
            module(x).relu_().square().sum().backward()
        results.append(x.grad)
    assert error(*results) < 1e-12


@pytest.mark.library
def test_explain():
    model = densenet_fast.DenseNet(8, (2, 2), 12)
    model.features.denseblock2.denselayer1.relu1 = nn.GELU()
    report = densenet_fast.explain(model)
    assert [(r.name, r.kind, r.fused, r.backend) for r in report] == [
        ("features.norm0", "Stem", True, "cpu"),
        ("features.denseblock1", "DenseBlock", True, "cpu"),
        ("features.transition1", "Transition", True, "cpu"),
        ("features.denseblock2", "DenseBlock", False, "stock torch"),
        ("features.norm5", "Head", True, "cpu"),
    ]
    assert "denselayer1.relu1 is a GELU" in str(report)
    with densenet_fast.set_fused(False):
        assert {r.reason for r in densenet_fast.explain(model)} == {"switched off by set_fused(False)"}
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        densenet_fast.explain("densenet121")
