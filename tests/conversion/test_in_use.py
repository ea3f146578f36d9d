"""A converted model in its owner's hands: hooks, copies, flags, changes, tracing, memory formats."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import densenet_fast
from conversion import twins
from conversion.libraries import monai, skip_unless_installed, timm
from conversion.small_torchvision import small
from densenet_fast.conversion import fused
from helpers import assert_same, error, randomise, step

LAYERS = {
    "torchvision": (lambda: small(), "features.denseblock2.denselayer2", 3, 8),
    "torchxrayvision": (lambda: twins.XrayNet(), "features.denseblock2.denselayer2", 1, 32),
    "gpleiss": (lambda: twins.EfficientNet(efficient=False), "features.denseblock2.denselayer2", 3, 8),
}
LAYERS["timm"] = lambda: timm.DenseNet(8, (2, 3, 2)), "features.denseblock2.denselayer2", 3, 8
LAYERS["monai"] = lambda: monai.DenseNet(2, 1, 5, 16, 8, (2, 3, 2)), "features.denseblock2.denselayer2", 1, 32


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_see_what_they_saw(name):
    """On a layer and inside one, registered before the conversion and after it, forward and backward."""
    skip_unless_installed(name)
    make, path, channels, seen_channels = LAYERS[name]
    stock = randomise(make().double())
    x = torch.randn(2, channels, 64, 64, dtype=torch.float64)
    records = []
    for when in ("never", "before", "after"):
        model, seen = copy.deepcopy(stock), []
        if when == "after":
            densenet_fast.convert(model)
        inner = next(m for n, m in model.get_submodule(path).named_modules() if n.endswith("conv1"))
        handles = [
            model.get_submodule(path).register_forward_hook(lambda m, i, o, s=seen: s.append(o)),
            inner.register_full_backward_hook(lambda m, i, o, s=seen: s.append(o[0])),
            model.features.denseblock3.register_forward_hook(lambda m, i, o, s=seen: s.append(o)),
            model.features.denseblock1.register_forward_pre_hook(lambda m, i, s=seen: s.append(i[0])),
        ]
        if when == "before":
            densenet_fast.convert(model)
        if when != "never":
            rows = {row.name: row for row in densenet_fast.explain(model)}
            assert "has a hook" in rows["features.denseblock2"].reason
            assert rows["features.denseblock1"].fused and rows["features.denseblock3"].fused
        values = dict(step(model, x))
        records.append([*seen, values["output"], values["grad x"]])
        for handle in handles:
            handle.remove()
        if when != "never":
            assert all(row.fused for row in densenet_fast.explain(model))
    assert len(records[0]) == 6 and records[0][1].shape[1] == seen_channels
    for got in records[1:]:
        for a, b in zip(got, records[0], strict=True):
            assert error(a, b) < 1e-9 and a.stride() == b.stride()


def test_calling_layers_one_by_one_is_as_before():
    model = twins.XrayNet().eval()
    x = torch.randn(2, 16, 9, 9)
    expected = x
    for layer in model.features.denseblock1:
        expected = layer(expected)
    densenet_fast.convert(model)
    got = x
    for layer in model.features.denseblock1:
        got = layer(got)
    assert got.equal(expected) and error(model.features.denseblock1(x), expected) < 1e-5
    assert model.features.denseblock1.denselayer1(x).shape[1] == 24
    assert (
        error(nn.Sequential(*model.features)(torch.zeros(1, 1, 64, 64)), model.features(torch.zeros(1, 1, 64, 64)))
        < 1e-5
    )


def test_optimizers_and_frozen_parts_stay():
    stock = small(drop_rate=0.1).double()
    stock.features.denseblock1.requires_grad_(False)
    stock.features.denseblock2.denselayer1.norm1.eval()
    model, losses = copy.deepcopy(stock), []
    for net in (stock, model):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
        if net is model:
            densenet_fast.convert(net)
        torch.manual_seed(3)
        for _ in range(4):
            loss = F.cross_entropy(net(torch.randn(4, 3, 40, 40, dtype=torch.float64)), torch.randint(5, (4,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-9) and losses[0] != losses[3]
    assert all(
        error(a, b) < 1e-9 or a.equal(b) for a, b in zip(model.state_dict().values(), stock.state_dict().values())
    )
    assert all(p.grad is None for p in model.features.denseblock1.parameters())


@pytest.mark.parametrize("make", [lambda: small().eval(), lambda: randomise(twins.OwnNet()).eval()])
def test_copies_and_pickles_stay_converted(make, fused_calls):
    model = densenet_fast.convert(make())
    x = torch.randn(2, 3, 40, 40)
    expected = model(x)
    blocks = len(fused_calls)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    others += [pickle.loads(pickle.dumps(model, protocol)) for protocol in (0, 2, 5)]
    for other in others:
        fused_calls.clear()
        assert other(x).equal(expected) and len(fused_calls) == blocks >= 2
        assert all(row.fused for row in densenet_fast.explain(other))
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        densenet_fast.restore(other)
        assert error(other(x), expected) < 1e-5 and len(fused_calls) == blocks


def test_a_copy_is_converted_and_the_original_is_not(fused_calls):
    model = small().eval()
    other = densenet_fast.convert(model, inplace=False)
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    assert not fused_calls and error(other(x), expected) < 1e-5 and len(fused_calls) == 3
    assert densenet_fast.convert(other) is other  # again: nothing changes
    assert other(x).shape == (2, 5) and len(fused_calls) == 6


@pytest.mark.parametrize(
    "make, flag",
    [
        (lambda: small(memory_efficient=True), "memory_efficient"),
        (lambda: twins.EfficientNet(efficient=True), "efficient"),
    ],
)
def test_memory_efficient_carries_over(make, flag, fused_calls):
    model = densenet_fast.convert(make())
    x = torch.randn(2, 3, 64, 64)
    model(x).sum().backward()
    assert fused_calls == [False] * 3
    assert {b.item() for n, b in model.named_buffers() if "num_batches_tracked" in n} == {1}
    for layer in model.features.denseblock2.children():
        setattr(layer, flag, False)
    model(x)
    assert fused_calls[3:] == [False, True, False]


def test_drop_rates_may_change():
    model = densenet_fast.convert(small().double())
    for layer in [*model.features.denseblock1.values()][:1]:
        layer.drop_rate = 0.4
    stock = densenet_fast.restore(copy.deepcopy(model))
    assert all(row.fused for row in densenet_fast.explain(model))
    assert_same(model, stock, torch.randn(2, 3, 40, 40, dtype=torch.float64), 1e-9)


def changed(path, module):
    parent, _, name = path.rpartition(".")
    return lambda m: setattr(m.get_submodule(parent), name, module)


CHANGES = {
    "activation": (changed("denselayer1.relu1", nn.GELU()), "denselayer1.relu1 is a GELU, not a ReLU"),
    "no activation": (changed("denselayer1.relu1", nn.Identity()), "denselayer1.relu1 is a Identity"),
    "norm": (changed("denselayer2.norm1", nn.GroupNorm(2, 20)), "denselayer2.norm1 is a GroupNorm"),
    "dilation": (lambda m: setattr(m.denselayer1.conv2, "dilation", (2, 2)), "denselayer1.conv2 is not a plain"),
    "layer": (lambda m: m.add_module("denselayer4", copy.deepcopy(m.denselayer1)), "the children of the module are"),
    "part": (lambda m: m.denselayer1.append(nn.Tanh()), "the children of denselayer1 are"),
    "dropped layer": (lambda m: m._modules.pop("denselayer3"), "the children of the module are"),
    "forward": (lambda m: setattr(m.denselayer1, "forward", lambda x: F.pad(x, (0, 0, 0, 0, 0, 8))), "of its own"),
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m.denselayer1.conv1), "is a ParametrizedConv2d"),
}


@pytest.mark.parametrize("change, reason", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_later_runs_as_the_library_has_it(change, reason, fused_calls):
    model = densenet_fast.convert(randomise(twins.XrayBlock(3, 12, 8, 0.0).double()))
    change(model.double())
    model.double()
    (row,) = densenet_fast.explain(model)
    assert not row.fused and reason in row.reason, row.reason
    stock = densenet_fast.restore(copy.deepcopy(model))
    x = torch.randn(2, 12, 7, 7, dtype=torch.float64)
    if "layer" in reason or "children of the module" not in reason:
        outcomes = []
        for net in (model, stock):
            try:
                outcomes.append(net(x))
            except RuntimeError as caught:
                outcomes.append(str(caught))
        assert outcomes[0] == outcomes[1] if isinstance(outcomes[0], str) else outcomes[0].equal(outcomes[1])
    assert not fused_calls


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_have_the_memory_format_of_the_input(memory_format):
    stock = small().eval()
    model = densenet_fast.convert(stock, inplace=False)
    x = torch.randn(2, 3, 128, 128).to(memory_format=memory_format)
    for path in ("features.norm5", "features.denseblock1", "features.transition1", "features.denseblock3"):
        outputs = []
        for net in (model, stock):
            handle = net.get_submodule(path).register_forward_hook(lambda m, i, o, s=outputs: s.append(o))
            outputs.append(net.features(x))
            handle.remove()
        assert [o.stride() for o in outputs[:2]] == [o.stride() for o in outputs[2:]], path
        assert error(outputs[0], outputs[2]) < 1e-5
    block, pooled = model.features.denseblock1, model.features.pool0(model.features.conv0(x)[:, :16])
    assert block(pooled).is_contiguous(memory_format=memory_format)


def test_feature_maps_between_blocks_are_not_copied(monkeypatch):
    """Of contiguous input the image is made channels last, and the last block's result contiguous again."""
    model, hand = densenet_fast.convert(small().eval()), fused.handed_out
    apply, apply_both, handed, given = fused.apply, fused.apply_both, [], []

    def both(block, reader, x, *args):
        made = apply_both(block, reader, x, *args)
        given.extend([x] if made is not None else [])
        return made

    monkeypatch.setattr(fused, "handed_out", lambda *args: handed.append(hand(*args)) or handed[-1])
    monkeypatch.setattr(fused, "apply", lambda operands, x, *args: given.append(x) or apply(operands, x, *args))
    monkeypatch.setattr(fused, "apply_both", both)
    model.features(torch.randn(2, 3, 128, 128))
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in given] == [False] + [True] * 3
    assert [x.is_contiguous() for x in handed] == [True]


