"""Each library's DenseNet, converted, against itself as it was: numbers, names, objects, memory."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import densenet_fast
from conversion import twins
from conversion.libraries import DENSENET121, monai, skip_unless_installed, timm, torchvision
from helpers import assert_same, error, randomise, step

SMALL = dict(growth_rate=8, block_config=(2, 3, 2))
WHOLE = ["torchvision", "timm", "monai 2-D", "monai 3-D"]


def needs(library, name):
    return pytest.mark.skipif(library is None, reason=f"{name} is not installed (the Makefile installs it)")


def initialised(model, *shape):
    model.eval()(torch.zeros(shape))
    return model.train()


def monai_net(dims, **options):
    return monai.DenseNet(dims, 1, 3, 16, **SMALL, **options)


LIBRARIES = {
    "torchvision": (lambda: torchvision.models.DenseNet(**SMALL, num_init_features=16), (2, 3, 70, 64), 6),
    "torchvision drop": (lambda: torchvision.models.DenseNet(**SMALL, drop_rate=0.3), (2, 3, 70, 64), 6),
    "torchxrayvision": (lambda: twins.XrayNet(), (2, 1, 70, 64), 6),
    "torchxrayvision drop": (lambda: twins.XrayNet(drop_rate=0.3), (2, 1, 70, 64), 6),
    "gpleiss": (lambda: twins.EfficientNet(efficient=False), (2, 3, 70, 64), 6),
    "gpleiss drop": (lambda: twins.EfficientNet(efficient=False, drop_rate=0.3), (2, 3, 70, 64), 6),
    "d2l": (lambda: initialised(twins.book_net(), 2, 1, 40, 40), (2, 1, 70, 64), 5),
    "own copy": (lambda: twins.OwnNet(), (2, 3, 13, 16), 3),
    "reference": (lambda: densenet_fast.reference.DenseNet(**SMALL), (2, 3, 70, 64), 6),
}
LIBRARIES["timm"] = lambda: timm.DenseNet(**SMALL), (2, 3, 70, 64), 6
LIBRARIES["timm drop"] = lambda: timm.DenseNet(**SMALL, proj_drop_rate=0.3), (2, 3, 70, 64), 6
LIBRARIES["timm deep stem"] = lambda: timm.DenseNet(**SMALL, stem_type="deep"), (2, 3, 70, 64), 6
for dims, shape in {1: (3, 1, 90), 2: (2, 1, 70, 64), 3: (2, 1, 32, 40, 34)}.items():
    LIBRARIES[f"monai {dims}-D"] = (lambda dims=dims: monai_net(dims)), shape, 6
    LIBRARIES[f"monai {dims}-D drop"] = (lambda dims=dims: monai_net(dims, dropout_prob=0.3)), shape, 6


@pytest.mark.parametrize("name", LIBRARIES)
def test_equals_the_unconverted_model(name):
    skip_unless_installed(name)
    make, shape, parts = LIBRARIES[name]
    stock = randomise(make().double())
    model = copy.deepcopy(stock)
    assert densenet_fast.convert(model) is model
    report = densenet_fast.explain(model)
    assert len(report) == parts and all(row.fused for row in report), report
    x = torch.randn(shape, dtype=torch.float64)
    for training in (True, False):
        assert_same(model.train(training), stock.train(training), x, 1e-9)


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_but_classes_changes_and_restore_changes_them_back(name):
    skip_unless_installed(name)
    model = LIBRARIES[name][0]()
    model.eval()
    first = next(iter(model.parameters())).requires_grad_(False)
    modules, classes = dict(model.named_modules()), {n: type(m) for n, m in model.named_modules()}
    state, keys = dict(model.state_dict(keep_vars=True)), [*vars(model)]
    texts = repr(model), [type(m).__name__ for m in model.modules()]
    children = {n: list(m._modules) for n, m in modules.items()}

    densenet_fast.convert(model)
    assert dict(model.named_modules()) == modules and list(model.state_dict()) == list(state)
    assert all(value is state[key] for key, value in model.state_dict(keep_vars=True).items())
    assert {n: list(m._modules) for n, m in model.named_modules()} == children
    assert (repr(model), [type(m).__name__ for m in model.modules()]) == texts
    assert all(isinstance(m, classes[n]) for n, m in model.named_modules())
    assert not model.training and not first.requires_grad and [*vars(model)] == keys
    assert any(type(m) is not classes[n] for n, m in model.named_modules())

    assert densenet_fast.restore(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert all("_densenet_fast" not in vars(m) for m in model.modules())
    assert not any(row.fused for row in densenet_fast.explain(model))
    assert all("convert(model) converts it" in row.reason for row in densenet_fast.explain(model))


@pytest.mark.parametrize("name", WHOLE)
def test_densenet121_equals_the_unconverted_model_in_float64(name):
    skip_unless_installed(name)
    shape = {"monai 2-D": (2, 1, 45, 67), "monai 3-D": (3, 1, 32, 32, 32)}.get(name, (2, 3, 45, 67))
    stock = randomise(DENSENET121[name]().double())
    model = densenet_fast.convert(stock, inplace=False)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert sum(row.fused for row in densenet_fast.explain(model)) == 8
    x = torch.randn(shape, dtype=torch.float64)
    assert_same(model, stock, x, 1e-9)
    assert_same(model.eval(), stock.eval(), x[:1], 1e-9)


@pytest.mark.library
def test_peak_memory_of_a_training_step_is_at_most_half():
    script = Path(__file__).parent / "peak_memory.py"
    # What is freed goes back to the system at once, so that the peak does not depend on what the C library keeps.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script]
    peaks = json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert list(peaks) == list(DENSENET121)
    for name, (stock, converted) in peaks.items():
        assert stock > 100e6 and converted <= 0.5 * stock, (name, stock, converted)


def test_float32_is_no_less_accurate_than_stock():
    stock = randomise(torchvision.models.DenseNet(**SMALL))
    model, exact = densenet_fast.convert(stock, inplace=False), copy.deepcopy(stock).double()
    assert {row.backend for row in densenet_fast.explain(model)} <= {"cpu", "aten", "triton"}
    x = torch.randn(8, 3, 64, 64)
    truth, theirs, mine = (dict(step(m, x.to(m.classifier.weight.dtype))) for m in (exact, stock, model))
    for name in ("output", "grad x"):
        assert error(mine[name], truth[name]) <= 2 * error(theirs[name], truth[name]), name
    names = [n for n, p in stock.named_parameters() if p.dim() > 1]
    total = [sum(error(v[f"grad {n}"], truth[f"grad {n}"]) for n in names) for v in (mine, theirs)]
    assert total[0] <= 2 * total[1]


@needs(timm, "timm")
def test_timm_grad_checkpointing_still_recomputes():
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.randn(2, 3, 64, 64))
        return sum(sizes)

    model = densenet_fast.convert(timm.DenseNet(**SMALL, bn_size=2))
    before = kept(model)
    model.set_grad_checkpointing(True)
    assert all(layer.grad_checkpointing for layer in model.features.denseblock2.values())
    assert all(row.fused for row in densenet_fast.explain(model))
    with_checkpoints = kept(model)
    model.set_grad_checkpointing(False)
    assert with_checkpoints < 0.95 * before and kept(model) == before


@needs(timm, "timm")
def test_timm_features_of_every_kind():
    timm_package = pytest.importorskip("timm")
    x = torch.randn(2, 3, 64, 64)
    model = randomise(timm.DenseNet(**SMALL)).eval()
    expected = model.forward_intermediates(x, intermediates_only=True)
    densenet_fast.convert(model)
    assert [f["num_chs"] for f in model.feature_info] == [e.shape[1] for e in expected]
    got = model.forward_intermediates(x, intermediates_only=True)
    assert all(error(a, b) < 1e-5 and a.stride() == b.stride() for a, b in zip(got, expected))
    early = model.forward_intermediates(x, indices=[2], stop_early=True, intermediates_only=True)
    assert error(early[0], expected[2]) < 1e-5
    only = timm_package.create_model("densenet121", features_only=True).eval()
    expected = only(x)
    densenet_fast.convert(only)
    assert sum(row.fused for row in densenet_fast.explain(only)) == 7
    assert all(error(a, b) < 1e-5 and a.stride() == b.stride() for a, b in zip(only(x), expected))
    assert only.feature_info.channels() == [e.shape[1] for e in expected]


@needs(timm, "timm")
def test_timm_parts_that_are_not_ours():
    from timm.layers import BlurPool2d

    model = timm.DenseNet(**SMALL, aa_layer=BlurPool2d, aa_stem_only=False)
    report = densenet_fast.explain(densenet_fast.convert(model))
    assert [row.fused for row in report] == [True, False] * 2 + [True]
    assert "left alone: pool is not a plain average over 2: BlurPool2d" in report[1].reason
    with pytest.raises(ValueError, match="denselayer1.norm1.act is a SiLU, not a ReLU"):
        densenet_fast.convert(timm.DenseNet(**SMALL, act_layer="silu"))


@needs(monai, "monai")
@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(norm="instance"), "denselayer1.layers.norm1 is a InstanceNorm2d"),
        (dict(norm=("group", {"num_groups": 4})), "denselayer1.layers.norm1 is a GroupNorm"),
        (dict(act="leakyrelu"), "denselayer1.layers.relu1 is a LeakyReLU"),
        (dict(act="prelu"), "denselayer1.layers.relu1 is a PReLU"),
    ],
)
def test_monai_norms_and_activations_that_are_not_ours(options, reason):
    model = monai_net(2, **options)
    with pytest.raises(ValueError, match=f"features.denseblock1 was left alone: {reason}.*features.transition1 was"):
        densenet_fast.convert(model)
    assert [row.kind for row in densenet_fast.explain(model)] == [
        "Stem",
        *["DenseBlock", "Transition"] * 2,
        "DenseBlock",
    ]


@needs(monai, "monai")
def test_monai_tensors_keep_their_class_and_their_data():
    meta = pytest.importorskip("monai.data")
    model = randomise(monai_net(2)).eval()
    x = meta.MetaTensor(torch.randn(2, 1, 70, 64), meta={"filename": "scan.nii"})
    expected = model(x)
    densenet_fast.convert(model)
    got = model(x)
    assert type(got) is type(expected) and got.meta == expected.meta and error(got, expected) < 1e-5
    block = model.features.denseblock1(model.features[:4](x))
    assert type(block) is meta.MetaTensor and block.meta["filename"] == "scan.nii"


def test_torchxrayvision_features_and_old_pickles():
    model = randomise(twins.XrayNet()).eval()
    x = torch.randn(2, 1, 70, 64)
    expected = model.features2(x)
    for module in model.modules():  # as pickled by a torch and a library that had none of these yet
        for name in ("_backward_pre_hooks", "_non_persistent_buffers_set", "_forward_hooks_with_kwargs", "op_threshs"):
            vars(module).pop(name, None)
        if isinstance(module, nn.Conv2d):
            del module.padding_mode
        module.__setstate__(vars(module).copy())
    densenet_fast.convert(model)
    assert len(densenet_fast.explain(model)) == 6 and all(row.fused for row in densenet_fast.explain(model))
    assert error(model.features2(x), expected) < 1e-5 and model(x).shape == (2, 5)


def test_lazy_modules_must_be_initialised_first():
    with pytest.raises(ValueError, match="got 0.0 that is lazy: call the model once first"):
        densenet_fast.convert(twins.book_net())
    assert not densenet_fast.explain(twins.book_net())[0].fused


def test_converting_imports_no_library():
    code = (
        "import sys, torch, densenet_fast; densenet_fast.convert(densenet_fast.reference.DenseNet(4, (2, 2), 8)); "
        "print([m for m in ('torchvision', 'timm', 'monai') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
