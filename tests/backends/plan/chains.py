"""A dense block and what reads it as one call, against the two by themselves. ``test_plan.py`` runs this file in
Triton's interpreter and with the emulated library."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from backends.plan.walks import (
    APART,
    FORWARD,
    both_passes,
    compare,
    gradients,
    images,
    network,
    plans,
    steps,
    tf32,
    training_step,
)
from conversion import twins, twins_blocks
from densenet_fast import convert, reference
from densenet_fast.backends import plan
from densenet_fast.backends.triton import launch
from densenet_fast.nn import Transition
from densenet_fast.ops import ahead, planned
from densenet_fast.ops.chain import HEAD, TRANSITION
from helpers import error, randomise


@pytest.fixture(autouse=True)
def by_triton():
    with tf32():
        yield


def apart():
    """Where hooks look at what is saved, which those of checkpointing count, two calls stay two."""
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def frozen(model, *parts):
    """Parameters, by the beginnings of their names."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(parts))
    return model


def prepending(model):
    """With new features before the others in the first block."""
    model.features.denseblock1.prepend = True
    return model


def normalised_as_ever(model, part):
    model.get_submodule(part).eval()
    return model


NETWORKS = {
    "recomputed": lambda: network(2, memory_efficient=True),
    "new features first": lambda: prepending(network(2)),
    "some readers' parameters": lambda: frozen(network(), "features.transition1.norm.weight", "features.norm5.bias"),
    "no reader's parameter": lambda: frozen(network(), "features.transition1", "features.norm5"),
    "the reader's alone": lambda: frozen(network(), "features.conv0", "features.denseblock1"),
    "the transition by running statistics": lambda: normalised_as_ever(network(), "features.transition1.norm"),
    "the head by running statistics": lambda: normalised_as_ever(network(), "features.norm5"),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_a_training_step(case):
    """Output, gradients and running statistics; every body is planned."""
    bodies = compare(NETWORKS[case](), steps(images()))
    assert not bodies.walked and bodies.planned == both_passes(FORWARD)


def test_of_a_converted_network():
    """Its head is in its own forward."""
    model = randomise(reference.DenseNet(4, (2, 1), 6, 3, num_classes=3, small_inputs=True))
    bodies = compare(convert(model), steps(images()))
    assert not bodies.walked and bodies.planned == both_passes(["dense_block, bn_relu_conv1x1", "dense_block"])


def test_not_of_a_block_that_returns_its_new_features_alone():
    """What reads it does not read the block's input."""
    parts = twins_blocks.PathBlock(2, 3, 4), twins.Transition(8, 5)
    bodies = compare(convert(randomise(torch.nn.Sequential(*parts)).eval()), steps(images()))
    assert bodies.planned[:2] == ["dense_block", "bn_relu_conv1x1"]


@pytest.mark.parametrize("parts", [("features.conv0",), ("features.conv0", "features.denseblock1")], ids=" ".join)
def test_without_a_gradient_before_the_block_or_the_reader(parts):
    model, x = frozen(network(), *parts), images()

    def history(model):
        model(x).sum().backward()
        return gradients(model)

    bodies = compare(model, history)
    assert not bodies.walked and bodies.planned == both_passes(FORWARD)


def test_the_two_make_what_one_makes():
    """With a gradient that is a batch's, and with second derivatives, too, of which sums differ in order alone."""
    model, images_ = prepending(network(2)).eval(), images()

    def made(how):
        with how, plans() as bodies:
            ours, x = copy.deepcopy(model), images_.clone().requires_grad_()
            first_step = training_step(ours, images_)
            out = ours(x)
            cotangents = torch.eye(out.numel()).view(-1, *out.shape)
            batch = torch.autograd.grad(out, x, cotangents, retain_graph=True, is_grads_batched=True)
            inputs = [x, *ours.parameters()]
            first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        return first_step, [*batch, *first, *second], bodies

    step, derivatives, bodies = made(contextlib.nullcontext())
    step_apart, derivatives_apart, bodies_apart = made(apart())
    assert {*FORWARD} <= {*bodies.planned} and {*APART} <= {*bodies_apart.planned}
    assert not {*FORWARD} & {*bodies_apart.planned}
    assert all(a is b is None or a.equal(b) for a, b in zip(step, step_apart, strict=True))
    assert all(error(a, b) < 1e-4 for a, b in zip(derivatives, derivatives_apart, strict=True))


def test_checkpointed():
    def history(model):
        x = images_.clone().requires_grad_()
        for _ in range(2):
            checkpoint(model, x, use_reentrant=False).sum().backward()
        return gradients(model, x)

    images_ = images()
    bodies = compare(network(), history)
    assert not bodies.walked and not {*FORWARD} & {*bodies.planned}


def test_dropout_is_not_drawn_within_a_call():
    def history(model):
        torch.manual_seed(3)
        return training_step(model, x)

    x = images()
    bodies = compare(network(drop_rate=0.5), history)
    assert bodies.planned[: len(APART)] == APART


def test_a_hook_between_the_two():
    """Sees the features, and may change what comes after it."""

    def history(model):
        seen = []
        model.features.transition1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
        return [*training_step(model, x), *seen]

    x = images()
    bodies = compare(network(), history)
    assert bodies.planned[:3] == [name for name in APART if name != "bn_relu_conv1x1"]


def test_another_reader():
    """Runs the next time; of the one that was, nothing is kept."""
    x, kept = images(), []
    torch.manual_seed(1)
    other = randomise(Transition(10, 5))

    def history(model):
        found = [model(x)]
        kept.append(weakref.ref(model.features.transition1.conv.weight))
        model.features.transition1 = copy.deepcopy(other).eval()
        return [*found, model(x)]

    with torch.no_grad():
        bodies = compare(network().eval(), history)
    assert bodies.planned == FORWARD + FORWARD
    gc.collect()
    assert len(kept) == 2 and not any(reference() is not None for reference in kept)


def test_kernels_are_compiled_ahead(monkeypatch):
    """All that a training step and an inference launch, where they are walked, as first calls are."""
    compiled, ran = [], []
    monkeypatch.setattr(planned, "DEVICE", "cpu")
    monkeypatch.setattr(plan, "run", lambda *_: plan.FIRST)
    monkeypatch.setattr(ahead, "DEVICE", "cpu")
    monkeypatch.setattr(ahead, "_compiled_kinds", set())
    monkeypatch.setattr(launch, "compile_all", lambda items, device: compiled.extend(items))
    monkeypatch.setattr(launch, "run", ran.append)
    model = network()
    model(images()).sum().backward()
    with torch.no_grad():
        model.eval()(images())
    assert {name for name, *_ in ahead._compiled_kinds} == {TRANSITION, HEAD}
    assert ran and {item.variant for item in ran} <= {item.variant for item in compiled}


def test_a_reader_of_another_width_is_refused():
    model = network().eval()
    model.features.transition1 = Transition(11, 5).eval()
    with plans(), pytest.raises(RuntimeError, match="x: expected 11 channels, as the first weight has, got 10"):
        model(images())
