"""Derivatives of every op beyond the second, and what every gradient looks like in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_fast import functional
from densenet_fast.functional import BNReLUConv
from densenet_fast.ops import op
from helpers import make_norm

CHANNELS = 3


def unit(channels, out, kernel, dims, dtype, memory_format, options):
    weight = torch.randn(out, channels, *[kernel] * dims, dtype=dtype) / channels**0.5
    weight = weight.contiguous(memory_format=memory_format).requires_grad_()
    norm = make_norm(channels, dtype=dtype, **options)
    if not norm.frozen:
        norm = norm._replace(running_mean=None, running_var=None, num_batches_tracked=None)
    return BNReLUConv(norm, weight, torch.randn(out, dtype=dtype).requires_grad_())


def make(kind, dims=2, dtype=torch.float64, memory_format=torch.contiguous_format, **options):
    """A function of x [N, 3, *spatial] and the parameters that it has."""

    def of(channels, out, kernel):
        return unit(channels, out, kernel, dims, dtype, memory_format, options)

    if kind in ("dense_block", "dense_block, recomputed"):
        layers = [(of(CHANNELS, 5, 1), of(5, 2, 3)), (of(CHANNELS + 2, 5, 1), of(5, 2, 3))]
        units = [u for layer in layers for u in layer]

        def run(x):
            return functional.dense_block(x, layers, memory_efficient=kind != "dense_block")
    elif kind in ("bn_relu_conv1x1", "bn_relu_conv1x1_avgpool"):
        units = [of(CHANNELS, 4, 1)]

        def run(x):
            return getattr(functional, kind)(x, *units[0])
    else:
        units = [of(CHANNELS, 1, 1)._replace(weight=None, bias=None)]

        def run(x):
            return getattr(functional, kind)(x, units[0].norm)

    return run, [t for u in units for t in (u.norm.weight, u.norm.bias, u.weight, u.bias) if t is not None]


KINDS = (
    "dense_block",
    "dense_block, recomputed",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_avgpool",
    "bn_relu_maxpool",
    "bn_relu_global_avgpool",
)
each = pytest.mark.parametrize("kind", KINDS)


@each
@pytest.mark.parametrize("options", [dict(), dict(training=False), dict(affine=False)], ids=str)
def test_third_derivatives(kind, options):
    """The first derivative's first two, with respect to x and the parameters, against finite differences."""
    run, parameters = make(kind, **options)
    x = torch.randn(2, CHANNELS, 3, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(run(x))

    def derivative(*inputs):
        return torch.autograd.grad(run(inputs[0]), inputs, cotangent, create_graph=True)

    assert torch.autograd.gradgradcheck(derivative, (x, *parameters), fast_mode=True)


class EveryGradient(TorchDispatchMode):
    """On CPUs, batch normalisation's backward pass returns what is not needed, too, as it does on GPUs."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.native_batch_norm_backward.default:
            args = (*args[:-1], [True] * 3)
        return func(*args, **(kwargs or {}))


@each
def test_second_derivative_where_every_gradient_comes(kind):
    with torch.device("cpu"):
        run, _ = make(kind, affine=False)
        x = torch.randn(2, CHANNELS, 3, 4, dtype=torch.float64, requires_grad=True)
        y = run(x)
        (first,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
        (expected,) = torch.autograd.grad(first, x, torch.ones_like(x), retain_graph=True)
        with EveryGradient():
            (got,) = torch.autograd.grad(first, x, torch.ones_like(x))
    assert got.equal(expected)


@each
def test_batched_cotangents_of_the_second_derivative(kind):
    run, parameters = make(kind)
    x = torch.randn(2, CHANNELS, 3, 4, dtype=torch.float64, requires_grad=True)
    y = run(x)
    (first,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    cotangents = torch.randn(3, *first.shape, dtype=first.dtype)
    batched = torch.autograd.grad(first, parameters[:2], cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        alone = torch.autograd.grad(first, parameters[:2], cotangent, retain_graph=True)
        for got, expected in zip(batched, alone, strict=True):
            assert torch.allclose(got[i], expected, rtol=1e-9)


@each
@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "differentiable"])
@pytest.mark.parametrize("dispatcher", [False, True], ids=["direct", "dispatcher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_lie_in_memory_as_what_they_are_of(kind, dtype, dispatcher, create_graph, monkeypatch):
    """With the strides of their tensor, and as no views, which a hook could not detach in place."""
    if dispatcher:
        monkeypatch.setattr(op, "seen_by_dispatcher", lambda inputs: True)
    for dims, memory_format in ((2, torch.contiguous_format), (2, torch.channels_last), (1, torch.contiguous_format)):
        run, parameters = make(kind, dims, dtype, memory_format)
        x = torch.randn(2, CHANNELS, *(6, 4)[:dims], dtype=dtype)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        y = run(x)
        first = torch.autograd.grad(y, (x, *parameters), torch.randn_like(y), create_graph=create_graph)
        found = [*zip(parameters, first[1:], strict=True)]
        if create_graph:
            energy = sum(g.square().sum() for g in first)
            x_twice, *second = torch.autograd.grad(energy, (x, *parameters), allow_unused=True)
            assert not x_twice._is_view()
            found += [(t, g) for t, g in zip(parameters, second, strict=True) if g is not None]
        assert not first[0]._is_view()
        for t, g in found:
            assert g.stride() == t.stride() and not g._is_view(), (t.shape, t.stride(), g.stride(), g._is_view())
