"""Blocks and transitions of all kinds, edited and converted again; classes and attributes that change after the
conversion."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import densenet

import densenet_fast
from conversion import twins, twins_blocks
from densenet_fast.nn import calls
from helpers import assert_same, randomise

X = (2, 12, 6, 6)


def xray(layers=3):
    return twins.XrayBlock(layers, 12, 8, 0.0)


def delete_last(block):
    del block._modules[next(reversed(block._modules))]


def insert(block):
    layers = [twins.XrayLayer(12, 4, 0.0), *(twins.XrayLayer(16 + 8 * i, 8, 0.0) for i in range(3))]
    block._modules.clear()
    block._modules.update({f"denselayer{i}": layer for i, layer in enumerate(layers)})


def torchvision_block():
    return densenet._DenseBlock(3, 12, 4, 8, 0.0)


def name_anew(transition):
    transition._modules["last"] = transition._modules.pop("pool")


def front(kind=twins_blocks.Front):
    return lambda: twins_blocks.sequential(kind)


def to_dropout(block):
    for layer in block.children():
        layer.net[-1] = nn.Dropout2d(0.4)


EDITS = {
    "front's last layer deleted": (front(), delete_last),
    "front's new dropout": (front(twins_blocks.FrontOfOneNet), lambda b: [m.net.append(nn.Dropout(0.3)) for m in b]),
    "another dropout": (lambda: twins_blocks.sequential(twins_blocks.FrontOfOneNet, dropout=0.2), to_dropout),
    "other path": (lambda: twins_blocks.PathBlock(2, 12, 8), lambda b: setattr(b, "upsample", False)),
    "layer inserted": (xray, insert),
    "torchvision's last layer deleted": (torchvision_block, delete_last),
    "own list": (lambda: twins.OwnBlock(3, 12, 8), lambda b: b.units.pop(-1)),
    "attribute": (lambda: twins.OwnBlock(2, 12, 8), lambda b: setattr(b.units[0], "growth", 9)),
    "transition's pool": (lambda: twins.Transition(12, 6), name_anew),
    "transition of Identity": (lambda: twins.Transition(12, 6), lambda m: m.add_module("end", nn.Identity())),
}


@pytest.mark.parametrize("make, edit", EDITS.values(), ids=EDITS)
def test_converted_again_after_an_edit_it_runs_fused(make, edit):
    torch.manual_seed(0)
    model = densenet_fast.convert(nn.Sequential(randomise(make()), nn.Tanh()))
    x = torch.randn(X)
    model(x)
    stock = densenet_fast.restore(copy.deepcopy(model)).double()
    for net in (model, stock):
        torch.manual_seed(1)
        edit(net[0])
    assert densenet_fast.convert(model.double()) is model
    assert all(row.fused for row in densenet_fast.explain(model))
    assert_same(model, stock.double(), x.double(), 1e-9)
    assert calls.last(model[0]).reason is None


NORMS = {
    "block": (xray, "denselayer2.norm1", 20, "denselayer2.norm1 is a GroupNorm"),
    "transition": (
        lambda: twins.Transition(12, 6),
        "norm",
        12,
        "as many batch normalisations as convolutions, got none",
    ),
}


@pytest.mark.parametrize("make, path, channels, reason", NORMS.values(), ids=NORMS)
def test_what_is_no_longer_a_part_goes_back_to_its_class_and_is_found_again(make, path, channels, reason):
    stock = nn.Sequential(randomise(make().double()), randomise(twins.XrayBlock(2, 36, 8, 0.0)).double())
    if path == "norm":
        stock[1] = randomise(twins.XrayBlock(2, 6, 8, 0.0).double())
    model = densenet_fast.convert(stock, inplace=False)
    own = type(stock[0])
    parent, _, name = path.rpartition(".")
    norms = [net[0].get_submodule(path) for net in (model, stock)]
    for net in (model, stock):
        setattr(net[0].get_submodule(parent), name, nn.GroupNorm(2, channels).double())
    densenet_fast.convert(model)
    rows = densenet_fast.explain(model)
    assert type(model[0]) is own and "_densenet_fast" not in vars(model[0])
    assert [row.fused for row in rows] == [False, True] and reason in rows[0].reason
    assert_same(model, stock, torch.randn(X, dtype=torch.float64), 1e-9)
    for net, norm in zip((model, stock), norms):
        setattr(net[0].get_submodule(parent), name, norm)
    assert all(row.fused for row in densenet_fast.explain(densenet_fast.convert(model)))
    assert_same(model, stock, torch.randn(X, dtype=torch.float64), 1e-9)


def test_where_nothing_is_left_every_class_is_what_it_was():
    model = densenet_fast.convert(nn.Sequential(xray()))
    model[0].denselayer1.relu1 = nn.GELU()
    with pytest.raises(ValueError, match="0 was left alone: denselayer1.relu1 is a GELU"):
        densenet_fast.convert(model)
    assert type(model) is nn.Sequential and type(model[0]) is twins.XrayBlock


class Scaled(twins.OwnLayer):
    """Scales its features by an attribute of its class."""

    factor = 1.0

    def forward(self, x):
        return super().forward(x) * self.factor


def scaled():
    block = twins.OwnBlock(2, 12, 8)
    block.units = nn.ModuleList([Scaled(12, 8), Scaled(20, 8)])
    return block


def doubled(original):
    return lambda self, *args: original(self, *args) * 2


PATCHES = {
    "block without one": (xray, twins.XrayBlock, "forward", "XrayBlock.forward"),
    "base class": (scaled, twins.OwnLayer, "forward", "OwnLayer.forward"),
}


@pytest.mark.parametrize("make, kind, name, reason", PATCHES.values(), ids=PATCHES)
def test_a_class_patched_after_the_conversion(make, kind, name, reason, monkeypatch):
    stock = randomise(make().double()).eval()
    model = densenet_fast.convert(nn.Sequential(stock), inplace=False)
    x = torch.randn(X, dtype=torch.float64)
    assert densenet_fast.explain(model)[0].fused
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, doubled(getattr(kind, name)))
        for net in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert densenet_fast.explain(net)[0].reason == f"{reason} was replaced since the conversion"
            assert_same(net, stock, x, 1e-12)
        again = copy.deepcopy(model)
        with pytest.raises(ValueError, match="was left alone: its forward"):
            densenet_fast.convert(again)
        assert_same(again, stock, x, 1e-12)
    assert densenet_fast.explain(model)[0].fused
    assert_same(model, stock, x, 1e-9)


def test_an_attribute_set_or_patched_after_the_conversion(monkeypatch):
    stock = randomise(scaled().double()).eval()
    model, x = densenet_fast.convert(stock, inplace=False), torch.randn(X, dtype=torch.float64)
    for net in (model, stock):
        net.units[1].factor = 2.0
    assert "units.1.factor has changed" in densenet_fast.explain(model)[0].reason
    assert_same(model, stock, x, 1e-12)
    for net in (model, stock):
        del net.units[1].factor
    monkeypatch.setattr(Scaled, "factor", 3.0)
    assert "Scaled.factor was replaced since" in densenet_fast.explain(model)[0].reason
    assert_same(model, stock, x, 1e-12)


def test_a_class_patched_before_the_conversion_is_what_it_computes(monkeypatch):
    original = twins.OwnLayer.forward
    monkeypatch.setattr(twins.OwnLayer, "forward", lambda self, x: original(self, x))
    block = densenet_fast.convert(twins.OwnBlock(2, 12, 8))
    assert densenet_fast.explain(block)[0].fused
    monkeypatch.setattr(twins.OwnLayer, "forward", original)
    assert "OwnLayer.forward was replaced" in densenet_fast.explain(block)[0].reason
    assert densenet_fast.explain(densenet_fast.convert(block))[0].fused


def test_a_pickle_that_meets_a_patched_class(monkeypatch):
    """It was converted where the class was as the library has it."""
    stock = randomise(xray().double())
    pickled = pickle.dumps(densenet_fast.convert(stock, inplace=False))
    assert densenet_fast.explain(pickle.loads(pickled))[0].fused
    monkeypatch.setattr(twins.XrayLayer, "forward", lambda self, x: F.pad(x, (0, 0, 0, 0, 0, 8)))
    model = pickle.loads(pickled)
    assert "XrayLayer.forward was replaced" in densenet_fast.explain(model)[0].reason
    assert model(torch.randn(X, dtype=torch.float64)).eq(0).any()
