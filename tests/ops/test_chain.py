"""What the CPU backend runs in one call, against the ops' bodies in Python: a dense block with its reader, the stem."""

import importlib

import pytest
import torch

import densenet_fast
from densenet_fast.backends import cpu
from densenet_fast.ops.chain import Whole
from helpers import pack, randomise

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled kernels")


def network(**options):
    return randomise(densenet_fast.DenseNet(8, (3, 4), 16, num_classes=5, **options))


def changed(change, **options):
    net = network(**options)
    change(net.features)
    return net


def prepend(features):
    features.denseblock1.prepend = True


def freeze(*names):
    return lambda features: [features.get_submodule(name).eval() for name in names]


def no_affine(features):
    for norm in (features.norm0, features.transition1.norm, features.norm5):
        norm.weight = norm.bias = None


def fix(*names):
    return lambda features: [features.get_parameter(name).requires_grad_(False) for name in names]


def unlike_epsilons(features):
    features.norm0.eps, features.transition1.norm.eps, features.norm5.eps = 0.2, 0.3, 0.1


CASES = {
    "plain": (network, 2),
    "recomputed": (lambda: network(memory_efficient=True), 2),
    "channels last weights": (lambda: network().to(memory_format=torch.channels_last), 2),
    "new features first": (lambda: changed(prepend), 2),
    "a frozen stem": (lambda: changed(freeze("norm0")), 2),
    "a stem's fixed parameter": (lambda: changed(fix("norm0.weight")), 2),
    "frozen readers": (lambda: changed(freeze("transition1.norm", "norm5")), 2),
    "a frozen block": (lambda: changed(freeze("denseblock1")), 2),
    "readers without weights": (lambda: changed(no_affine), 2),
    "unlike epsilons": (lambda: changed(unlike_epsilons), 2),
    "a reader's fixed parameter": (lambda: changed(fix("norm5.bias")), 1),
    "a block's fixed parameter": (lambda: changed(fix("denseblock1.denselayer2.conv1.weight")), 1),
    "biases": (lambda: network(bias=True), 0),
}


def step(net, x, autocast):
    """Output, gradients and buffers after two steps, whose gradients add up."""
    net, x = net, x.clone().requires_grad_()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = net(x)
        output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


@pytest.fixture
def counted(monkeypatch):
    """How often the backend ran a block and its reader in one backward pass."""
    calls, own = [], cpu.dense_block_and_reader_backward
    monkeypatch.setattr(cpu, "dense_block_and_reader_backward", lambda *a: (calls.append(0), own(*a))[1])
    return calls


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("make, calls", CASES.values(), ids=CASES)
def test_one_call_makes_what_two_make(make, calls, mode, counted, monkeypatch):
    dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
    x = torch.randn(2, 3, 38, 44).to(dtype).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    once = step(make().to(dtype), x, mode == "autocast")
    assert len(counted) == (0 if mode == "bfloat16" else 2 * calls)
    monkeypatch.setattr(Whole, "of", lambda x, given: None)
    monkeypatch.setattr(importlib.import_module("densenet_fast.ops.bn_relu_maxpool"), "_run_whole", lambda given: None)
    torch.manual_seed(0)
    twice = step(make().to(dtype), x, mode == "autocast")
    for a, b in zip(once, twice, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride())


def test_wrong_arguments_raise():
    net = densenet_fast.DenseNet(8, (1,), 16)
    block, norm = net.features.denseblock1, net.features.norm5
    stages = [unit.stage() for layer in block.operands().layers for unit in layer]
    x = torch.zeros(12, 16)
    tensors, read = pack(stages, x)[0], [norm.weight, norm.bias, *[x.new_empty(0)] * 4]

    def refused(message, saved=(True,), read=read, places=range(12), grid=(3, 2, 2)):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.densenet_fast.cpu_dense_block_and_reader(
                *(x, None, None, tensors, [*places], [1e-5, 1e-5], [*grid], [*saved], False, read, 1e-5, False)
            )

    refused("eps: expected one for each of two stages a layer", saved=(True, True))
    refused("places: expected 12, got 11", places=range(11))
    refused("read_tensors: expected six, got 5", read=read[:5])
    refused("weight: expected 24 contiguous", read=[norm.weight[1:], *read[1:]])
    refused("grid: expected the product 12", grid=(3, 2, 3))
    none = [x.new_empty(0)] * 6
    for message, mean, given in (("tensors: expected six, got 5", None, none[1:]), ("x_mean: expected with", x, none)):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.densenet_fast.cpu_bn_relu_maxpool_stage(x, mean, None, given, 1e-5, [3, 2, 2], False)
