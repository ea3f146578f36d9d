"""``make clients``: networks of other libraries, as they are on PyPI, converted, beside themselves as they were.

In float64, with random weights; nothing is downloaded. ``requirements.txt`` has the versions.
"""

import copy
import importlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import monai.networks.blocks as monai_blocks
import monai.networks.nets as monai_nets
import pytest
import segmentation_models_pytorch as smp
import timm
import timm.layers
import torch
import torchvision
import torchxrayvision as xrv
from pytorchcv.models import condensenet, densenet_cifar, ibndensenet, peleenet, xdensenet
from pytorchcv.models import densenet as pytorchcv_densenet
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import densenet_fast
from clients import detectors
from helpers import assert_same, error, randomise

SMALL = dict(growth_rate=8, block_config=(2, 3, 2))
NOT_CALLED = "its network did not call it"


class Case(NamedTuple):
    """A network, the shape of its input, how many dense blocks and transitions of it run fused, and why others do
    not."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    blocks: int = 3
    transitions: int = 2
    reason: str = ""


class Joined(nn.Module):
    """All that a network makes, in one tensor."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return torch.cat([tensor.flatten() for tensor in tensors(self.network(x))])


def tensors(made):
    if isinstance(made, torch.Tensor):
        yield made
    else:
        for part in made.values() if isinstance(made, dict) else made:
            yield from tensors(part)


def images(size=64, channels=3, dims=2):
    return 4, channels, *[size] * dims


def own_torchvision(**options):
    return torchvision.models.DenseNet(**SMALL, **options)


def frozen_torchvision():
    return detectors.freeze(own_torchvision())


TORCHVISION = {
    "DenseNet": Case(own_torchvision, images()),
    "DenseNet drop": Case(lambda: own_torchvision(drop_rate=0.2), images()),
    "DenseNet frozen": Case(frozen_torchvision, images()),
    "densenet121": Case(lambda: torchvision.models.densenet121(), images(), 4, 3),
    "densenet161": Case(lambda: torchvision.models.densenet161(), images(), 4, 3),
    "densenet169": Case(lambda: torchvision.models.densenet169(), images(), 4, 3),
    "densenet201": Case(lambda: torchvision.models.densenet201(), images(), 4, 3),
    "IntermediateLayerGetter": Case(detectors.layer_getter, images()),
    "IntermediateLayerGetter frozen": Case(lambda: detectors.layer_getter(True), images()),
    "BackboneWithFPN frozen": Case(lambda: detectors.pyramid(True), images()),
    "RetinaNet frozen": Case(detectors.retinanet, images()),
    "FasterRCNN frozen": Case(detectors.faster_rcnn, images()),
}


def own_timm(**options):
    return timm.models.densenet.DenseNet(**SMALL, **options)


def layer_of(kind):
    """A timm network with its normalisations, with activations in them, replaced by ``kind``."""
    return lambda: kind(own_timm())


TIMM = {
    "DenseNet": Case(own_timm, images()),
    "DenseNet drop": Case(lambda: own_timm(proj_drop_rate=0.2, drop_rate=0.1), images()),
    "DenseNet deep stem": Case(lambda: own_timm(stem_type="deep_tiered"), images()),
    "DenseNet frozen": Case(layer_of(timm.layers.freeze_batch_norm_2d), images()),
    "DenseNet synchronised": Case(layer_of(timm.layers.convert_sync_batchnorm), images()),
    "DenseNet blurred": Case(
        lambda: own_timm(aa_layer=timm.layers.BlurPool2d, aa_stem_only=False), images(), 3, 0, "a plain average over 2"
    ),
    "densenet121": Case(lambda: timm.create_model("densenet121"), images(), 4, 3),
    "densenetblur121d": Case(lambda: timm.create_model("densenetblur121d"), images(), 4, 3),
    "densenet264d": Case(lambda: timm.create_model("densenet264d"), images(), 4, 3),
    "features_only": Case(lambda: timm.create_model("densenet121", features_only=True), images(), 4, 3),
    "features_only, two": Case(
        lambda: timm.create_model("densenet121", features_only=True, out_indices=(2, 3)), images()
    ),
}


def own_monai(dims, **options):
    return monai_nets.DenseNet(dims, 1, 3, 16, **SMALL, **options)


def given_layers():
    """MONAI's block of whatever layers it is given, with these a dense block's."""
    layers = [
        nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 8, 3, padding=1, bias=False)) for c in (12, 20, 28)
    ]
    return nn.Sequential(monai_blocks.DenseBlock(layers))


