"""Plans where something changes between their uses: none is ever stale. ``test_plan.py`` runs this file in Triton's
interpreter and with the emulated library."""

import threading

import pytest
import torch

from backends.plan.bodies import equal
from backends.plan.walks import BLOCK, block, compare, cotangent, gradients, maps, plans, tf32, training_step


@pytest.fixture(autouse=True)
def by_triton():
    with tf32():
        yield


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
    for p in model.parameters():
        p.data = p.data * 1.5


def changed_eps(model):
    model.denselayer1.norm2.eps = 0.1


def frozen(model):
    model.denselayer1.norm1.eval()


def fewer_gradients(model):
    model.denselayer1.norm1.requires_grad_(False)
    model.denselayer1.conv2.weight.requires_grad_(False)


def recomputed(model):
    model.memory_efficient = True


def test_a_model_that_changes():
    """Step by step; its plans stay only where nothing but addresses and values is another."""
    changes = [exchanged_storage, changed_eps, frozen, fewer_gradients, recomputed, torch.nn.Module.half]

    def history(model):
        made = [training_step(model, x)]
        for change in changes:
            change(model)
            made.append(training_step(model, x.to(model.denselayer1.conv1.weight.dtype)))
        return made

    x = maps()
    bodies = compare(block(), history)
    assert not bodies.walked and bodies.planned == 7 * BLOCK
    forward, backward = bodies.plans[::2], bodies.plans[1::2]
    assert [one is other for one, other in zip(forward, forward[1:])] == [True, False, False, True, False, False]
    assert [one is other for one, other in zip(backward, backward[1:])] == [True] + 5 * [False]


def test_other_sizes_between():
    x, y = maps(), maps(3)

    def history(model):
        return [made for t in (x, y, x) for made in training_step(model, t)]

    bodies = compare(block(), history)
    assert not bodies.walked and bodies.plans[:2] == bodies.plans[-2:] and len(set(bodies.plans)) == 4


def shifted(x):
    """On an address that 16 does not divide."""
    return torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


def test_inputs_of_other_strides_and_alignments():
    """Contiguous, a part of a wider one, misaligned, expanded: a plan for each."""
    inputs = [maps(), torch.randn(2, 7, 2, 3)[:, 1:6], shifted(maps()), maps()[:1].expand(2, 5, 2, 3)]

    def history(model):
        return [model(x) for x in inputs]

    with torch.no_grad():
        bodies = compare(block(), history)
    assert not bodies.walked and len(set(bodies.plans)) == len(inputs)


def test_incoming_gradients_of_other_strides():
    """Expanded, as of a sum; transposed; a part of a wider one; misaligned."""

    def history(model):
        out = model(x)
        grad = cotangent(out)
        incoming = [
            grad,
            grad[:1, :1, :1, :1].expand(grad.shape),
            grad.transpose(2, 3).contiguous().transpose(2, 3),
            torch.cat([grad, grad], 1).contiguous(memory_format=torch.channels_last)[:, 8:],
            shifted(grad),
        ]
        return [torch.autograd.grad(out, list(model.parameters()), g, retain_graph=True) for g in incoming]

    x = maps().contiguous(memory_format=torch.channels_last)
    bodies = compare(block(), history)
    assert not bodies.walked and bodies.planned == BLOCK[:1] + 5 * BLOCK[1:]


def test_a_parameter_of_two_layers():
    """Before that, one of each with the same shapes; the same plans serve."""

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
    assert not bodies.walked and len(bodies.plans) == 4 and len(set(bodies.plans)) == 2


def test_threads_with_one_model():
    model, inputs = block().eval(), [maps(), maps()]

    def step(x):
        out = model(x)
        return [out, *torch.autograd.grad(out, list(model.parameters()), cotangent(out))]

    expected, made = list(map(step, inputs)), {}
    with plans() as bodies:
        threads = [threading.Thread(target=lambda i=i: made.update({i: step(inputs[i])})) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(equal(made[i], expected[i]) for i in range(2))
    assert not bodies.walked and len(bodies.plans) == 4 and len(set(bodies.plans)) == 2
