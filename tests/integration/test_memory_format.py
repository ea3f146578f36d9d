"""What a user calls, hooks or slices out has the memory format that stock would return, and so have gradients."""

import copy

import pytest
import torch
from integration.support import assert_close, images, pair
from torch import nn

from densenet_fast.functional import BatchNorm, BNReLUConv, bn_relu_conv1x1, bn_relu_conv1x1_avgpool, dense_block
from densenet_fast.nn import BNReLUConv1x1, DenseBlock, Transition

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
NAMES = [name for name, _ in pair()[1].named_modules() if name]


def strides(values):
    """Of all tensors in nested lists and tuples, with None for a dimension of one."""
    if isinstance(values, torch.Tensor):
        return [None if size == 1 else stride for size, stride in zip(values.shape, values.stride())]
    return [strides(value) for value in values] if isinstance(values, (list, tuple)) else None


def every_pair(**options):
    """Images and networks, contiguous and channels last, and images cut out of larger ones of both formats."""
    for weights in FORMATS.values():
        for format in FORMATS.values():
            models = [model.to(memory_format=weights) for model in pair(**options)]
            yield images().to(memory_format=format), models
            yield images(2, 3, 44, 40).to(memory_format=format)[:, :, 3:43, 2:38], models


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [True, False])
def test_of_what_hooks_see(at_once, dtype, training):
    """A hook on one module at a time, and on all."""
    for x, models in every_pair(dtype=dtype, training=training):
        for names in [NAMES] if at_once else [[name] for name in NAMES[::3]]:
            seen = [[], []]
            for model, calls in zip(copy.deepcopy(models), seen):
                for name in names:
                    model.get_submodule(name).register_forward_hook(
                        lambda m, i, o, calls=calls, name=name: calls.append((name, strides(i), strides(o)))
                    )
                model(x.to(dtype))
            assert seen[0] == seen[1]


@pytest.mark.parametrize("training", [True, False])
def test_of_every_part_called_alone(training):
    for x, models in every_pair(training=training):
        for format in FORMATS.values():
            for name, part in models[1].named_modules():
                norm = next((m for m in part.modules() if isinstance(m, nn.BatchNorm2d)), None)
                channels = 3 if name in ("", "features") or norm is None else norm.num_features
                if norm is None or name in ("features.norm0", ""):
                    continue
                size = x.shape[2:] if channels == 3 else (8, 6)
                given = images(2, 3 if name == "features" else channels, *size).to(memory_format=format)
                got = models[0].get_submodule(name)(given)
                expected = part(given)
                assert strides(got) == strides(expected), name
                assert_close(got, expected, name=name)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_of_children_in_a_sequential(format):
    """And ``view`` works on the result where it does on stock's."""
    results = []
    x = images().to(memory_format=format)
    for model in pair():
        children = list(model.features.children())
        chains = [nn.Sequential(*children), model.features[:5], model.features[3:-1], nn.Sequential(*children[4:7])]
        starts = [x, x, images(2, 6, 10, 9).mul(0).add(1).to(memory_format=format), images(2, 6, 9, 9).mul(0).add(2)]
        results.append([chain(start) for chain, start in zip(chains, starts)])
    assert strides(results[0]) == strides(results[1])
    assert_close(*results)
    if format is torch.contiguous_format:
        assert all(output.view(2, -1).dim() == 2 for output in results[0])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(
    "make",
    [lambda **o: DenseBlock(2, 6, 2, 4, **o), lambda **o: Transition(6, 4, **o), lambda **o: BNReLUConv1x1(6, 4, **o)],
)
def test_of_parts_in_one_to_three_dimensions(make, dims):
    module = make(spatial_dims=dims)
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims)
    for format in [torch.contiguous_format, *([last] if last else [])]:
        x = torch.randn(2, 6, *(6, 4, 5)[:dims]).to(memory_format=format).requires_grad_()
        output = module(x)
        assert output.is_contiguous(memory_format=format)
        (grad,) = torch.autograd.grad(output.square().sum(), x)
        assert grad.is_contiguous(memory_format=format) and not grad._is_view()


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_has_the_strides_of_what_it_is_of(create_graph):
    """Of the images and of every parameter; and none of a fused part is a view, which ``detach_`` refuses."""
    for x, (model, _) in every_pair():
        x = x.clone().requires_grad_()
        wanted = {"x": x, **dict(model.named_parameters())}
        loss = model(x).square().sum()
        gradients = torch.autograd.grad(loss, list(wanted.values()), create_graph=create_graph)
        for (name, tensor), gradient in zip(wanted.items(), gradients):
            assert strides(gradient) == strides(tensor), name
        if not create_graph:
            assert not any(
                gradient.detach_().requires_grad for gradient in gradients[:-2]
            )  # the classifier's is torch's


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_gradients_of_the_functions_have_the_strides_of_their_inputs(format):
    x = images(2, 6, 6, 4).to(memory_format=format).requires_grad_()
    norm = BatchNorm()
    narrow, wide = images(4, 6, 1, 1).requires_grad_(), images(3, 4, 3, 3).to(memory_format=format).requires_grad_()
    for output in (
        bn_relu_conv1x1(x, norm, narrow),
        bn_relu_conv1x1_avgpool(x, norm, narrow),
        dense_block(x, [[BNReLUConv(norm, narrow), BNReLUConv(norm, wide)]]),
    ):
        for create_graph in (False, True):
            inputs = [x, narrow, wide][: 3 if output.shape[1] == 9 else 2]
            gradients = torch.autograd.grad(output.sin().sum(), inputs, create_graph=create_graph, retain_graph=True)
            assert [strides(g) for g in gradients] == [strides(t) for t in inputs]


def test_gradients_that_tensor_hooks_see_can_be_detached_in_place():
    """A class activation map's clean-up does it (pytorch-grad-cam)."""
    for name, _ in pair()[0].features.named_children():
        kept, (model, _) = [], pair()

        def hook(module, inputs, output, kept=kept):
            output.register_hook(kept.append)

        model.features.get_submodule(name).register_forward_hook(hook)
        model(images()).sum().backward()
        assert kept and not any(g.detach_().requires_grad for g in kept), name
