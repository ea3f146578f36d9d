"""A small network in training as one call, against its parts."""

import copy
import gc

import pytest
import torch
from torch import nn

import densenet_fast
from densenet_fast.backends import cpu
from densenet_fast.functional import TrainingNetwork, network
from helpers import randomise
from ops.test_chain import CASES

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled kernels")

BY_PARTS = {
    "recomputed",
    "a block's fixed parameter",
    "a reader's fixed parameter",
    "a stem's fixed parameter",
    "biases",
}
"""Those of the cases that do not run as one call."""


def small():
    torch.manual_seed(0)
    return randomise(densenet_fast.DenseNet(8, (3, 4), 16, num_classes=5))


def images(*size):
    return torch.randn(*(size or (2, 3, 38, 44)), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calls(monkeypatch):
    """Filled with a value for each pass through a whole network."""
    seen, own = [], cpu.network
    monkeypatch.setattr(cpu, "network", lambda *args: (own(*args), seen.append(0))[0])
    gc.disable()  # a collection forgets what is known of a network
    yield seen
    gc.enable()


def steps(net, x, count=3, autocast=False):
    """Outputs, gradients and buffers after steps whose gradients add up."""
    outputs = []
    for _ in range(count):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(net(x))
        outputs[-1].square().sum().backward()
    return [t.detach() for t in outputs] + [p.grad for p in net.parameters()] + [*net.buffers()]


def by_parts(function, *args, **options):
    """The result of a function while no network runs as one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingNetwork, "admits", lambda self, images: False)
        return function(*args, **options)


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_it_is_bitwise_the_parts(name, layout, autocast, calls):
    x, make = images().contiguous(memory_format=layout), CASES[name][0]
    torch.manual_seed(0)
    net = make()
    once, other = copy.deepcopy(net), copy.deepcopy(net)
    got = steps(once, x, autocast=autocast)
    assert len(calls) == (0 if name in BY_PARTS else 2)
    assert_same(got, by_parts(steps, other, x, autocast=autocast))
    assert [b._version for b in once.buffers()] == [b._version for b in other.buffers()]


def replace(net):
    conv = net.features.denseblock1.denselayer1.conv1
    conv.weight = nn.Parameter(2 * conv.weight)


def of_other_data(net):
    for tensor in [*net.parameters(), *(b for b in net.buffers() if b.dtype.is_floating_point)]:
        tensor.data = tensor.data * 1.5
    net.features.conv0.weight.data = net.features.conv0.weight.contiguous(memory_format=torch.channels_last)


def narrow(net):
    """By tensors in the same places, of other shapes."""
    layer = net.features.denseblock2.denselayer4
    layer.conv1.weight.data = layer.conv1.weight[:24].clone()
    layer.conv2.weight.data = layer.conv2.weight[:, :24].clone()
    for tensor in (*layer.norm2.parameters(), layer.norm2.running_mean, layer.norm2.running_var):
        tensor.data = tensor.data[:24].clone()


def with_gaps(net):
    for norm in (net.features.norm0, net.features.transition1.norm):
        norm.running_mean.data = norm.running_mean.data.repeat_interleave(2)[::2]
    conv = net.features.denseblock1.denselayer2.conv2
    conv.weight.data = conv.weight.data.repeat(1, 1, 1, 2)[..., :3]


CHANGES = {
    "of other data": (of_other_data, 2),
    "a parameter exchanged": (replace, 1),
    "narrower": (narrow, 2),
    "with gaps": (with_gaps, 0),
    "frozen": (lambda net: net.eval(), 1),
    "a momentum": (lambda net: setattr(net.features.norm0, "momentum", 0.7), 1),
    "fixed": (lambda net: net.features.norm5.bias.requires_grad_(False), 0),
    "a hook": (lambda net: net.features.transition1.register_forward_hook(lambda *_: None), 0),
    "memory efficient": (lambda net: setattr(net.features.denseblock2, "memory_efficient", True), 1),
    "dropout": (lambda net: setattr(net.features.denseblock1.denselayer1, "drop_rate", 0.5), 0),
    "the last in float64": (lambda net: net.features.norm5.double(), 0),
}


@pytest.mark.parametrize("change, made", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change, made, calls):
    net, x = small(), images()

    def run(net):
        steps(net, x)
        net.zero_grad(), calls.clear()
        change(net)
        torch.manual_seed(0)
        try:
            return steps(net, x, count=2)
        except RuntimeError as error:
            return [torch.tensor(bytearray(str(error).encode()))]

    got = run(copy.deepcopy(net))
    assert len(calls) == made
    assert_same(got, by_parts(run, net))


def no_grad(net, x):
    with torch.no_grad():
        net(x)


def profiled(net, x):
    with torch.profiler.profile() as profile:
        net(x)
    assert any("dense_block" in event.name for event in profile.events())


def saved_elsewhere(net, x):
    with torch.autograd.graph.save_on_cpu():
        net(x).sum().backward()


def of_other_tensors(net, x):
    other = {name: 2 * p.detach() for name, p in net.named_parameters()}
    for _ in range(2):
        out = torch.func.functional_call(net, other, x)
    assert not torch.equal(out, net(x.clone().requires_grad_()))


UNSUITED = {
    "functional_call": of_other_tensors,
    "without gradients": no_grad,
    "profiled": profiled,
    "images that require a gradient": lambda net, x: net(x.requires_grad_()),
    "saved tensors with hooks": saved_elsewhere,
    "other images": lambda net, x: net(x[:, :, 1:]),
    "bfloat16": lambda net, x: net.bfloat16()(x.bfloat16()),
}


@pytest.mark.parametrize("use", UNSUITED.values(), ids=UNSUITED)
def test_other_uses_run_by_parts(use, calls):
    net, x = small(), images()
    steps(net, x)
    calls.clear()
    use(net, x)
    assert not calls


def test_large_networks_run_by_parts(calls, monkeypatch):
    net, x = small(), images()
    rows, columns = (2 * 10 * 11, 2 * 5 * 5), (40 + 3 * 32, 52 + 4 * 32)
    size = 4 * sum(map(lambda a, b: a * b, rows, columns))
    for most, made in ((size - 1, 0), (size, 1)):
        monkeypatch.setattr(network, "MOST_BYTES", most)
        steps(copy.deepcopy(net), x, count=2)
        assert len(calls) == made


def test_a_variance_beyond_range_updates_nothing_twice(calls):
    net, x = small(), images()

    def run(net):
        steps(net, x)
        return steps(net, x * 1e25, count=1)

    got = run(copy.deepcopy(net))
    assert_same(got, by_parts(run, net))
    assert all(b == 4 for name, b in zip(dict(net.named_buffers()), got[-len([*net.buffers()]) :]) if "num" in name)


def second_derivatives(net, x):
    for _ in range(2):
        loss = net(x).square().sum()
    parameters = [*net.parameters()]
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    return [*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)]


def test_second_derivatives(calls):
    net, x = small().double().float(), images()
    got = second_derivatives(copy.deepcopy(net), x)
    assert len(calls) == 1
    for a, b in zip(got, by_parts(second_derivatives, net, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def rows_of_the_jacobian(net, x):
    for _ in range(2):
        out = net(x)[0]
    parameters = [net.features.conv0.weight, net.features.norm5.bias]
    return torch.autograd.grad(out, parameters, torch.eye(len(out)), is_grads_batched=True)


def test_a_batch_of_gradients(calls):
    got = rows_of_the_jacobian(small(), images())
    assert len(calls) == 1
    for a, b in zip(got, by_parts(rows_of_the_jacobian, small(), images()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_a_graph_that_is_retained_gives_the_same_again(calls):
    net, x = small(), images()
    for _ in range(2):
        loss = net(x).square().sum()
    parameters = [*net.parameters()]
    assert_same(torch.autograd.grad(loss, parameters, retain_graph=True), torch.autograd.grad(loss, parameters))
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    loss = net(x).square().sum()
    with torch.no_grad():
        net.features.denseblock1.denselayer1.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert len(calls) == 2


def test_wrong_arguments_raise(monkeypatch):
    net, x = small(), images()
    given = {}
    own = cpu.network
    monkeypatch.setattr(cpu, "network", lambda *args: (given.update(args=args), own(*args))[1])
    steps(net, x, count=2)
    x, parts, tracked = given["args"]
    buffers = [b.clone() for b in net.buffers()]

    def refused(message, images=x, parts=parts, tracked=tracked):
        with pytest.raises(RuntimeError, match=message):
            own(images, parts, tracked)

    refused("images: expected at least the kernel's size", images=x[:, :, :0])
    refused("eps: expected 17, got 16", parts=parts._replace(eps=parts.eps[1:]))
    refused("saved, prepend: expected one", parts=parts._replace(prepend=[False]))
    refused("places: expected", parts=parts._replace(places=parts.places[1:]))
    refused("tensors: expected float32", parts=parts._replace(tensors=[t.double() for t in parts.tensors]))
    refused(
        "tensors: expected a convolution's weight", parts=parts._replace(tensors=[parts.tensors[1], *parts.tensors[1:]])
    )
    refused("tracked: expected the number", tracked=tracked._replace(counts=tracked.counts[1:]))
    refused("vectors: expected two", tracked=tracked._replace(vectors=tracked.vectors[1:]))
    refused("vectors: expected at most", tracked=tracked._replace(starts=[*tracked.starts[:-1], 1000]))
    refused("counters: expected one int64", tracked=tracked._replace(counters=[*tracked.counters[1:], x]))
    with pytest.raises(RuntimeError, match="kept: expected what"):
        cpu.network_backward(x.new_zeros(2, 58), x, [], parts)
    assert_same([*net.buffers()], buffers)
