"""What is not a dense block of BN-ReLU-convolutions, or computes something else, is left alone, with the reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import densenet_fast
from conversion import twins
from conversion import twins_blocks as near
from helpers import randomise

FOREIGN = {
    "now here, now there": (lambda: near.NowHereNowThere(2, 12, 8), "its forward orders the features otherwise"),
    "residual": (lambda: twins.ResidualBlock(2, 12, 8, 0.0), "its forward computes something else"),
    "scaled": (lambda: twins.OwnBlock(2, 12, 8, scale=0.2), "its forward computes something else"),
    "two inputs": (lambda: twins.TwoInputBlock(2, 12, 8, 0.0), "its forward failed on one tensor: TypeError"),
    "gate": (lambda: twins.GatedBlock(2, 12, 8), "0 has tensors of its own: gate"),
    "InPlaceABN": (lambda: twins.activated_block(2, 12, 8), "0.norm1 is a InPlaceABN, not a part of BN-ReLU"),
    "HoVer-Net": (
        lambda: twins.CroppingBlock(2, 12, 8),
        "units was left alone: 0.conv2 is not a plain convolution of kernel size 3",
    ),
    "HoVer-Net, not grouped": (lambda: twins.CroppingBlock(2, 12, 8, 1), "0.conv2 is not a plain convolution"),
    "layers without a block": (lambda: nn.ModuleDict(dict(units=twins.OwnBlock(2, 12, 8).units)), "has no forward"),
    "CondenseNet": (lambda: twins.condensed_block(2, 12, 8), "0.conv_1 has tensors of its own: _mask"),
    "RRDB": (lambda: twins.ResidualInResidual(), "conv1 is a Conv2d, not BN-ReLU-convolutions"),
    "RDN": (lambda: twins.ResidualDense(), "as many batch normalisations as convolutions, got none and 0.conv.0"),
}


def convolution(**options):
    def change(block):
        block.denselayer2.conv2 = nn.Conv2d(32, 8, 3, **options)

    return change


def insert(path, name, module):
    return lambda block: block.get_submodule(path).add_module(name, module)


def replace(path, module):
    parent, _, name = path.rpartition(".")
    return lambda block: setattr(block.get_submodule(parent), name, module)


CHANGES = {
    "groups": (convolution(padding=1, groups=4), "denselayer2.conv2 is not a plain convolution of kernel size 3"),
    "stride": (convolution(padding=1, stride=2), "denselayer2.conv2 is not a plain convolution"),
    "dilation": (convolution(padding=2, dilation=2), "denselayer2.conv2 is not a plain convolution"),
    "padding mode": (convolution(padding=1, padding_mode="reflect"), "denselayer2.conv2 is not a plain convolution"),
    "norm": (replace("denselayer1.norm1", nn.InstanceNorm2d(12)), "denselayer1.norm1 is a InstanceNorm2d"),
    "activation": (replace("denselayer1.relu2", nn.SiLU()), "denselayer1.relu2 is a SiLU"),
    "clipped": (replace("denselayer1.relu2", nn.ReLU6()), "denselayer1.relu2 is a ReLU6"),
    "another part": (insert("denselayer1", "se", nn.Sigmoid()), "denselayer1.se is a Sigmoid, not a part of"),
    "a second ReLU": (insert("denselayer1", "last", nn.ReLU()), "its forward computes something else"),
    "buffer": (lambda b: b.register_buffer("scale", torch.ones(())), "it has tensors of its own: scale"),
    "dropout before": (insert("denselayer1", "a", nn.AlphaDropout(0.1)), "denselayer1.a is a AlphaDropout"),
    "forward of its own": (lambda b: setattr(b, "forward", b.forward), "it has a forward of its own"),
}


@pytest.mark.parametrize("make, reason", FOREIGN.values(), ids=FOREIGN)
def test_another_network(make, reason):
    model = nn.Sequential(make())
    classes = [type(m) for m in model.modules()]
    with pytest.raises(
        ValueError, match=r"model: expected dense blocks .*found none in a Sequential; .*left alone"
    ) as e:
        densenet_fast.convert(model)
    assert reason in str(e.value), e.value
    (row,) = densenet_fast.explain(model)
    assert (
        not row.fused and reason.removeprefix("units was left alone: ") in row.reason and row.backend == "stock torch"
    )
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("change, reason", CHANGES.values(), ids=CHANGES)
def test_a_changed_block(change, reason):
    block = twins.XrayBlock(2, 12, 8, 0.0)
    change(block)
    (row,) = densenet_fast.explain(block)
    assert not row.fused and f"left alone: {reason}" in row.reason, row.reason
    with pytest.raises(ValueError, match="the model itself was left alone"):
        densenet_fast.convert(block)


def test_the_rest_of_a_model_is_converted():
    model = nn.ModuleDict(dict(ours=twins.XrayNet(), other=near.NowHereNowThere(2, 12, 8)))
    rows = {row.name: row for row in densenet_fast.explain(densenet_fast.convert(model))}
    assert rows["ours.features.denseblock1"].fused and not rows["other"].fused and len(rows) == 7


STEM = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1)


@pytest.mark.parametrize("model", [nn.Linear(2, 3), nn.Sequential(*STEM)])
def test_nothing_to_convert(model):
    """A stem alone makes no DenseNet."""
    with pytest.raises(
        ValueError, match="model: expected dense blocks .*and transitions .*, found none in a (Linear|Seq)"
    ):
        densenet_fast.convert(model)
    assert not densenet_fast.explain(model) and densenet_fast.restore(model) is model


def test_our_own_models_need_no_conversion():
    with pytest.raises(ValueError, match="its blocks are densenet_fast's own already"):
        densenet_fast.convert(densenet_fast.DenseNet(4, (2, 2), 8))


@pytest.mark.parametrize("function", [densenet_fast.convert, densenet_fast.restore, densenet_fast.explain])
def test_not_a_module(function):
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got str"):
        function("densenet121")


def test_looking_leaves_no_trace():
    """Neither in the random state, nor in the model, nor through its hooks."""
    model, calls = randomise(twins.XrayNet(drop_rate=0.2)), []
    model.features.denseblock1.denselayer1.register_forward_hook(lambda *_: calls.append(1))
    state, random, threads = copy.deepcopy(model.state_dict()), torch.get_rng_state(), torch.get_num_threads()
    densenet_fast.explain(densenet_fast.convert(model))
    assert torch.get_rng_state().equal(random) and torch.get_num_threads() == threads and not calls
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())


class Whole(twins.OwnBlock):
    """Drops out its result, at a rate that is zero by default."""

    def __init__(self, *args):
        super().__init__(*args)
        self.droprate = 0.0

    def forward(self, x):
        return F.dropout(super().forward(x), self.droprate, self.training)


def test_a_drop_rate_used_in_a_way_of_its_own_must_not_change():
    block = densenet_fast.convert(Whole(2, 12, 8))
    assert densenet_fast.explain(block)[0].fused
    block.droprate = 0.5
    assert "droprate has changed since the conversion" in densenet_fast.explain(block)[0].reason
    x, outputs = torch.randn(2, 12, 5, 5), []
    for run in (block, densenet_fast.restore(copy.deepcopy(block))):
        torch.manual_seed(1)
        outputs.append(run(x))
    assert outputs[0].equal(outputs[1])


class Made(twins.OwnBlock):
    """Hands ``made`` the input and the features of each layer."""

    def __init__(self, made):
        super().__init__(2, 12, 8)
        self.made = made

    def forward(self, x):
        features = [x]
        for unit in self.units:
            features.append(unit(torch.cat(features, 1)))
        return self.made(*features)


class CountsTwice(twins.OwnBlock):
    def forward(self, x):
        for unit in self.units:
            unit.bn1(x)
            x = torch.cat([x, unit(x)], 1)
        return x


class Pooled(twins.Transition):
    def forward(self, x):
        return super().forward(x), x


DROPS = "drops out in another place or in another way in training: let it stand behind convolutions"
ORDERS = "orders the features otherwise in training: let every layer make torch.cat([x, new], 1), or every one"

DIFFERENCES = {
    "list": (lambda: Made(lambda *f: list(f)), "returns a list, not a feature map in training"),
    "order": (lambda: Made(lambda x, a, b: torch.cat([x, b, a], 1)), ORDERS),
    "input last": (lambda: Made(lambda x, a, b: torch.cat([a, b, x], 1)), ORDERS),
    "last features": (
        lambda: Made(lambda x, a, b: b),
        "returns [2, 8, 5, 4] of torch.float64 where [2, 28, 5, 4] of torch.float64 was expected in training",
    ),
    "dtype": (lambda: Made(lambda *f: torch.cat(f, 1).float()), "returns [2, 28, 5, 4] of torch.float32 where"),
    "statistics": (lambda: CountsTwice(2, 12, 8), "updates units.0.bn1.num_batches_tracked otherwise in training"),
    "dropout before": (lambda: near.looped(near.DropsBeforeNorm), DROPS),
    "dropout in inference": (lambda: near.looped(near.DropsInInference), "drops out in inference too"),
    "dropout between": (lambda: near.looped(near.DropsBetween), DROPS),
    "dropout of the result": (lambda: near.DropsTheResult(2, 12, 8), DROPS),
    "reads a part": (lambda: near.ReadsAPart(3, 12, 8), "computes something else in training"),
    "new reversed": (lambda: near.NewReversed(2, 12, 8), ORDERS),
    "frozen otherwise": (
        lambda: near.with_norms(near.sequential(near.Front), near.FrozenOtherwise),
        "computes something else in training",
    ),
    "transition": (lambda: Pooled(12, 6), "returns a tuple, not a feature map in training"),
}


@pytest.mark.parametrize("make, difference", DIFFERENCES.values(), ids=DIFFERENCES)
def test_the_reason_says_what_differs(make, difference):
    (row,) = densenet_fast.explain(make())
    assert row.reason.startswith(f"left alone: its forward {difference}")
