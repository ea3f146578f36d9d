"""Dense blocks of every style run as one op, with the numbers, names and pickles that they had."""

import copy
import pickle

import pytest
import torch
from torch import nn

import densenet_fast
from conversion import twins
from conversion import twins_blocks as styles
from conversion.libraries import optional, torchvision
from densenet_fast.conversion.expected import STATE
from helpers import assert_same, randomise

layers = optional("timm.layers")
X = (3, 12, 7, 6)


def frozen(channels):
    return torchvision.ops.FrozenBatchNorm2d(channels, eps=1e-3)


def sync(channels):
    kept = layers.BatchNormAct2d(channels)
    return layers.convert_sync_batchnorm(kept)


BLOCKS = {
    "front, Sequential": lambda: styles.sequential(styles.Front),
    "front, one net": lambda: styles.Wrapped(styles.sequential(styles.FrontOfOneNet, dropout=0.2)),
    "front, looped": lambda: styles.FrontBlock(3, 12, 8),
    "front, one layer": lambda: styles.sequential(styles.Front, 1),
    "new alone": lambda: styles.PathBlock(3, 12, 8),
    "new alone, front": lambda: styles.PathBlock(3, 12, 8, front=True),
    "whole path": lambda: styles.PathBlock(3, 12, 8, upsample=False),
    "units": lambda: styles.sequential(styles.OfUnits),
    "units, dropout": lambda: styles.sequential(styles.OfUnits, dropout=0.3),
    "deep units": lambda: styles.sequential(styles.Deep),
    "last first": lambda: styles.looped(styles.LastFirst),
    "by function": lambda: styles.looped(styles.ByFunction),
    "by function, behind the 1x1": lambda: styles.looped(styles.ByFunction, places="a", name="p_drop"),
    "by function, behind the 3x3": lambda: styles.looped(styles.ByFunction, places="b", name="dropout"),
    "by function, channels": lambda: styles.looped(styles.ByFunction, function="dropout2d"),
    "by function, in front": lambda: styles.looped(styles.ByFunction, styles.FrontBlock),
    "by function of the block": lambda: styles.DroppingBlock(3, 12, 8),
    "by one module": lambda: styles.looped(styles.ByModule),
    "by one module, behind the 1x1": lambda: styles.looped(styles.ByModule, places="a", kind=nn.Dropout2d),
    "by two modules": lambda: styles.looped(styles.ByModule, rates=(0.2, 0.4)),
    "FrozenBatchNorm2d": lambda: styles.with_norms(styles.sequential(styles.Front), frozen),
    "frozen, no eps": lambda: styles.with_norms(twins.OwnBlock(3, 12, 8), styles.Frozen),
    "frozen transition": lambda: styles.with_norms(twins.Transition(12, 6), frozen),
}
if layers is not None:
    KINDS = {"BatchNormAct2d": layers.BatchNormAct2d, "FrozenBatchNormAct2d": layers.FrozenBatchNormAct2d}
    KINDS["SyncBatchNormAct"] = sync
    for name, kind in KINDS.items():
        BLOCKS[f"timm {name}"] = lambda kind=kind: styles.looped(styles.ActivatedLayer, kind=kind)
        BLOCKS[f"timm {name} transition"] = lambda kind=kind: styles.ActivatedTransition(12, 6, kind)


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_the_unconverted_block(name):
    torch.manual_seed(0)
    stock = nn.Sequential(randomise(BLOCKS[name]().double()))
    keys = list(stock.state_dict())
    model = densenet_fast.convert(stock, inplace=False)
    x = torch.randn(X, dtype=torch.float64)
    for training in (True, False):
        for net in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            (row,) = densenet_fast.explain(net)
            assert row.fused, row.reason
            assert_same(net.train(training), copy.deepcopy(stock).train(training), x, 1e-9)
    assert list(model.state_dict()) == keys
    densenet_fast.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert all(STATE not in vars(m) for m in model.modules())
