"""The segmentation network of docs/in-your-own-network.md, beside the same network of stock torch modules."""

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import densenet_fast
from densenet_fast import reference
from helpers import error

PAGE = Path(densenet_fast.__file__).parents[1] / "docs/in-your-own-network.md"
IMPORT = "from densenet_fast.nn import BNReLUConv1x1, DenseBlock\n"


class BNReLUConv1x1(nn.Sequential):
    def __init__(self, channels, out):
        norm, conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 1, bias=False)
        super().__init__(OrderedDict(norm=norm, relu=nn.ReLU(), conv=conv))


def tiramisu(stock):
    """The page's class; ``stock``: over the reference's dense blocks and a plain Sequential."""
    source = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    assert IMPORT in source
    names = dict(__name__="tiramisu", BNReLUConv1x1=BNReLUConv1x1, DenseBlock=reference.DenseBlock)
    exec(source.replace(IMPORT, "") if stock else source, names)
    return names["Tiramisu"]


def make(stock):
    torch.manual_seed(0)
    return tiramisu(stock)(3, down_layers=(2, 3), bottom_layers=2, growth_rate=6, stem=10).double()


@pytest.mark.parametrize("training", [True, False])
def test_it_trains_as_its_stock_twin(training):
    labels = (torch.arange(24) // 8).expand(3, 24, 24)
    results = []
    for stock in (True, False):
        model = make(stock).train(training)
        report = densenet_fast.explain(model)
        kinds = {row.kind: row.fused for row in report}
        assert kinds == dict.fromkeys(["DenseBlock", "Transition" if stock else "BNReLUConv1x1"], not stock)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        losses = []
        for _ in range(4):
            images = torch.randn(3, 3, 24, 24, dtype=torch.float64) + labels[:, None]
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        results.append((losses, model.state_dict()))
    (expected, states), (got, ours) = results
    assert got == pytest.approx(expected, rel=1e-9) and got[-1] < 0.9 * got[0]
    assert list(ours) == list(states)
    assert all(error(ours[key], states[key]) < 1e-8 or ours[key].equal(states[key]) for key in states)


def test_the_papers_network_has_its_parameters():
    """FC-DenseNet103: 9.4 million parameters, counted without running statistics (table 1 of the paper)."""
    with torch.device("meta"):
        model = tiramisu(False)(12)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(9.4e6, rel=0.01)
    assert model(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 12, 64, 64)