MONAI = {
    "1-D": Case(lambda: own_monai(1), images(90, 1, 1)),
    "2-D": Case(lambda: own_monai(2), images(64, 1)),
    "3-D": Case(lambda: own_monai(3), images(32, 1, 3)),
    "1-D drop": Case(lambda: own_monai(1, dropout_prob=0.2), images(90, 1, 1)),
    "2-D drop": Case(lambda: own_monai(2, dropout_prob=0.2), images(64, 1)),
    "3-D drop": Case(lambda: own_monai(3, dropout_prob=0.2), images(32, 1, 3)),
    "DenseNet121, 2-D": Case(lambda: monai_nets.DenseNet121(2, 3, 4), images(), 4, 3),
    "DenseNet121, 3-D": Case(lambda: monai_nets.DenseNet121(3, 1, 4), images(32, 1, 3), 4, 3),
    "DenseNet169, 2-D": Case(lambda: monai_nets.DenseNet169(2, 1, 4), images(64, 1), 4, 3),
    "DenseBlock of given layers": Case(given_layers, (2, 12, 9, 7), 1, 0),
}


def segmenter(kind, encoder="densenet121", **options):
    """Its skip features come from within transitions, whose parts it calls one by one."""
    left = dict(transitions=0, reason=NOT_CALLED) if not encoder.startswith("tu-") else dict(transitions=3)
    make = lambda: kind(encoder, encoder_weights=None, classes=2, **options)  # noqa: E731
    return Case(make, images(), options.get("encoder_depth", 5) - 1, **left)


def linknet(*arguments, **options):
    """Without the biases before its normalisations, whose gradient is zero but for rounding."""
    model = smp.Linknet(*arguments, **options)
    for module in model.decoder.modules():
        if isinstance(module, nn.ConvTranspose2d):
            module.bias.requires_grad_(False)
    return model


SEGMENTATION = {
    "Unet": segmenter(smp.Unet),
    "Unet scse": segmenter(smp.Unet, decoder_attention_type="scse"),
    "Unet with classes": segmenter(smp.Unet, aux_params=dict(classes=3, dropout=0.2)),
    "Unet densenet161": segmenter(smp.Unet, "densenet161"),
    "Unet densenet169": segmenter(smp.Unet, "densenet169"),
    "Unet densenet201": segmenter(smp.Unet, "densenet201"),
    "Unet of timm's": segmenter(smp.Unet, "tu-densenet121"),
    "UnetPlusPlus": segmenter(smp.UnetPlusPlus),
    "MAnet": segmenter(smp.MAnet),
    "Linknet": segmenter(linknet),
    "FPN": segmenter(smp.FPN),
    "PSPNet": segmenter(smp.PSPNet, encoder_depth=3),
    "UPerNet": segmenter(smp.UPerNet),
}


def jfhealthcare():
    """torchxrayvision's baseline of that name imports its parts by names of their own."""
    folder = str(Path(xrv.__file__).parent / "baseline_models/jfhealthcare")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("model.backbone.densenet").DenseNet(**SMALL, norm_type="BatchNorm")
    finally:
        sys.path.remove(folder)


def chexpert():
    model = importlib.import_module("torchxrayvision.baseline_models.chexpert.model")
    return model.DenseNet121([("one", 0), ("two", 1)], False, False)


XRAYVISION = {
    "DenseNet": Case(lambda: xrv.models.DenseNet(**SMALL), images(64, 1)),
    "DenseNet drop": Case(lambda: xrv.models.DenseNet(**SMALL, drop_rate=0.2), images(64, 1)),
    "DenseNet 121": Case(lambda: xrv.models.DenseNet(), images(64, 1), 4, 3),
    "jfhealthcare": Case(jfhealthcare, images()),
    "chexpert": Case(chexpert, images(), 4, 3),
}