def test_a_slice_of_the_features_and_an_appended_module():
    stock = small().eval()
    model = densenet_fast.convert(stock, inplace=False)
    x = torch.randn(2, 3, 64, 64)
    for cut in (slice(0, 5), slice(0, 7), slice(4, 8)):
        y = x if cut.start == 0 else torch.randn(2, 16, 16, 16)
        assert error(model.features[cut](y), stock.features[cut](y)) < 1e-5
    model.features.append(nn.Tanh())
    assert error(model.features(x), stock.features(x).tanh()) < 1e-5


def test_in_place_consumers_of_a_block():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        results = []
        block = randomise(twins.XrayBlock(2, 12, 8, 0.0).double())
        for net in (copy.deepcopy(block), densenet_fast.convert(block)):
            x = torch.randn(2, 12, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            x = x.to(memory_format=memory_format).requires_grad_()
            F.relu_(net(x)).square().sum().backward()
            results.append(x.grad)
        assert error(*results) < 1e-9


def test_second_derivatives_and_transforms():
    stock = small().double().eval()
    model = densenet_fast.convert(stock, inplace=False)
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64, requires_grad=True)
    results = []
    for net in (model, stock):
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        results.append([*torch.autograd.grad(g.square().sum(), list(net.parameters()), allow_unused=True)])
    assert all(error(a, b) < 1e-9 for a, b in zip(*results) if b is not None)
    parameters = dict(model.named_parameters())
    got = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)
    expected = torch.autograd.grad(stock(x).square().sum(), list(stock.parameters()))
    assert all(error(a, b) < 1e-9 for a, b in zip(got.values(), expected))


