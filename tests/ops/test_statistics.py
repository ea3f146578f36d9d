"""Batch statistics handed from op to op: the same numbers as if each had computed its own, and fewer passes."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import densenet_fast
from densenet_fast import functional
from densenet_fast.backends import aten, cpu
from densenet_fast.backends.affine import Running, RunningStatistics, Update
from densenet_fast.functional import BatchStatistics, BNReLUConv
from densenet_fast.ops.chain import Whole
from helpers import assert_same, error, make_norm, randomise, twin

SHAPES = [(2, 3, 9), (2, 3, 6, 5), (2, 3, 4, 4, 7)]


def unit(channels, out, kernel, dims, **norm):
    weight = torch.randn(out, channels, *[kernel] * dims, dtype=torch.float64) / channels**0.5
    made = make_norm(channels, **norm)
    if not made.frozen:
        made = made._replace(running_mean=None, running_var=None, num_batches_tracked=None)
    return BNReLUConv(made, weight.requires_grad_())


def network(dims, frozen=()):
    """The units of block, transition, block and head; those named in ``frozen`` normalise by running statistics."""

    def block(channels, name):
        mode = dict(training=name not in frozen)
        return [(unit(channels + 2 * i, 4, 1, dims, **mode), unit(4, 2, 3, dims, **mode)) for i in range(2)]

    return {
        "stem": unit(3, 1, 1, dims, training="stem" not in frozen).norm,
        "block1": block(3, "block1"),
        "transition": unit(7, 4, 1, dims, training="transition" not in frozen),
        "block2": block(4, "block2"),
        "head": unit(8, 1, 1, dims, training="head" not in frozen).norm,
    }


def run(parts, x, memory_efficient=False, handed=True):
    """The head's result and that of the second block; ``handed`` says whether statistics go from op to op."""
    known = None

    def op(function, *arguments, returns=True, **options):
        nonlocal known
        if handed and function is not functional.bn_relu_maxpool:
            options["statistics"] = known
        if handed and returns:
            out, known = function(*arguments, **options, return_statistics=True)
            return out
        return function(*arguments, **options)

    x = op(functional.bn_relu_maxpool, x, parts["stem"])
    x = op(functional.dense_block, x, parts["block1"], None, memory_efficient)
    x = op(functional.bn_relu_conv1x1_avgpool, x, *parts["transition"])
    features = op(functional.dense_block, x, parts["block2"], None, memory_efficient)
    return op(functional.bn_relu_global_avgpool, features, parts["head"], returns=False), features


def leaves(parts):
    units = [u for name in ("block1", "block2") for layer in parts[name] for u in layer] + [parts["transition"]]
    norms = [parts["stem"], parts["head"], *(u.norm for u in units)]
    return [t for norm in norms for t in (norm.weight, norm.bias)] + [u.weight for u in units]


def gradients(outputs, inputs, create_graph=False):
    generator = torch.Generator().manual_seed(3)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, inputs, cotangents, create_graph=create_graph, allow_unused=True)


FROZEN = [(), ("block1",), ("transition",), ("block2", "head"), ("stem", "block1", "transition", "block2", "head")]


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("frozen", FROZEN, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_handed_on_or_computed_again(shape, frozen, memory_efficient):
    parts = network(len(shape) - 2, frozen)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = (x, *leaves(parts))
    results = [run(parts, x, memory_efficient, handed) for handed in (True, False)]
    for got, expected in zip(*results):
        assert error(got, expected) < 1e-14
    for got, expected in zip(*(gradients(r, inputs) for r in results), strict=True):
        assert (got - expected).norm() <= 1e-11 * expected.norm().clamp_min(1e-2)


@pytest.mark.parametrize("outputs", [[0], [1], [0, 1]])
def test_derivatives(outputs):
    parts = network(2)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)

    def function(x, *_):
        results = run(parts, x)
        return tuple(results[i] for i in outputs)

    inputs = (x, *leaves(parts))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    twice = []
    for handed in (True, False):
        first = gradients([run(parts, x, handed=handed)[i] for i in outputs], inputs, create_graph=True)
        twice.append(gradients([g for g in first if g is not None], inputs))
    for got, expected in zip(*twice, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or (got - expected).norm() <= 1e-9 * expected.norm().clamp_min(1e-3)


def test_of_a_block_alone_are_differentiable():
    parts = network(2)
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)

    def described(x, *_):
        features, statistics = functional.dense_block(x, parts["block1"], return_statistics=True)
        var, mean = torch.var_mean(features, (0, 2, 3), correction=0)
        assert error(statistics.mean, mean) < 1e-14 and error(statistics.var, var) < 1e-14
        return statistics[:2]

    inputs = (x, *(t for layer in parts["block1"] for u in layer for t in (u.weight, u.norm.weight, u.norm.bias)))
    assert torch.autograd.gradcheck(described, inputs, fast_mode=True)
    for i in (0, 1):
        assert torch.autograd.gradcheck(lambda *a, i=i: described(*a)[i], inputs, fast_mode=True)


