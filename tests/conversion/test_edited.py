"""A converted model that is edited: what it does until it is converted again, and then."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn

import densenet_fast
from helpers import assert_same, randomise


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def small():
    return randomise(torchvision.models.DenseNet(4, (2, 3), 6, num_classes=5)).double()


def without_the_last_layer(model):
    del model.features.denseblock2.denselayer3
    model.features.norm5 = nn.BatchNorm2d(15)
    model.classifier = nn.Linear(15, 5)


def another_layer(model):
    layer = torchvision.models.densenet._DenseLayer(19, 4, 4, 0.0)
    model.features.denseblock2.add_module("denselayer4", layer)
    model.features.norm5 = nn.BatchNorm2d(23)
    model.classifier = nn.Linear(23, 5)


def a_wider_layer(model):
    block = model.features.denseblock2
    block.denselayer2 = torchvision.models.densenet._DenseLayer(11, 7, 2, 0.0)
    block.denselayer3 = torchvision.models.densenet._DenseLayer(18, 4, 4, 0.0)
    model.features.norm5 = nn.BatchNorm2d(22)
    model.classifier = nn.Linear(22, 5)


def a_narrower_transition(model):
    model.features.transition1 = torchvision.models.densenet._Transition(14, 7)


def an_attribute(model):
    model.features.denseblock1.denselayer1.note = "changed"


def a_norm_and_back(model):
    layer = model.features.denseblock1.denselayer1
    norm, layer.norm1 = layer.norm1, nn.GroupNorm(2, 6)
    densenet_fast.convert(model)
    assert not densenet_fast.explain(model)[1].fused
    layer.norm1 = norm


def instance_norms(model):
    for layer in model.features.denseblock1.values():
        layer.norm2 = nn.InstanceNorm2d(16)


def another_pool(model):
    model.features.transition1.pool = nn.MaxPool2d(2)


def a_pool_of_threes(model):
    model.features.transition1.pool = nn.AvgPool2d(3)


def another_stem(model):
    model.features.relu0 = nn.SiLU()


def a_longer_stem(model):
    model.features = nn.Sequential(*model.features)
    model.features.insert(3, nn.Identity())


EDITS = [without_the_last_layer, another_layer, a_wider_layer, a_narrower_transition, an_attribute, a_norm_and_back]
EDITS += [another_pool, a_longer_stem]
LEFT_ALONE = {another_stem: 0, instance_norms: 1, a_pool_of_threes: 2}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("edit", [*EDITS, *LEFT_ALONE])
def test_converted_again_it_makes_the_most_of_what_is_there(edit, training):
    model = densenet_fast.convert(small())
    torch.manual_seed(0)
    edit(model)
    model.double().train(training)
    stock = densenet_fast.restore(copy.deepcopy(model))
    x = torch.randn(2, 3, 40, 36, dtype=torch.float64)
    assert_same(copy.deepcopy(model), copy.deepcopy(stock), x, 1e-9)
    assert densenet_fast.convert(model) is model
    report = densenet_fast.explain(model)
    assert [i for i, row in enumerate(report) if not row.fused] == ([LEFT_ALONE[edit]] if edit in LEFT_ALONE else [])
    assert_same(model, stock, x, 1e-9)


def test_a_hook_is_no_edit():
    model = densenet_fast.convert(small())
    kinds = [type(m) for m in model.modules()]
    handle = model.features.denseblock1.denselayer1.norm1.register_forward_hook(lambda m, i, o: None)
    densenet_fast.convert(model)
    handle.remove()
    assert [type(m) for m in model.modules()] == kinds and all(row.fused for row in densenet_fast.explain(model))


@pytest.mark.parametrize("dims", [1, 3])
def test_a_dropout_replaced_on_torchs_class_counts(dims, monkeypatch):
    monai = pytest.importorskip("monai.networks.nets")
    model = monai.DenseNet(dims, 1, 2, init_features=6, growth_rate=4, block_config=(2, 2), bn_size=2, dropout_prob=0.3)
    densenet_fast.convert(model)
    assert all(row.fused for row in densenet_fast.explain(model))
    kind = next(type(m) for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    monkeypatch.setattr(kind, "forward", lambda self, y: y * 0.5)
    assert not any(row.fused for row in densenet_fast.explain(model))


@pytest.mark.parametrize("kind", ["_DenseLayer", "_DenseBlock", "_Transition", "_DenseLayer.bn_function"])
def test_a_function_replaced_on_a_librarys_class_counts(kind, monkeypatch):
    kind, _, name = kind.partition(".")
    name = name or "forward"
    owner = getattr(torchvision.models.densenet, kind)
    original, model = getattr(owner, name), densenet_fast.convert(small())
    other, x = pickle.loads(pickle.dumps(model)), torch.randn(2, 3, 40, 36, dtype=torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda self, y: original(self, y) * 1.5)
        stock = densenet_fast.restore(copy.deepcopy(model))
        for converted in (model, other):
            row = densenet_fast.explain(converted)[2 if kind == "_Transition" else 1]
            assert not row.fused and f"{kind}.{name} was replaced since the conversion" in row.reason
            assert_same(copy.deepcopy(converted), copy.deepcopy(stock), x, 1e-9)
        densenet_fast.convert(other)
        assert_same(other, stock, x, 1e-9)
    assert all(row.fused for row in densenet_fast.explain(model))