CV_IMAGENET = dict(channels=[[24, 32], [24, 32, 40], [28, 36]], init_block_channels=16, num_classes=4)
"""The channels behind every layer of three blocks."""
PYTORCHCV = {
    "DenseNet": Case(lambda: pytorchcv_densenet.DenseNet(**CV_IMAGENET), images(112)),
    "DenseNet drop": Case(lambda: pytorchcv_densenet.DenseNet(**CV_IMAGENET, dropout_rate=0.2), images(112)),
    "densenet121": Case(lambda: pytorchcv_densenet.densenet121(), (2, 3, 224, 224), 4, 3),
    "IBN-DenseNet": Case(lambda: ibndensenet.IBNDenseNet(**CV_IMAGENET), images(112), 2, 2, "InstanceNorm2d"),
    "X-DenseNet": Case(lambda: xdensenet.XDenseNet(**CV_IMAGENET), images(112), 0, 2, "XConv2d"),
    "densenet40_k12_cifar10": Case(lambda: densenet_cifar.densenet40_k12_cifar10(), images(32)),
    "densenet40_k12_bc_cifar10": Case(lambda: densenet_cifar.densenet40_k12_bc_cifar10(), images(32)),
    "densenet100_k12_bc_cifar100": Case(lambda: densenet_cifar.densenet100_k12_bc_cifar100(), images(32)),
}
CASES = {
    f"{library}: {name}": case
    for library, cases in {
        "torchvision": TORCHVISION,
        "timm": TIMM,
        "MONAI": MONAI,
        "segmentation_models_pytorch": SEGMENTATION,
        "torchxrayvision": XRAYVISION,
        "pytorchcv": PYTORCHCV,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_unconverted_network(name):
    case = CASES[name]
    stock = randomise(Joined(case.make()).double())
    model = densenet_fast.convert(copy.deepcopy(stock))
    assert list(model.state_dict()) == list(stock.state_dict())
    x = torch.randn(case.shape, dtype=torch.float64)
    for training in (True, False):
        assert_same(model.train(training), stock.train(training), x, 1e-9)
    report = densenet_fast.explain(model)
    fused = Counter(row.kind for row in report if row.fused)
    assert (fused["DenseBlock"], fused["Transition"]) == (case.blocks, case.transitions), report
    assert all(row.last_call == "fused" for row in report if row.fused), report
    assert all(case.reason and case.reason in row.reason for row in report if not row.fused), report


LEFT_ALONE = {
    "MONAI HoVerNet": (
        lambda: monai_nets.HoVerNet(mode="fast", np_out_channels=2),
        "layers.conv2 is not a plain convolution of kernel size 3: groups=4",
    ),
    "MONAI DenseNet, instance norm": (lambda: own_monai(2, norm="instance"), "norm1 is a InstanceNorm2d"),
    "pytorchcv CondenseNet": (lambda: condensenet.condensenet74_c4_g4(), "conv1 has tensors of its own: index"),
    "pytorchcv X-DenseNet": (lambda: xdensenet.xdensenet121_2(), "conv1.conv is a XConv2d"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_no_such_block_is_left_alone_for_a_reason(name):
    make, reason = LEFT_ALONE[name]
    model = make()
    rows = [row for row in densenet_fast.explain(model) if row.kind == "DenseBlock"]
    assert rows and all(not row.fused and reason in row.reason for row in rows), rows


@pytest.mark.parametrize("make", [peleenet.peleenet, monai_nets.AHNet])
def test_a_network_without_such_blocks(make):
    """Layers that normalise behind their convolutions, or have four of them."""
    with pytest.raises(ValueError, match="found none in a (PeleeNet|AHNet)"):
        densenet_fast.convert(make())


def test_a_feature_extractor_is_made_of_the_converted_network():
    stock = randomise(own_torchvision()).double().eval()
    nodes = {"features.denseblock2": "low", "features.norm5": "high"}
    x = torch.randn(images(), dtype=torch.float64)
    extracted = create_feature_extractor(stock, nodes)
    expected = extracted(x)
    with pytest.raises(ValueError, match="before it is traced, with its blocks and transitions as leaf modules"):
        densenet_fast.convert(extracted)
    model = densenet_fast.convert(copy.deepcopy(stock))
    leaves = [type(model.features.denseblock1), type(model.features.transition1)]
    got = create_feature_extractor(model, nodes, tracer_kwargs=dict(leaf_modules=leaves))
    assert all(error(got(x)[name], value) < 1e-12 for name, value in expected.items())
    assert Counter(row.kind for row in densenet_fast.explain(got) if row.fused) == {"DenseBlock": 3, "Transition": 2}


def test_the_page_of_versions_names_these():
    page = (Path(densenet_fast.__file__).parents[1] / "docs/versions.md").read_text()
    pins = (Path(__file__).parent / "requirements.txt").read_text().split()
    for name, version in [pin.split("==") for pin in pins]:
        assert f"| {name} | {version} |" in page, name