def test_traces_see_what_they_saw():
    stock = small().eval()
    model = densenet_fast.convert(stock, inplace=False)
    x = torch.randn(2, 3, 64, 64)
    expected = stock(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x)
        with pytest.raises(NotImplementedError, match=r"torch.jit.script: .*restore\(model\).*reference.*torch.export"):
            torch.jit.script(model)
        assert torch.jit.script(densenet_fast.restore(copy.deepcopy(model)))(x).allclose(expected)
    assert "densenet_fast::" not in str(traced.inlined_graph) and traced(x).allclose(expected)
    assert all(row.fused for row in densenet_fast.explain(model))
    exported = torch.export.export(model, (x,))
    assert "densenet_fast" not in str(exported.graph) and exported.module()(x).allclose(expected)
    nodes = ["features.denseblock1", "features.norm5"]
    features, theirs = create_feature_extractor(model, nodes)(x), create_feature_extractor(stock, nodes)(x)
    assert all(error(features[node], theirs[node]) < 1e-5 for node in nodes)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_a_graph_break(training):
    torch.compiler.reset()
    model = small(block_config=(2, 2), drop_rate=0.2).train(training)
    eager = densenet_fast.convert(model, inplace=False)
    compiled = torch.compile(densenet_fast.convert(model), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 40, 40)
    if training:
        assert_same(compiled, eager, x, 1e-4)
    else:
        with torch.no_grad():
            assert error(compiled(x), eager(x)) < 1e-5
    torch.compiler.reset()


def test_synchronised_batch_normalisation_before_and_after():
    for converted_first in (True, False):
        model = small()
        if converted_first:
            densenet_fast.convert(model)
        model = densenet_fast.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if not converted_first:
            densenet_fast.convert(model)
        assert all(row.fused for row in densenet_fast.explain(model)) and len(densenet_fast.explain(model)) == 6
        model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_switched_off():
    stock = small().eval()
    model = densenet_fast.convert(stock, inplace=False)
    x = torch.randn(2, 3, 64, 64)
    with densenet_fast.set_fused(False):
        assert model(x).equal(stock(x))


def test_keyword_calls_and_global_hooks(fused_calls):
    model = densenet_fast.convert(small().eval())
    x, seen = torch.randn(2, 16, 9, 9), []
    expected = model.features.denseblock1(x)
    assert error(model.features.denseblock1(init_features=x), expected) < 1e-5 and len(fused_calls) == 1
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        model(torch.randn(1, 3, 64, 64))
    finally:
        handle.remove()
    assert set(seen) == set(model.modules()) and len(fused_calls) == 1


def test_restore_refuses_a_class_that_was_changed_again():
    block = densenet_fast.convert(twins.XrayBlock(2, 12, 8, 0.0))
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(ValueError, match="whose class was changed again since"):
        densenet_fast.restore(block)
