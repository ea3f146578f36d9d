"""Consumers that change a result in place: stock's result."""

import pytest
import torch
import torch.nn.functional as F
from integration.support import assert_close, images, pair
from torch import nn

from densenet_fast.nn import DenseBlock

CHANGES = {
    "relu_": lambda y: y.relu_(),
    "functional relu": lambda y: F.relu(y, inplace=True),
    "mul_": lambda y: y.mul_(2),
    "a slice": lambda y: (y[:, :3].zero_(), y)[1],
    "detached": lambda y: (y.detach().mul_(2), y)[1],
}


def through(model, x, name, change):
    for child_name, child in model.features.named_children():
        x = child(x)
        if child_name == name:
            x = change(x)
    x.square().mean().backward()
    return {key: p.grad for key, p in model.features.named_parameters()}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_on_the_output_of_a_part_is_stocks_result(memory_efficient, channels_last, change):
    x = images()
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    for name in ("pool0", "denseblock1", "transition1", "denseblock2", "norm5"):
        if not (change is CHANGES["detached"] and name == "norm5"):
            assert_close(*(through(m, x, name, change) for m in pair(memory_efficient=memory_efficient)), name=name)


@pytest.mark.parametrize("change", [lambda m, i, o: o.sin_(), lambda m, i, o: o.mul_(0.5)], ids=["sin_", "mul_"])
@pytest.mark.parametrize("name", ["conv0", "pool0", "denseblock1", "denseblock2", "transition1", "norm5"])
def test_in_a_hook_is_stocks_result(name, change):
    results, x = [], images()
    for model in pair():
        model.features.get_submodule(name).register_forward_hook(change)
        output = model(x)
        output.square().sum().backward()
        results.append((output, {n: p.grad for n, p in model.named_parameters()}))
    assert_close(*results)


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_in_place_module_behind_the_last_block_is_stocks_result(channels_last):
    results, x = [], images().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for model in pair():
        encoder = nn.Sequential(*list(model.features.children())[:-1], nn.ReLU(inplace=True))
        output = encoder(x)
        output.square().mean().backward()
        results.append((output, {n: p.grad for n, p in encoder.named_parameters()}))
    assert_close(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_relu_on_features_is_stocks_result(training, channels_last):
    """torchvision's own forward: ``F.relu(self.features(x), inplace=True)``."""
    x, results = images(), []
    for model in pair(training=training):
        leaf = x.to(memory_format=torch.channels_last) if channels_last else x.clone()
        output = F.relu(model.features(leaf.requires_grad_()), inplace=True)
        output.square().mean().backward()
        results.append((output, leaf.grad, {name: p.grad for name, p in model.features.named_parameters()}))
    assert_close(*results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph_it_is_stocks_result(mode):
    results = []
    for model, x in zip(pair(training=False), [images()] * 2):
        with mode():
            for child in model.features.children():
                x = child(x).mul_(0.9).relu_()
        results.append(x)
    assert_close(*results)


def test_compiled_it_is_right():
    torch.compiler.reset()
    module, x = DenseBlock(1, 6, 4, 4).double(), images(2, 6, 5, 4)
    gradients = []
    for run in (lambda x: module(x).relu(), torch.compile(lambda x: module(x).relu_(), backend="aot_eager")):
        for format in (torch.contiguous_format, torch.channels_last):
            leaf = x.clone(memory_format=format).requires_grad_()
            run(leaf).square().sum().backward()
            gradients.append(leaf.grad)
    for gradient in gradients[1:]:
        assert_close(gradient, gradients[0])
    torch.compiler.reset()
