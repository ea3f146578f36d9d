"""Reasons name the settings that differ; settings that compute the same are accepted."""

import copy

import pytest
import torch
from torch import nn

import densenet_fast
from conversion import twins
from densenet_fast.nn import BNReLUConv1x1, DenseBlock, Transition, calls
from helpers import assert_same, error, randomise, step

POOLS = {
    "ceil mode": (nn.AvgPool2d(2, ceil_mode=True), "ceil_mode=True"),
    "divisor": (nn.AvgPool2d(2, divisor_override=3), "divisor_override=3"),
    "window": (nn.AvgPool2d((2, 3)), "kernel_size=(2, 3), stride=(2, 3)"),
    "padding": (nn.AvgPool2d(2, padding=1), "padding=1"),
    "another": (nn.LPPool2d(2, 2), "LPPool2d"),
}


@pytest.mark.parametrize("pool, settings", POOLS.values(), ids=POOLS)
def test_average_pools(pool, settings):
    module, stock = Transition(6, 4), twins.Transition(6, 4)
    module.pool = stock.pool = pool
    reason = f"pool is not a plain average over 2: {settings}"
    assert module.obstacle() == reason
    assert densenet_fast.explain(stock)[0].reason == f"left alone: {reason}"


@pytest.mark.parametrize(
    "pool, settings",
    [
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), "ceil_mode=True"),
        (nn.MaxPool2d(3, 2, 1, return_indices=True), "return_indices=True"),
        (nn.MaxPool2d(3, 2, dilation=2), "padding=0, dilation=2"),
        (nn.AvgPool2d(3, 2, 1), "AvgPool2d"),
    ],
)
def test_maximum_pools(pool, settings):
    model = densenet_fast.DenseNet(4, (1,), 8)
    model.features.pool0 = pool
    reason = f"pool0 is not a plain maximum over 3x3 windows of stride 2: {settings}"
    assert model.features.stem_obstacle() == reason


@pytest.mark.parametrize(
    "options, settings",
    [
        (dict(padding=1, groups=2), "groups=2"),
        (dict(padding=1, dilation=2), "dilation=(2, 2)"),
        (dict(), "padding=(0, 0)"),
        (dict(padding="valid"), "padding='valid'"),
        (dict(padding="same", padding_mode="circular"), "padding_mode='circular'"),
    ],
)
def test_convolutions(options, settings):
    block = DenseBlock(2, 6, 4, 4)
    block.denselayer1.conv2 = nn.Conv2d(16, 4, 3, **options)
    assert block.obstacle() == f"denselayer1.conv2 is not a plain convolution of kernel size 3: {settings}"


def with_named_paddings(module):
    """A copy whose convolutions have their padding written as a name."""
    module = copy.deepcopy(module)
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            padding = "same" if conv.kernel_size == (3, 3) else "valid"
            other = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=padding, bias=False)
            conv.__dict__.update({**vars(other), "_parameters": conv._parameters})
    return module


@pytest.mark.parametrize(
    "make", [lambda: DenseBlock(2, 6, 4, 4), lambda: BNReLUConv1x1(6, 4), lambda: Transition(6, 4)]
)
@pytest.mark.parametrize("training", [True, False])
def test_named_paddings_of_our_modules(make, training):
    stock = randomise(make().double()).train(training)
    module = with_named_paddings(stock)
    x = torch.randn(2, 6, 7, 6, dtype=torch.float64)
    with densenet_fast.set_fused(False):
        expected = list(step(stock, x))
    for (name, value), (_, reference) in zip(step(module, x), expected, strict=True):
        assert error(value, reference) < 1e-9 or value.equal(reference), name
    assert calls.last(module).reason is None and densenet_fast.explain(module)[0].fused


@pytest.mark.parametrize("make", [lambda: twins.XrayBlock(2, 6, 4, 0.0), lambda: twins.Transition(6, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_named_paddings_of_converted_modules(make, training):
    stock = with_named_paddings(randomise(make().double())).train(training)
    module = densenet_fast.convert(stock, inplace=False)
    assert_same(module, stock, torch.randn(2, 6, 7, 6, dtype=torch.float64), 1e-10)
    assert densenet_fast.explain(module)[0].fused
