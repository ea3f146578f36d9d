"""What explain says of calls that were made."""

import pytest
import torch
from integration.support import images, ours, stock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import densenet_fast
from conversion import twins
from conversion.libraries import monai, skip_unless_installed
from densenet_fast import reference
from densenet_fast.nn import DenseBlock, Transition
from helpers import randomise


def rows(model):
    return {row.name: row for row in densenet_fast.explain(model)}


@pytest.fixture(params=["ours", "converted"])
def model(request):
    return (ours() if request.param == "ours" else densenet_fast.convert(stock())).double()


def test_it_tells_what_the_last_call_did(model):
    assert {row.last_call for row in rows(model).values()} == {""}
    model(images())
    assert {row.last_call for row in rows(model).values()} == {"fused"}
    with densenet_fast.set_fused(False):
        model(images())
    assert {(row.fused, row.last_call) for row in rows(model).values()} == {
        (True, "stock: switched off by set_fused(False)")
    }
    model.features.denseblock1.denselayer1.register_forward_hook(lambda m, i, o: None)
    model(images())
    report = rows(model)
    assert report["features.denseblock1"].last_call == "stock: denselayer1 has a hook or a forward of its own"
    assert report["features.denseblock2"].last_call == "fused" and "last call" in str(densenet_fast.explain(model))


def test_it_says_what_is_slower_than_stock():
    model = ours()
    assert "second derivatives" in str(densenet_fast.explain(model))
    assert "plain torch operations" in str(densenet_fast.explain(model.double()))
    model.features.denseblock1.denselayer1.relu1 = nn.GELU()
    with densenet_fast.set_fused(False):
        assert "lower than stock" not in str(densenet_fast.explain(model))


def test_a_mode_that_hooks_all_modules_is_named_afterwards(model):
    counts = []
    for network in (model, stock().double()):
        with FlopCounterMode(display=False) as counter:
            network(images())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    assert {row.last_call for row in rows(model).values()} == {"stock: a global module hook is registered"}
    model(images())
    assert {row.last_call for row in rows(model).values()} == {"fused"}


class Encoder(densenet_fast.DenseNet):
    """Takes features out of the middle of a transition, as segmentation_models_pytorch's encoder does."""

    def forward(self, x):
        skips = []
        for name, child in self.features.named_children():
            for part in child if name.startswith("transition") else [child]:
                x = part(x)
                if isinstance(part, nn.ReLU):
                    skips.append(x)
        return [*skips, x]


def test_a_part_that_its_network_takes_apart_is_not_called_fused():
    encoder = Encoder(4, (2, 3), 6)
    assert not rows(encoder)["features.norm5"].fused and "forward of its own" in rows(encoder)["features.norm5"].reason
    encoder(images(dtype=torch.float32))
    report = rows(encoder)
    assert [name for name, row in report.items() if row.fused] == ["features.denseblock1", "features.denseblock2"]
    assert "its network did not call it" in report["features.transition1"].reason
    assert "its network did not call it" in report["features.norm0"].reason


def test_one_part_called_by_itself_says_nothing_of_the_others():
    model = ours()
    model.features.denseblock1(torch.randn(2, 6, 8, 8))
    assert all(row.fused for row in densenet_fast.explain(model))


def test_a_graph_that_fx_took_apart(model):
    names, x = ["features.denseblock1", "features.norm5"], images()
    apart = create_feature_extractor(model, names)
    assert not any(row.fused for row in densenet_fast.explain(apart))
    assert "leaf modules" in densenet_fast.explain(apart)[0].reason
    with pytest.raises(ValueError, match="leaf modules"):
        densenet_fast.convert(apart)
    leaves = {type(model.features.denseblock1), type(model.features.transition1), DenseBlock, Transition}
    whole = create_feature_extractor(model, names, tracer_kwargs={"leaf_modules": list(leaves)})
    expected = apart(x)
    for name, value in whole(x).items():
        assert (value - expected[name]).norm() <= 1e-9 * expected[name].norm()
    assert [row.last_call for row in densenet_fast.explain(whole)] == ["fused"] * 3


def volume_block(channels):
    return reference.DenseBlock(1, channels, 2, 4, spatial_dims=3)


NETWORKS = {
    "torchxrayvision": (lambda: twins.XrayNet(4, (2, 2)), (2, 1, 32, 32), [True] * 4),
    "own copy": (lambda: twins.OwnNet(4), (2, 3, 8, 8), [True] * 3),
    "a block in float32": (lambda: twins.XrayBlock(2, 12, 4, 0.0), (2, 12, 5, 5), [False]),
    "blocks in float32": (
        lambda: nn.Sequential(twins.XrayBlock(1, 12, 4, 0.0), twins.Transition(16, 8), twins.XrayBlock(1, 8, 4, 0.0)),
        (2, 12, 6, 6),
        [False, False, True],
    ),
    "volumes": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 8, 3), volume_block(8), reference.Transition(12, 6, spatial_dims=3), volume_block(6)
        ),
        (2, 1, 8, 8, 8),
        [True, True, True],
    ),
    "volumes in float64": (
        lambda: nn.Sequential(nn.Conv3d(1, 8, 3), reference.Transition(8, 6, spatial_dims=3), nn.Tanh()).double(),
        (2, 1, 8, 8, 8),
        [True],
    ),
    "monai 3-D": (lambda: monai.DenseNet(3, 1, 2, 6, 4, (2, 2, 2), 2), (2, 1, 32, 32, 32), [True] * 6),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_under_autocast_what_it_says_is_what_a_call_does(name):
    skip_unless_installed(name)
    make, shape, expected = NETWORKS[name]
    model = densenet_fast.convert(randomise(make()))
    assert all(row.fused for row in densenet_fast.explain(model))
    with torch.autocast("cpu", torch.bfloat16):
        report = densenet_fast.explain(model)
        model(torch.randn(shape, dtype=next(model.parameters()).dtype))
        called = densenet_fast.explain(model)
    assert [row.fused for row in report] == expected == [row.last_call == "fused" for row in called]
    assert [f"stock: {row.reason}" for row in report if not row.fused] == [
        row.last_call for row in called if row.last_call != "fused"
    ]