def test_known_ones_without_a_graph_leave_the_gradient_whole():
    parts = network(2)
    x = torch.randn(2, 7, 6, 4, dtype=torch.float64, requires_grad=True)
    var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
    known = BatchStatistics(mean, var)
    for function, rest in (
        (functional.bn_relu_conv1x1, tuple(parts["transition"])),
        (functional.bn_relu_conv1x1_avgpool, tuple(parts["transition"])),
        (functional.bn_relu_global_avgpool, (parts["transition"].norm,)),
        (functional.dense_block, ([(unit(7, 2, 3, 2),)],)),
    ):
        outputs = [function(x, *rest, statistics=statistics) for statistics in (known, None)]
        assert error(*outputs) < 1e-14
        assert error(*(gradients([o], x)[0] for o in outputs)) < 1e-12


def test_are_ignored_where_they_are_not_what_normalises():
    parts = network(2)
    wrong = BatchStatistics(torch.full((7,), 9.0, dtype=torch.float64), torch.full((7,), 9.0, dtype=torch.float64))
    x = torch.randn(2, 7, 6, 4, dtype=torch.float64)
    frozen = unit(7, 2, 1, 2, training=False)
    assert functional.bn_relu_conv1x1(x, *frozen, statistics=wrong).equal(functional.bn_relu_conv1x1(x, *frozen))
    norm = parts["transition"].norm
    expected = functional.bn_relu_global_avgpool(x, norm)
    assert functional.bn_relu_global_avgpool(x, norm, statistics=wrong._replace(group="another")).equal(expected)
    assert not functional.bn_relu_global_avgpool(x, norm, statistics=wrong).equal(expected)
    single = BNReLUConv(*(t if i else norm._replace(weight=None, bias=None) for i, t in enumerate(parts["transition"])))
    x, wrong = x.float(), BatchStatistics(*(t.float() for t in wrong[:2]))
    weight = single.weight.detach().float()
    with torch.autocast("cpu", torch.bfloat16):  # which rounds x: the statistics were of what it was before
        got = functional.bn_relu_conv1x1(x, single.norm, weight, statistics=wrong)
        assert got.equal(functional.bn_relu_conv1x1(x, single.norm, weight))


@pytest.mark.parametrize(
    "mean, var, field",
    [
        (torch.zeros(6).double(), torch.ones(7).double(), "mean"),
        (torch.zeros(7).double(), torch.ones(7), "var"),
        (torch.zeros(7, device="meta").double(), torch.ones(7).double(), "mean"),
    ],
)
def test_unlike_x_raise(mean, var, field):
    x = torch.randn(2, 7, 6, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"statistics.{field}: expected shape, dtype and device"):
        functional.bn_relu_global_avgpool(x, make_norm(7), statistics=BatchStatistics(mean, var))


@pytest.fixture
def passes(monkeypatch):
    """How often statistics were computed of a matrix on its own, and gradients completed, by matrix width, where the
    ops' bodies run in Python."""
    calls = []
    monkeypatch.setattr(cpu, "RUNS_STAGES", False)
    monkeypatch.setattr(Whole, "of", lambda x, given: None)
    for backend in (cpu, aten):
        for name in ("channel_statistics", "finalise_gradient"):
            own = getattr(backend, name)
            monkeypatch.setattr(backend, name, lambda x, *a, own=own, name=name: (calls.append(name), own(x, *a))[1])
    return calls


@pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled kernels")
def test_a_model_makes_no_pass_of_its_own(passes):
    model = densenet_fast.DenseNet(4, (2, 2, 2), 8, num_classes=5)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    # conv0's output is the only one that no op of ours made
    assert passes == ["channel_statistics", "finalise_gradient"]
    passes.clear()
    model.eval()(torch.randn(2, 3, 64, 64)).sum().backward()
    assert not passes


