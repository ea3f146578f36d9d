"""Parts that stand in Sequentials without modules of their own, and transitions, stems and heads of all kinds."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

import densenet_fast
from conversion import twins
from conversion import twins_sequential as seq
from densenet_fast.functional import shared
from densenet_fast.nn import calls
from helpers import assert_same, error, randomise

STAGES = ["features.init_block", "features.stage1", "features.stage2.trans2", "features.stage2.unit1...unit3"]
LAST = ["features.init_block", "features.stage1.unit1...unit2", "features.stage1.trans1", "features.stage2"]
FLAT = ["1...3", "4...5", "6...9", "10", "11...14"]
NETWORKS = {
    "transition first": (lambda: seq.StagedNet(), (2, 3, 26, 21), STAGES),
    "transition last": (
        lambda: seq.StagedNet(first=False),
        (2, 3, 26, 21),
        LAST,
    ),
    "dropout": (lambda: seq.StagedNet(rate=0.3), (2, 3, 26, 21), STAGES),
    "one Sequential, 1-D": (lambda: seq.flat(1), (2, 2, 37), FLAT),
    "one Sequential, 2-D": (lambda: seq.flat(2), (2, 2, 21, 18), FLAT),
    "one Sequential, 3-D": (lambda: seq.flat(3), (2, 2, 13, 10, 12), FLAT),
    "no bottleneck": (lambda: seq.flat(bottleneck=False), (2, 2, 21, 18), FLAT),
}
TRANSITIONS = {
    "no ReLU": lambda: seq.Linear(6, 4),
    "no ReLU, 1-D": lambda: seq.Linear(6, 4, 1),
    "no ReLU, 3-D, bias": lambda: seq.Linear(6, 4, 3, True),
    "functional dropout": lambda: seq.Dropping(6, 4),
    "functional dropout of channels": lambda: seq.Dropping(6, 4, drop=F.dropout2d),
    "no rate": lambda: seq.Dropping(6, 4, 0.0),
    "maximum": lambda: seq.Dropping(6, 4, pool=F.max_pool2d),
    "no pool": lambda: nn.Sequential(seq.Dropping(6, 4, pool=None), seq.Narrowing(4, 4)),
    "modules": lambda: seq.down(6, 4),
    "dropout and average": lambda: seq.down(6, 4, kind=nn.Dropout, pool=nn.AvgPool2d(2)),
    "units": lambda: seq.Narrowing(6, 4),
}
SHAPES = {1: (3, 6, 7), 2: (3, 6, 5, 8), 3: (2, 6, 4, 5, 3)}


def frozen(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_equals_itself_unconverted(name):
    make, shape, names = NETWORKS[name]
    stock = randomise(make().double())
    model = densenet_fast.convert(stock, inplace=False)
    assert [row.name for row in densenet_fast.explain(model)] == names
    assert all(row.fused for row in densenet_fast.explain(model)), densenet_fast.explain(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    for training in (True, False):
        assert_same(model.train(training), stock.train(training), x, 1e-9)
    assert {row.last_call for row in densenet_fast.explain(model)} == {"fused"}
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), densenet_fast.convert(model)
    for other in copies:
        assert [row.name for row in densenet_fast.explain(other) if row.fused] == names
        assert other(x).equal(model(x))
    classes = [type(m) for m in stock.modules()]
    assert [type(m) for m in densenet_fast.restore(model).modules()] == classes
    assert error(model(x), stock(x)) < 1e-9


@pytest.mark.parametrize("mode", [lambda m: m.train(), frozen, lambda m: m.eval()], ids=["training", "frozen", "eval"])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_transition_equals_itself_unconverted(name, mode):
    stock = randomise(TRANSITIONS[name]().double())
    model = densenet_fast.convert(stock, inplace=False)
    rows = densenet_fast.explain(model)
    kinds = ["BNReLUConv1x1", "Transition"] if name == "no pool" else ["Transition"]
    assert [row.kind for row in rows if row.fused] == kinds
    dims = 1 if "1-D" in name else 3 if "3-D" in name else 2
    x = torch.randn(SHAPES[dims], dtype=torch.float64)
    assert_same(mode(model), mode(stock), x, 1e-9)
    assert {row.last_call for row in densenet_fast.explain(model)} == {"fused"}
    if dims == 2:
        assert model(x).stride() == stock(x).stride()
        wide = x.to(memory_format=torch.channels_last)
        assert model(wide).stride() == stock(wide).stride()


def test_a_rate_may_change():
    stock = randomise(seq.Dropping(6, 4).double())
    model = densenet_fast.convert(stock, inplace=False)
    for net in (model, stock):
        net.droprate = 0.6
    assert_same(model, stock, torch.randn(SHAPES[2], dtype=torch.float64), 1e-9)
    assert calls.last(model).reason is None


def test_frozen_normalisations_of_another_class():
    stock = seq.flat()
    for name, module in list(stock.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            norm = FrozenBatchNorm2d(module.num_features)
            for buffer in norm.buffers():
                buffer.uniform_(0.5, 2)
            parent, _, child = name.rpartition(".")
            setattr(stock.get_submodule(parent), child, norm)
    model = densenet_fast.convert(stock.double(), inplace=False)
    assert [row.name for row in densenet_fast.explain(model) if row.fused] == FLAT
    assert_same(model, stock, torch.randn(2, 2, 21, 18, dtype=torch.float64), 1e-9)


def test_synchronised_normalisation_without_relu_is_left_to_stock():
    model = densenet_fast.convert(seq.Linear(6, 4))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert "down_sample.0 is synchronised, and no ReLU follows it" in densenet_fast.explain(model)[0].reason


def network():
    return randomise(seq.StagedNet().double())


def test_units_called_alone_are_the_librarys():
    stock, x = network().eval(), torch.randn(2, 8, 6, 5, dtype=torch.float64)
    model = densenet_fast.convert(stock, inplace=False)
    for path in ("stage1.unit1", "stage2.trans2.conv"):
        assert type(model.features.get_submodule(path)) is type(stock.features.get_submodule(path))
    assert model.features.stage1[0](x).equal(stock.features.stage1[0](x))
    part, whole = model.features.stage1[:1], model.features.stage1
    assert part(x).equal(stock.features.stage1[:1](x)) and len(whole) == 2
    assert error(whole(x), stock.features.stage1(x)) < 1e-12


def hook(module):
    return module.register_forward_hook(lambda m, i, o: None)


CHANGES = {
    "hook on a unit": (lambda f: hook(f.stage1.unit1), "features.stage1", "unit1 has a hook"),
    "hook inside": (lambda f: hook(f.stage1.unit2.conv1.bn), "features.stage1", "unit2.conv1.bn has a hook"),
    "hook on the stem": (lambda f: hook(f.init_block.bn), "features.init_block", "bn has a hook"),
    "activation": (
        lambda f: setattr(f.stage1.unit2.conv1, "activ", nn.SiLU()),
        "features.stage1",
        "unit2.conv1.activ is a SiLU",
    ),
    "order": (
        lambda f: f.stage2._modules.update(unit1=f.stage2._modules.pop("unit1")),
        "features.stage2.unit2...unit3",
        "not converted; densenet_fast.convert(model) converts it",
    ),
    "attribute": (lambda f: setattr(f.stage1.unit1, "drops", None), "features.stage1", "unit1.drops has changed"),
}


@pytest.mark.parametrize("change, where, reason", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_runs_as_it_is(change, where, reason):
    model, x = densenet_fast.convert(network()), torch.randn(2, 3, 26, 21, dtype=torch.float64)
    model(x)
    change(model.features)
    left = [row for row in densenet_fast.explain(model) if not row.fused]
    assert left[0].name.startswith(where) and reason in left[0].reason
    assert len(left) == 1 + (change is CHANGES["order"][0])  # the unit that comes last reads what nobody made
    stock = densenet_fast.restore(copy.deepcopy(model))
    if not reason.startswith("not converted"):
        assert_same(model, stock, x, 1e-9)
        left = next(row for row in densenet_fast.explain(model) if not row.fused)
        assert left.last_call == f"stock: {left.reason}"
    else:
        with pytest.raises(RuntimeError):
            model(x)


def test_a_unit_that_is_taken_out_of_a_run():
    model = densenet_fast.convert(seq.StagedNet())
    for name, left in (("unit2", ["unit1"]), ("unit1", [])):
        del model.features.stage2._modules[name]
        rows = [row for row in densenet_fast.explain(model) if "stage2.unit" in row.name]
        assert [row.name for row in rows] == [f"features.stage2.{name}" for name in [*left, "unit3"]]
        assert not any(row.fused for row in rows)


def test_more_units_and_other_ones_after_the_conversion():
    model, x = densenet_fast.convert(network()), torch.randn(2, 3, 26, 21, dtype=torch.float64)
    stage = model.features.stage2
    stage.unit4 = randomise(seq.Unit(20, 4).double())
    model.features.post_activ, model.output = seq.Activation(24).double(), nn.Linear(24, 3).double()
    stock = densenet_fast.restore(copy.deepcopy(model))
    assert_same(copy.deepcopy(model), copy.deepcopy(stock), x, 1e-9)
    assert "features.stage2.unit1...unit4" in [row.name for row in densenet_fast.explain(densenet_fast.convert(model))]
    assert_same(model, stock, x, 1e-9)


class Scaling(seq.Unit):
    def forward(self, x):
        return super().forward(x) * 1.5


class Gelu(seq.Unit):
    def __init__(self, *args):
        super().__init__(*args)
        self.conv1.activ = nn.GELU()


def stage(*kinds):
    return nn.Sequential(
        seq.Narrowing(16, 8), *[kind(8 + 4 * i, 4) for i, kind in enumerate(kinds)], nn.Conv2d(8, 3, 1)
    )


MIXED = {
    "another function": (
        (seq.Unit, seq.Unit, Scaling, seq.Unit),
        {"1...2": "", "3": "computes something else", "3.conv1": "", "4": ""},
    ),
    "another activation": ((Gelu, seq.Unit, seq.Unit), {"1": "1.conv1.activ is a GELU", "2...3": ""}),
    "none of them": ((Gelu, Gelu), {"1": "1.conv1.activ is a GELU", "2": "2.conv1.activ is a GELU"}),
    "one alone": ((seq.Unit,), {"1": ""}),
}


@pytest.mark.parametrize("kinds, expected", MIXED.values(), ids=MIXED)
def test_the_longest_runs_are_found_and_the_others_named(kinds, expected):
    stock = randomise(stage(*kinds).double())
    stock[-1] = nn.Conv2d(8 + 4 * len(kinds), 3, 1).double()
    model = densenet_fast.convert(stock, inplace=False)
    rows = {row.name: row for row in densenet_fast.explain(model)}
    assert list(rows) == ["0", *expected] and all(
        row.fused if not expected.get(name) else expected[name] in row.reason for name, row in rows.items()
    ), rows
    assert_same(model, stock, torch.randn(2, 16, 8, 7, dtype=torch.float64), 1e-9)


def test_layers_that_end_a_block_with_something_else():
    """A block to which its owner has added a convolution."""
    stock = twins.XrayBlock(2, 12, 8, 0.0)
    stock.add_module("tail", nn.Conv2d(28, 3, 1))
    stock = randomise(stock.double())
    model = densenet_fast.convert(stock, inplace=False)
    assert [row.name for row in densenet_fast.explain(model) if row.fused] == ["denselayer1...denselayer2"]
    assert_same(model, stock, torch.randn(2, 12, 6, 7, dtype=torch.float64), 1e-9)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_results_have_the_memory_format_that_stock_ones_have(memory_format, weights):
    stock = randomise(seq.flat().double()).to(memory_format=weights)
    model = densenet_fast.convert(stock, inplace=False)
    x = torch.randn(2, 2, 21, 18, dtype=torch.float64).to(memory_format=memory_format)
    outputs = []
    for net in (model, stock):
        for end in (4, 6, 10, 11):
            part = copy.deepcopy(net)
            del part[end:]
            outputs.append(part(x))
    for got, expected in zip(outputs[:4], outputs[4:]):
        assert got.stride() == expected.stride() and error(got, expected) < 1e-12


def test_a_hook_on_the_convolution_before_a_stem():
    stock, seen = randomise(twins.XrayNet().double()), []
    model = densenet_fast.convert(stock, inplace=False)
    for net in (model, stock):
        net.features.conv0.register_forward_hook(lambda m, i, o: seen.append(o.detach()))
    x = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    assert_same(model, stock, x, 1e-9)
    assert seen[0].stride() == seen[1].stride() and error(*seen) < 1e-12
    assert {row.last_call for row in densenet_fast.explain(model)} == {"fused"}


class OwnStem(seq.InitBlock):
    def forward(self, x):
        return self.pool(self.bn(self.activ(self.conv(x))))


class Late(nn.Sequential):
    """Drops out behind the pool."""

    def forward(self, x):
        return self.drop(self.maxpool(self.conv(self.relu(self.norm(x)))))


LEFT_ALONE = {
    "stem in another order": (
        lambda: nn.Sequential(OwnStem(3, 8), seq.Narrowing(8, 4)),
        0,
        "computes something else in training: let it be a conv",
    ),
    "stem's pool": (
        lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2), seq.Narrowing(8, 4)),
        0,
        "2 is not a plain maximum over 3x3 windows of stride 2: padding=0",
    ),
    "stem's activation": (
        lambda: nn.Sequential(nn.InstanceNorm2d(8), nn.SiLU(), nn.MaxPool2d(3, 2, 1), seq.Narrowing(8, 4)),
        0,
        "0 is a InstanceNorm2d, not a part of convolution-BN-ReLU-maximum",
    ),
    "transition's pool": (
        lambda: nn.Sequential(seq.Narrowing(8, 4), twins.Transition(4, 4)),
        1,
        "pool is not a plain average over 2: kernel_size=3",
    ),
    "dropout elsewhere": (
        lambda: nn.Sequential(seq.Narrowing(8, 4), Late(OrderedDict(seq.down(4, 4, kind=nn.Dropout)._modules))),
        1,
        "drops out in another place or in another way in training: let it stand between the convolution and the pool",
    ),
}


@pytest.mark.parametrize("make, place, reason", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_what_is_left_alone_says_why(make, place, reason):
    model = make()
    if reason.startswith("pool"):
        model[1].pool = nn.AvgPool2d(3)
    report = densenet_fast.explain(densenet_fast.convert(model))
    assert [i for i, row in enumerate(report) if not row.fused] == [place] and reason in report[place].reason


@pytest.mark.parametrize("make", [lambda: seq.InitBlock(3, 4), lambda: seq.flat()[:4], lambda: seq.PreConv(6, 4, 1)])
def test_a_stem_or_one_convolution_is_no_densenet(make):
    with pytest.raises(ValueError, match="expected dense blocks"):
        densenet_fast.convert(make())


@pytest.mark.parametrize("dims", [2, 3])
def test_under_autocast_it_does_what_explain_says(dims):
    stock = randomise(seq.flat(dims)).eval()
    model, x = densenet_fast.convert(stock, inplace=False), torch.randn(2, 2, *[24] * dims)
    with torch.autocast("cpu", torch.bfloat16):
        report = densenet_fast.explain(model)
        got, expected = model(x), stock(x)
        called = densenet_fast.explain(model)
    assert got.dtype == expected.dtype and error(got, expected) < 0.05
    assert [row.fused for row in report] == [row.last_call == "fused" for row in called] == [True] * 5


def test_statistics_are_handed_on(monkeypatch):
    """From the stem to the layers, from there to the transition, to the next layers and to the head. Where gradients
    follow, layers and what reads them are one call, which hands on between the two by itself."""
    given, known = [], shared.known
    model = densenet_fast.convert(seq.flat())
    monkeypatch.setattr(shared, "known", lambda *args: given.append(args[2] is not None) or known(*args))
    with torch.no_grad():
        model(torch.randn(2, 2, 32, 32))
    assert given == [True] * 4
    model(torch.randn(2, 2, 32, 32))
    assert given == [True] * 6
