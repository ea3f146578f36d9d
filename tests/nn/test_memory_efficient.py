"""``memory_efficient``: per model, block and layer, fused or not."""

import copy
import weakref

import pytest
import torch
import torchvision
from torch import nn

import densenet_fast
from densenet_fast import functional
from densenet_fast.nn import DenseBlock, DenseLayer, features, memory_format
from helpers import assert_same, error, make_norm, randomise, twin

SHAPE = dict(growth_rate=8, block_config=(3, 4), num_init_features=16, num_classes=5)


def kept_bytes(module, x):
    """Bytes of the storages that the graph of ``module(x)`` keeps, parameters aside."""
    sizes = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = module(x.clone().requires_grad_())
    return sum(sizes.values()) * output.isfinite().all().item()


def test_both_spellings():
    block = DenseBlock(3, 8, 4, 4, memory_efficient=True)
    assert block.memory_efficient is True and [layer.memory_efficient for layer in block.values()] == [True] * 3
    block.denselayer2.memory_efficient = False
    assert block.memory_efficient is False
    block.memory_efficient = True
    assert all(layer.memory_efficient for layer in block.values())
    assert DenseLayer(8, 4, 4, 0.0, True).memory_efficient and not DenseLayer(8, 4).memory_efficient
    model = densenet_fast.DenseNet(**SHAPE)
    for module in model.modules():
        if hasattr(module, "memory_efficient"):  # as users switch it on for torchvision's
            module.memory_efficient = True
    assert model.features.denseblock2.memory_efficient


@pytest.mark.parametrize("bottleneck", [True, False])
def test_layer_by_layer_it_is_the_same_and_keeps_less(bottleneck):
    block = randomise(DenseBlock(3, 8, 2 if bottleneck else None, 4, drop_rate=0.2)).double()
    plain, x = copy.deepcopy(block), torch.randn(2, 8, 7, 6, dtype=torch.float64)
    kept = []
    for flags in ((0, 0, 0), (1, 0, 0), (0, 1, 1), (1, 1, 1)):
        for layer, flag in zip(block.values(), flags):
            layer.memory_efficient = bool(flag)
        assert_same(copy.deepcopy(block), copy.deepcopy(plain), x, 1e-12)
        kept.append(kept_bytes(copy.deepcopy(block), x))
    bottleneck_bytes = 2 * 7 * 6 * 8 * 8
    differences = [a - b for a, b in zip(kept, kept[1:])]
    assert differences == [bottleneck_bytes] * 3 if bottleneck else differences == [0] * 3


def test_on_cpus_a_bottleneck_wider_than_what_it_is_made_of_is_never_kept():
    block, x = randomise(DenseBlock(3, 8, 3, 4)), torch.randn(2, 8, 7, 6)  # bottlenecks of 12 from 8, 12 and 16
    kept = kept_bytes(copy.deepcopy(block), x)
    block.memory_efficient = True
    assert kept - kept_bytes(block, x) == 2 * (2 * 7 * 6 * 12 * 4)


def test_the_function_takes_a_flag_for_each_layer_or_says_what_it_got():
    norm, weight = make_norm(4), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    layers, x = [[functional.BNReLUConv(norm, weight)]], torch.randn(2, 4, 5, 5, dtype=torch.float64)
    functional.dense_block(x, layers, memory_efficient=[True])
    with pytest.raises(ValueError, match="memory_efficient: expected 1 flags, got 2"):
        functional.dense_block(x, layers, memory_efficient=[True, False])


def unfused(model, how):
    first = model.features.denseblock1.denselayer1
    if how == "hook":
        first.conv2.register_forward_hook(lambda m, i, o: None)
    elif how == "pruned":
        nn.utils.parametrize.register_parametrization(first.conv1, "weight", nn.Identity())
    else:
        first.norm2 = nn.GroupNorm(2, first.norm2.num_features)
    return model


@pytest.mark.parametrize("how", ["hook", "pruned", "GroupNorm"])
def test_where_a_block_cannot_run_fused_it_keeps_no_more_than_stock(how):
    torch.manual_seed(0)
    stock = randomise(torchvision.models.DenseNet(**SHAPE, memory_efficient=True))
    ours = twin(stock, densenet_fast.DenseNet(**SHAPE, memory_efficient=True))
    plain = twin(stock, densenet_fast.DenseNet(**SHAPE))
    x, kept = torch.randn(2, 16, 8, 6), []
    for model in (ours, stock, plain):
        block = unfused(model, how).features.denseblock1
        kept.append(kept_bytes(block, x))
    assert kept[0] <= kept[1] < 0.75 * kept[2]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("how", ["hook", "GroupNorm"])
def test_unfused_it_computes_the_same_and_updates_running_statistics_once(how, alone):
    model = unfused(randomise(densenet_fast.DenseNet(**SHAPE, drop_rate=0.2)), how).double()
    efficient = copy.deepcopy(model)
    efficient.features.denseblock1.memory_efficient = True
    part, other, x = model.features.denseblock1, efficient.features.denseblock1, torch.randn(2, 16, 8, 6).double()
    if alone:
        part, other = part.denselayer2, other.denselayer2
        x = torch.randn(2, 24, 8, 6).double()
    assert_same(other, part, x, 1e-12)
    norm = efficient.features.denseblock1.denselayer2.norm1
    assert norm.num_batches_tracked == 1
    assert error(norm.running_mean, model.features.denseblock1.denselayer2.norm1.running_mean) < 1e-12


@pytest.mark.parametrize("efficient", [False, True])
def test_what_the_stems_convolution_makes_is_kept_or_made_again(efficient, monkeypatch):
    made = []

    def convolved(*arguments):
        out = memory_format.convolved(*arguments)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(features, "convolved", convolved)
    model = densenet_fast.DenseNet(**SHAPE, memory_efficient=efficient)
    loss = model(torch.randn(2, 3, 32, 32)).sum()
    assert [(ref() is None) for ref in made] == [efficient]
    loss.backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_stem_made_again_gives_bitwise_the_same_gradients(autocast):
    torch.manual_seed(0)
    model, x, gradients = randomise(densenet_fast.DenseNet(**SHAPE)), torch.randn(2, 3, 48, 40), []
    for efficient in (False, True):
        network = copy.deepcopy(model)
        for part in network.modules():
            if hasattr(part, "memory_efficient"):
                part.memory_efficient = efficient
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = network(leaf)
        out.float().square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_second_derivatives_reach_what_the_stem_is_made_of():
    torch.manual_seed(0)
    model, x, found = randomise(densenet_fast.DenseNet(**SHAPE)).double(), torch.randn(2, 3, 32, 32).double(), []
    for efficient in (False, True):
        for part in model.modules():
            if hasattr(part, "memory_efficient"):
                part.memory_efficient = efficient
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [leaf, model.features.conv0.weight]))
    assert all(error(a, b) < 1e-9 for a, b in zip(*found, strict=True))


def test_a_stem_that_changed_before_it_is_made_again_raises():
    model = densenet_fast.DenseNet(**SHAPE, memory_efficient=True)
    loss = model(torch.randn(2, 3, 32, 32)).sum()
    with torch.no_grad():
        model.features.conv0.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
