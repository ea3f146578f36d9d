"""Functions that a tool replaces on a class or module take effect, and explain says so."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from integration.support import assert_close, images, pair
from torch import nn

import densenet_fast
from densenet_fast.models import DenseNet
from densenet_fast.nn import BNReLUConv1x1, DenseBlock, DenseLayer, Transition, fusion
from densenet_fast.nn.features import Features

LAYERS = [
    (nn.BatchNorm2d, "forward"),
    (nn.modules.batchnorm._BatchNorm, "forward"),
    (nn.ReLU, "forward"),
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.MaxPool2d, "forward"),
    (nn.AvgPool2d, "forward"),
    (nn.Sequential, "forward"),
    (nn.Module, "__call__"),
    (F, "relu"),
    (F, "batch_norm"),
    (F, "conv2d"),
    (F, "max_pool2d"),
    (F, "avg_pool2d"),
    (F, "adaptive_avg_pool2d"),
    (torch, "cat"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("owner, name", LAYERS, ids=lambda value: getattr(value, "__name__", value))
def test_of_stock_layers(owner, name, training, monkeypatch):
    """It is called as often as by torchvision's network, and its results count."""
    models, x, original = pair(training=training), images(), getattr(owner, name)
    results, calls = [], []

    def changed(*args, **kwargs):
        calls[-1] += 1
        return original(*args, **kwargs) * 1.1

    assert all(row.fused for row in densenet_fast.explain(models[0]))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, changed)
        for model in models:
            calls.append(0)
            results.append(model(x))
        report = densenet_fast.explain(models[0])
        assert not any(row.fused for row in report) and f"{name} was replaced" in report[0].reason
    assert calls[0] == calls[1] > 0
    assert_close(*results)
    assert all(row.fused for row in densenet_fast.explain(models[0]))


@pytest.mark.parametrize("kind, name", [(DenseLayer, "forward"), (DenseLayer, "bn_function"), (DenseBlock, "forward")])
def test_of_our_dense_parts(kind, name, monkeypatch):
    theirs = getattr(torchvision.models.densenet, f"_{kind.__name__}")
    results, x = [], images()
    for owner, model in zip((kind, theirs), pair()):
        original = getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda self, y, original=original: original(self, y) * 1.1)
            results.append(model(x))
    assert_close(*results)


@pytest.mark.parametrize("kind", [Transition, BNReLUConv1x1, Features, DenseNet])
def test_of_our_other_parts(kind, monkeypatch):
    model = nn.Sequential(BNReLUConv1x1(3, 3)).double() if kind is BNReLUConv1x1 else pair()[0]
    original, calls = kind.forward, []
    monkeypatch.setattr(kind, "forward", lambda self, x: (calls.append(self), original(self, x))[1])
    model(images())
    assert len(calls) == 1 and not any(row.fused for row in densenet_fast.explain(model))


def test_it_costs_microseconds():
    """A call asks for all of them a dozen times."""
    assert 20 < len(fusion._originals) < 80
