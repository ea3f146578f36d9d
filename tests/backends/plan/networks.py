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
from densenet_fast.ops import bn_relu_global_avgpool as ops_head
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


@pytest.mark.parametrize(
    "options, shape, walked",
    [
        ({"drop_rate": 0.5}, (2, 3), {"dense_block_backward": "aten.mul.Tensor"}),
        ({"bn_size": None}, (2, 3), {"dense_block_backward": "aten.add.out"}),
        ({"bias": True}, (2, 3), {"dense_block_backward": "aten.sum.dim_IntList"}),
        ({"spatial_dims": 1}, (6,), {name: "aten.convolution" for name in BLOCK}),
        ({"spatial_dims": 3}, (2, 1, 3), {name: "aten.convolution" for name in BLOCK}),
    ],
)
def test_what_is_walked(options, shape, walked):
    """What a plan cannot hold: torch's own kernels. The rest of the block is planned."""

    def history(model):
        torch.manual_seed(3)
        return training_step(model, x)

    x = torch.randn(2, 5, *shape)
    bodies = compare(block(**options), history)
    assert sorted([*bodies.planned, *(name for name, _ in bodies.walked)]) == BLOCK
    assert len(bodies.walked) == len(walked)
    for name, reason in bodies.walked:
        assert walked[name] in reason


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
        norm, x = functional.BatchNorm(torch.randn(5), torch.randn(5)), maps()
        name = torch.distributed.group.WORLD.group_name
        inputs = (x, None, None, [*norm.stage()[:6]], [1e-5], name)
        with plans() as bodies:
            ops_head._forward(*inputs)
        assert [name for name, _ in bodies.walked] == ["bn_relu_global_avgpool"]
        print(bodies.walked)
    finally:
        torch.distributed.destroy_process_group()


# Never stale


def test_two_forward_passes_before_a_backward_pass():
    x, y = maps(), maps()

    def history(model):
        outputs = [model(t) for t in (x, y)]
        made = []
        for out in outputs:
            out.backward(cotangent(out))
            made += [out, *gradients(model)]
        return made

    bodies = compare(block(), history)
    assert not bodies.walked and bodies.planned == [BLOCK[0], BLOCK[0], BLOCK[1], BLOCK[1]]
    assert len(set(bodies.plans)) == 2


def test_two_backward_passes():
    def history(model):
        out = model(maps_)
        for seed in (1, 2):
            out.backward(cotangent(out, seed), retain_graph=True)
        return [out, *gradients(model)]

    maps_ = maps()
    bodies = compare(block(), history)
    assert not bodies.walked and bodies.planned == [BLOCK[0], BLOCK[1], BLOCK[1]]


def test_a_second_derivative():
    """By stock torch, from what a planned forward pass saved."""

    def history(model):
        x = maps_.clone().requires_grad_()
        out = model(x)
        (grad,) = torch.autograd.grad(out, x, cotangent(out), create_graph=True)
        grad.square().sum().backward()
        return [out, grad, *gradients(model, x)]

    maps_ = maps()
    bodies = compare(block(), history)
    assert not bodies.walked and bodies.planned == BLOCK[:1]


def exchanged_storage(model):
    """Of every parameter."""
    for p in model.parameters():
        p.data = p.data * 1.5


def changed_eps(model):
    model.denselayer1.norm2.eps = 0.1


def frozen(model):
    model.denselayer1.norm1.eval()


def fewer_gradients(model):
    model.denselayer1.norm1.requires_grad_(False)
    model.denselayer1.conv2.weight.requires_grad_(False)


def unlike_strides(model):
    model.denselayer1.conv2.weight.data = model.denselayer1.conv2.weight.data.transpose(2, 3)


def recomputed(model):
    model.memory_efficient = True


@pytest.mark.parametrize(
    "change, equal_plans",
    [(exchanged_storage, True)]
    + [(change, False) for change in (changed_eps, frozen, fewer_gradients, unlike_strides, recomputed)],
)
def test_a_model_that_changes(change, equal_plans):
    """Between two steps; its plans stay only where nothing but addresses and values is another."""

    def history(model):
        made = training_step(model, x)
        change(model)
        return made + training_step(model, x)

    x = maps()
    bodies = compare(block(), history)
    assert not bodies.walked and bodies.planned == 2 * BLOCK
    assert (bodies.plans[:2] == bodies.plans[2:]) == equal_plans


def test_a_model_made_half():
    def history(model):
        return training_step(model, x) + training_step(model.half(), x.half())

    x = maps()
    bodies = compare(block(), history)
    assert not bodies.walked and len(set(bodies.plans)) == 4


def test_other_sizes_between():
    x, y = maps(), maps(3)

    def history(model):
        return [made for t in (x, y, x[:1], x) for made in training_step(model, t)]

    bodies = compare(block(), history)
    assert not bodies.walked and bodies.plans[:2] == bodies.plans[-2:] and len(set(bodies.plans)) == 6


def shifted(x):
    """On an address that 16 does not divide."""
    return torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def test_inputs_of_other_strides_and_alignments():
    wide = torch.randn(2, 7, 2, 3)
    inputs = [
        maps(),
        wide[:, 1:6],
        maps().contiguous(memory_format=torch.channels_last),
        shifted(maps()),
        maps()[..., :2].expand(2, 5, 2, 2),
    ]
    inputs.append(maps()[:1].expand(2, 5, 2, 3))

    def history(model):
        made = []
        for x in inputs:
            out = model(x)
            out.backward(cotangent(out))
            made += [out, *gradients(model)]
        return made

    bodies = compare(block(), history)
    print(bodies.walked, len(set(bodies.plans)))
    assert not bodies.walked


@pytest.mark.parametrize(
    "incoming",
    [
        lambda g: g[:1, :1, :1, :1].expand(g.shape),
        lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
        lambda g: torch.cat([g, g], 1).contiguous(memory_format=torch.channels_last)[:, 8:],
        lambda g: shifted(g),
    ],
)
def test_incoming_gradients_of_other_strides(incoming):
    """Expanded, as of a sum; of contiguous memory with other strides; a part of a wider one; misaligned."""

    def history(model):
        made = []
        for change in (lambda g: g, incoming):
            out = model(x)
            out.backward(change(cotangent(out)))
            made += [out, *gradients(model)]
        return made

    x = maps()
    bodies = compare(block(), history)
    print(bodies.walked, len(set(bodies.plans)))
    assert not bodies.walked


def test_a_parameter_of_two_layers():
    """Before that, one of each with the same shapes: a plan knows which of its tensors are the same."""

    def share(model):
        first, second = model.denselayer1, model.denselayer2
        second.norm2.weight = first.norm2.weight
        second.conv2.weight = first.conv2.weight

    def history(model):
        made = training_step(model, x)
        share(model)
        return made + training_step(model, x)

    x = maps()
    bodies = compare(block(2), history)
    assert not bodies.walked and len(set(bodies.plans)) == 4


def test_threads_with_one_model():
    model, inputs = block().eval(), [maps(), maps(), maps(3)]

    def step(x):
        out = model(x)
        return [out, *torch.autograd.grad(out, list(model.parameters()), cotangent(out))]

    expected, made = list(map(step, inputs)), {}
    with plans() as bodies:
        threads = [threading.Thread(target=lambda i=i: made.update({i: step(inputs[i])})) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(equal(made[i], expected[i]) for i in range(3))
    assert not bodies.walked and len(bodies.plans) == 6 and len(set(bodies.plans)) == 4
