"""Dense blocks of every style run as one op, with the numbers, names and pickles that they had."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import densenet_fast
from conversion import twins
from conversion import twins_blocks as styles
from conversion.libraries import optional, torchvision
from densenet_fast.conversion.expected import STATE
from densenet_fast.nn import fusion
from helpers import assert_same, error, randomise

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
    "no rate": lambda: styles.looped(styles.NoRate, styles.FrontBlock),
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


def set_at(path, name, value):
    return lambda block: setattr(block.get_submodule(path), name, value)


def frozen_block():
    return styles.with_norms(twins.OwnBlock(3, 12, 8), frozen)


CHANGES = {
    "flag": (lambda: styles.PathBlock(3, 12, 8), set_at("", "upsample", False), "upsample has changed"),
    "rate": (lambda: styles.looped(styles.ByFunction), set_at("units.1", "droprate", 0.6), ""),
    "rate of the block": (lambda: styles.DroppingBlock(3, 12, 8), set_at("", "dropout", 0.6), ""),
    "rate of a module": (lambda: styles.looped(styles.ByModule), set_at("units.1.drops.0", "p", 0.6), ""),
    "rate of a class": (
        lambda: styles.looped(styles.ByClass),
        set_at("units.1", "drop_rate", 0.6),
        "units.1.drop_rate has changed",
    ),
    "place": (
        lambda: styles.looped(styles.ByFunction),
        lambda block: [setattr(unit, "places", "b") for unit in block.units],
        "units.0.places has changed",
    ),
    "channels": (
        lambda: styles.looped(styles.ByModule),
        lambda block: [unit.drops.__setitem__(0, nn.Dropout2d(0.3)) for unit in block.units],
        "units.0.drops.0 is a Dropout2d, not a Dropout",
    ),
    "frozen tensor": (frozen_block, set_at("units.1.bn1", "running_var", torch.arange(20.0)), ""),
    "frozen in place": (frozen_block, lambda block: block.units[1].bn1.running_var.mul_(3), ""),
    "frozen eps": (frozen_block, set_at("units.1.bn1", "eps", 0.3), "units.1.bn1.eps has changed"),
    "frozen later": (
        lambda: twins.OwnBlock(3, 12, 8),
        lambda block: styles.with_norms(block, frozen),
        "units.0.bn1 is a FrozenBatchNorm2d, not a BatchNorm2d",
    ),
    "unit": (
        lambda: styles.sequential(styles.OfUnits),
        set_at("1.conv2", "activ", nn.ReLU6()),
        "1.conv2.activ is a ReLU6, not a ReLU",
    ),
}


@pytest.mark.parametrize("make, change, reason", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_later_counts(make, change, reason):
    """Before it is converted again and then, both as its own classes have it."""
    torch.manual_seed(0)
    model, x = densenet_fast.convert(nn.Sequential(randomise(make().double()))), torch.randn(X, dtype=torch.float64)
    model(x)
    change(model[0])
    stock = densenet_fast.restore(copy.deepcopy(model.double()))
    (row,) = densenet_fast.explain(model)
    assert row.fused == (not reason) and reason in row.reason, row.reason
    for again in (False, True):
        if again and "ReLU6" in reason:
            with pytest.raises(ValueError, match="1.conv2.activ is a ReLU6"):
                densenet_fast.convert(model)
        elif again:
            assert densenet_fast.explain(densenet_fast.convert(model))[0].fused
        for training in (True, False):
            assert_same(model.train(training), copy.deepcopy(stock).train(training), x, 1e-9)
            model.load_state_dict(stock.state_dict())


@pytest.mark.parametrize("dims, channels_last", [(1, False), (2, False), (2, True), (3, False)])
@pytest.mark.parametrize("front", [False, True])
def test_new_features_are_handed_out_as_stock_makes_them(dims, channels_last, front):
    """In its memory format, and free to be changed in place."""
    torch.manual_seed(0)
    stock = randomise(styles.PathBlock(2, 12, 8, front=front, dims=dims).double())
    x = torch.randn(2, 12, 6, 5, 4, dtype=torch.float64).flatten(dims + 1)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    results = []
    for net in (stock, densenet_fast.convert(stock, inplace=False)):
        torch.manual_seed(1)
        given = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = net(given)
        strides = out.stride()
        F.relu_(out).square().sum().backward()
        results.append((out, given.grad, strides))
    (expected, grad, strides), (out, got, ours) = results
    assert error(out, expected) < 1e-9 and error(got, grad) < 1e-9 and ours == strides


@pytest.mark.parametrize("front", [False, True])
def test_between_other_parts(front):
    """A path down and up again: blocks that return their input or not, and what reads them."""
    torch.manual_seed(0)
    path = lambda *args, **options: styles.PathBlock(*args, front=front, **options)  # noqa: E731
    stock = nn.Sequential(path(2, 12, 8, upsample=False), path(3, 28, 8), twins.Transition(24, 6), path(2, 6, 8))
    stock = randomise(stock.double())
    model = densenet_fast.convert(stock, inplace=False)
    assert [row.fused for row in densenet_fast.explain(model)] == [True] * 4
    assert_same(model, stock, torch.randn(X, dtype=torch.float64), 1e-9)


AUTOCAST = {
    "front": lambda: styles.sequential(styles.Front),
    "new alone": lambda: styles.PathBlock(3, 12, 8),
    "frozen": lambda: styles.with_norms(styles.sequential(styles.Front), frozen),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_keeps_dtypes_and_accuracy(name):
    torch.manual_seed(0)
    stock = randomise(AUTOCAST[name]()).eval()
    model, x = densenet_fast.convert(stock, inplace=False), torch.randn(X).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert densenet_fast.explain(model)[0].last_call == ""
        got, expected = model(x), stock(x)
        assert densenet_fast.explain(model)[0].last_call == "fused"
    truth = copy.deepcopy(stock).double()(x.double())
    assert got.dtype == expected.dtype == torch.bfloat16
    assert error(got, truth) <= 2 * error(expected, truth)


@pytest.mark.skipif(layers is None, reason="timm is not installed (the Makefile installs it)")
def test_timms_synchronised_normalisation_where_processes_are_joined():
    """Torch's takes no CPU tensors there, so that its own forward cannot be run; the op's can."""
    stock = randomise(styles.looped(styles.ActivatedLayer, kind=layers.BatchNormAct2d).double())
    model = layers.convert_sync_batchnorm(copy.deepcopy(stock))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert densenet_fast.explain(densenet_fast.convert(model))[0].fused
        norm = model.units[0].norm1
        assert fusion.batch_norm(norm).group is dist.group.WORLD
        norm.process_group = dist.new_group([0])
        assert fusion.batch_norm(norm).group is norm.process_group
        norm.process_group = None
        x = torch.randn(X, dtype=torch.float64)
        for training in (True, False):
            assert_same(model.train(training), stock.train(training), x, 1e-9)
    finally:
        dist.destroy_process_group()
