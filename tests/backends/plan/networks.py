"""Whole networks and blocks by their plans against the same walked. ``test_plan.py`` runs this file in Triton's
interpreter and with the emulated library."""

import pytest
import torch
from torch import nn

from backends.plan.bodies import equal
from backends.plan.walks import (
    BLOCK,
    FORWARD,
    block,
    both_passes,
    compare,
    cotangent,
    images,
    maps,
    network,
    plans,
    steps,
    tf32,
    training_step,
)
from densenet_fast import functional
from densenet_fast.operands import BlockOperands
from densenet_fast.ops import planned
from densenet_fast.ops.bn_relu_global_avgpool import _forward as head

HALF = torch.float16


@pytest.fixture(autouse=True)
def by_triton():
    with tf32():
        yield


def frozen_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def without_first_block(model):
    model.features.denseblock1.requires_grad_(False)
    return model


def without_one_parameter(model):
    model.features.denseblock1.denselayer1.norm2.weight.requires_grad_(False)
    return model


NETWORKS = {
    "training": lambda: network(2),
    "statistics and first block frozen": lambda: without_first_block(network().eval()),
    "norms frozen in training, in float16": lambda: frozen_norms(network().half()),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_a_training_step(case):
    """Output, gradients and running statistics; every body is planned."""
    model = NETWORKS[case]()
    bodies = compare(model, steps(images(dtype=model.classifier.weight.dtype)))
    assert not bodies.walked and bodies.planned == both_passes(FORWARD)


def test_the_stem_of_large_images():
    model = without_one_parameter(network(2, small_inputs=False, memory_efficient=True).half())
    bodies = compare(model, steps(images(16, HALF).contiguous(memory_format=torch.channels_last)))
    assert not bodies.walked and bodies.planned == both_passes(FORWARD, "bn_relu_maxpool")


def test_inference():
    model, x = network().eval(), images()
    with torch.no_grad():
        bodies = compare(model, lambda model: [model(x)])
    assert not bodies.walked and bodies.planned == FORWARD


def test_float32_parameters_under_autocast():
    """Channels last."""

    def step(model):
        with torch.autocast("cpu", torch.float16):
            return training_step(model, images_)

    images_ = images()
    bodies = compare(network().to(memory_format=torch.channels_last), step)
    assert not bodies.walked and bodies.planned == both_passes(FORWARD)


def test_dropout_is_planned():
    """Of new features, and of what both convolutions of a layer make, with bottlenecks kept or recomputed."""

    def history(operands):
        torch.manual_seed(3)
        x_ = x.clone().requires_grad_()
        out = functional.dense_block(x_, operands.layers, operands.drop_rates, operands.recomputed)
        wanted = [x_, *(t for t in operands.stages.tensors if t is not None and t.requires_grad)]
        return [out, *torch.autograd.grad(out, wanted, cotangent(out))]

    x, model = maps(), block(2)
    for rates in ([0.5, 0.0], [0.5, 0.2, 0.0, 0.3]):
        for recomputed in (False, True):
            operands = BlockOperands(model.operands().layers, rates, recomputed)
            expected = history(operands)
            with plans() as bodies:
                made = history(operands)
            assert all(map(equal, made, expected)) and not bodies.walked and bodies.planned == BLOCK


@pytest.mark.parametrize(
    "options, shape, forward, backward",
    [
        ({"bn_size": None}, (2, 3), None, "aten.add.out"),
        ({"bias": True}, (2, 3), None, "aten.sum.dim_IntList"),
        ({"spatial_dims": 1}, (6,), "aten.convolution.default", "aten.sub.Tensor"),
        ({"spatial_dims": 3}, (2, 1, 3), "aten.convolution.default", "aten.sub.Tensor"),
    ],
)
def test_what_is_walked(options, shape, forward, backward):
    """What a plan cannot hold: torch's own kernels. The rest of the block is planned."""

    def history(model):
        torch.manual_seed(3)
        return training_step(model, x)

    x = torch.randn(2, 5, *shape)
    bodies = compare(block(**options), history)
    reasons = zip(BLOCK, (forward, backward))
    assert bodies.walked == [(name, f"it calls {reason}") for name, reason in reasons if reason]
    assert len(bodies.planned) == (forward is None)


def test_float64_is_walked():
    x = maps(dtype=torch.float64)
    bodies = compare(block().double(), steps(x))
    assert not bodies.planned and not bodies.walked
    with plans():
        block().double()(x)
        assert "Triton's kernels do not serve torch.float64" in planned.last()


def test_statistics_of_several_processes_are_walked(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        norm, x = (
            functional.BatchNorm(torch.randn(5), torch.randn(5)),
            maps().contiguous(memory_format=torch.channels_last),
        )
        name = torch.distributed.group.WORLD.group_name
        inputs = (x, None, None, [*norm.stage()[:6]], [1e-5], name)
        with plans() as bodies:
            head(*inputs)
        assert bodies.walked == [("bn_relu_global_avgpool", "it calls aten.new_full.default")]
    finally:
        torch.distributed.destroy_process_group()
