"""Whole networks and blocks by their plans against the same walked. ``test_plan.py`` runs this file in Triton's
interpreter and with the emulated library."""

import threading

import pytest
import torch
from torch import nn

from backends.plan.bodies import equal
from backends.plan.walks import FORWARD, compare, cotangent, gradients, plans, tf32, training_step
from densenet_fast import DenseNet, functional
from densenet_fast.nn import DenseBlock
from densenet_fast.ops import planned
from helpers import randomise

HALF = torch.float16


@pytest.fixture(autouse=True)
def by_triton():
    with tf32():
        yield


def network(**options):
    """Of two blocks, three layers in all, for images of 4 x 4."""
    return randomise(DenseNet(4, (2, 1), 6, 3, num_classes=3, **{"small_inputs": True, **options}))


def images(size=4, dtype=torch.float32, batch=2):
    return torch.randn(batch, 3, size, size).to(dtype)


def steps(x):
    return lambda model: training_step(model, x)


def both_passes(*stem):
    """The bodies of a training step."""
    names = [*stem, *FORWARD]
    return names + [f"{name}_backward" for name in reversed(names)]


def frozen_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def without_first_block(model):
    model.features.denseblock1.requires_grad_(False)
    return model


def without_one_parameter(model):
    model.features.denseblock1.denselayer2.norm2.weight.requires_grad_(False)
    return model


def channels_last(model):
    return model.to(memory_format=torch.channels_last)


NETWORKS = {
    "training": network,
    "statistics and first block frozen": lambda: without_first_block(network().eval()),
    "norms frozen in training, in float16": lambda: frozen_norms(network().half()),
    "weights channels_last, memory_efficient": lambda: channels_last(network(memory_efficient=True)),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_a_training_step(case):
    """Output, gradients and running statistics; every body is planned."""
    model = NETWORKS[case]()
    bodies = compare(model, steps(images(dtype=model.classifier.weight.dtype)))
    assert not bodies.walked and bodies.planned == both_passes()


def test_the_stem_of_large_images():
    model = without_one_parameter(network(small_inputs=False, memory_efficient=True).half())
    bodies = compare(model, steps(images(16, HALF).contiguous(memory_format=torch.channels_last)))
    assert not bodies.walked and bodies.planned == both_passes("bn_relu_maxpool")


def test_inference():
    model, x = network().eval(), images()
    with torch.no_grad():
        bodies = compare(model, lambda model: [model(x)])
    assert not bodies.walked and bodies.planned == FORWARD


def test_float32_parameters_under_autocast():
    def step(model):
        with torch.autocast("cpu", torch.float16):
            return training_step(model, images_)

    images_ = images()
    bodies = compare(network(), step)
    assert not bodies.walked and bodies.planned == both_passes()


def block(layers=1, **options):
    """A dense block of 5 channels, bottlenecks of 6 and 3 new channels a layer."""
    return randomise(DenseBlock(layers, 5, 2, 3, **options))


def maps(height=2, dtype=torch.float32):
    """What a block reads."""
    return torch.randn(2, 5, height, 3).to(dtype)


BLOCK = ["dense_block", "dense_block_backward"]


def test_biases():
    """Their gradients are sums by torch, so that backward pass is walked."""
    bodies = compare(block(bias=True), steps(maps()))
    assert bodies.planned == BLOCK[:1] and bodies.walked == [(BLOCK[1], "it calls aten.sum.dim_IntList")]


@pytest.mark.parametrize(
    "options, x, reasons",
    [
        ({"drop_rate": 0.5}, maps(), {"aten.copy_", "aten.mul.Tensor"}),
        ({"bn_size": None}, maps(), set()),
        ({"spatial_dims": 1}, torch.randn(2, 5, 3), set()),
        ({"spatial_dims": 3}, torch.randn(2, 5, 2, 2, 2), set()),
    ],
)
def test_what_is_walked(options, x, reasons):
    """What a plan cannot hold."""
    def history(model):
        torch.manual_seed(3)
        return training_step(model, x)

    model = randomise(DenseBlock(**{"num_layers": 1, "num_input_features": 5, "bn_size": 2, "growth_rate": 3, **options}))
    bodies = compare(model, history)
    print(options, bodies.planned, bodies.walked)


def test_float64_is_walked():
    bodies = compare(block().double(), steps(maps(dtype=torch.float64)))
    assert not bodies.planned and not bodies.walked
    with plans():
        block().double()(maps(dtype=torch.float64))
        assert "Triton's kernels do not serve torch.float64" in planned.last()


def test_statistics_of_several_processes_are_walked():
    pass