CHANGES = {
    "nothing": lambda f: None,
    "a hook that changes a block's result": lambda f: f.denseblock1.register_forward_hook(lambda m, args, out: out * 2),
    "a hook before a transition": lambda f: f.transition1.register_forward_pre_hook(lambda m, args: args[0] * 2),
    "a frozen transition": lambda f: f.transition1.eval(),
    "a frozen block": lambda f: f.denseblock2.eval(),
    "a frozen head": lambda f: f.norm5.eval(),
    "a module before a transition": lambda f: f.add_module("transition1", nn.Sequential(nn.Tanh(), f.transition1)),
    "a transition of another kind": lambda f: setattr(
        f.transition1, "forward", nn.Sequential.forward.__get__(f.transition1)
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_models_with_what_lies_between(change, memory_efficient):
    torch.manual_seed(1)
    arguments = (4, (4, 2, 2), 8, 4, 0.0, 5)
    net = randomise(densenet_fast.DenseNet(*arguments, memory_efficient=memory_efficient)).double()
    reference = twin(net, densenet_fast.reference.DenseNet(*arguments))
    for model in (net, reference):
        change(model.features)
    assert_same(net, reference, torch.randn(2, 3, 40, 56, dtype=torch.float64), 1e-9)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("frozen", FROZEN[:2], ids=str)
def test_through_the_dispatcher_or_not(frozen, memory_efficient):
    """A mode that must see the ops sees them; and they compute the very same."""
    parts = network(2, frozen)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    inputs = (x, *leaves(parts))

    def everything():
        outputs = run(parts, x, memory_efficient)
        return [*outputs, *gradients(outputs, inputs)]

    direct = everything()
    with Recorder() as recorder:
        dispatched = everything()
    names = ("dense_block", "bn_relu_conv1x1", "bn_relu_maxpool", "bn_relu_global_avgpool")
    assert recorder.seen >= {f"densenet_fast.{name}{end}.default" for name in names for end in ("", "_backward")}
    assert all(a.equal(b) for a, b in zip(direct, dispatched, strict=True))


def _running(momenta, change=lambda t: t):
    """Running statistics of as many normalisations as momenta, of 3, 4, ... channels."""
    vectors = [[change(t) for t in torch.rand(2, 3 + i).unbind()] for i in range(len(momenta))]
    starts = [sum(range(3, 3 + i)) for i in range(len(momenta))]
    return [Running(*v, torch.tensor(i), m, start) for i, (v, m, start) in enumerate(zip(vectors, momenta, starts))]


@pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize(
    "make, count, kernels",
    {
        "momenta": (lambda: _running([0.1, 0.7, 1.0, 0.0]), 5, 1),
        "one row": (lambda: _running([0.1]), 1, 1),
        "without counters": (lambda: [r._replace(batches=None) for r in _running([0.1, None])], 5, 1),
        "of one normalisation twice": (lambda: _running([0.3]) * 2, 5, 1),
        "cumulative": (lambda: _running([0.1, None]), 5, 0),
        "wide": (lambda: _running([0.1], torch.Tensor.double), 5, 0),
        "not adjacent": (lambda: _running([0.1], lambda t: torch.stack([t, t], 1)[:, 0]), 5, 0),
        "rows counted by a tensor": (lambda: _running([0.1]), torch.tensor(5.0, dtype=torch.float64), 0),
    }.values(),
)
def test_running_statistics_are_updated_as_on_torch(make, count, kernels, monkeypatch):
    ours = make()
    copies = {id(t): t.clone() for r in ours for t in r[:3] if t is not None}
    torchs = [r._replace(**{k: copies.get(id(t)) for k, t in zip(r._fields[:3], r[:3])}) for r in ours]
    mean, var = torch.rand(2, sum(range(3, 3 + len(ours)))).unbind()
    before = [t._version for r in ours for t in r[:3] if t is not None]
    aten.update_running_statistics([Update(torchs, mean, var, count)])
    called, own = [], aten.update_running_statistics
    monkeypatch.setattr(aten, "update_running_statistics", lambda updates: (called.append(1), own(updates)))
    cpu.update_running_statistics([Update(RunningStatistics(ours), mean, var, count)])
    assert len(called) == 1 - kernels
    for r, other in zip(ours, torchs):
        torch.testing.assert_close(r[:2], other[:2], rtol=1e-6, atol=1e-7, equal_nan=True)
        assert r.batches == other.batches
    assert all(t._version > v for t, v in zip((t for r in ours for t in r[:3] if t is not None), before))


@pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled kernels")
def test_the_update_of_running_statistics_refuses_what_does_not_fit():
    update, vectors, mean = (
        torch.ops.densenet_fast.cpu_update_running_statistics,
        torch.ones(2, 3).unbind(),
        torch.ones(4),
    )
    given = (vectors, [torch.tensor(0)], [0.1], [0], mean, mean, 5.0)
    wrong = {
        0: ([(vectors[0],), (torch.ones(5), vectors[1]), (vectors[0], vectors[1].double())], "vectors: expected"),
        1: ([[torch.tensor(0.0)]], "counters: expected one int64"),
        3: ([[2], [-1], []], "vectors: expected"),
        5: ([mean[:3], mean.double()], "var: expected 4 contiguous"),
    }
    for place, (values, message) in wrong.items():
        for value in values:
            with pytest.raises(RuntimeError, match=message):
                update(*given[:place], value, *given[place + 1 :])
