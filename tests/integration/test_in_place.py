"""Consumers that change a result in place: stock's result or autograd's error, never silently another."""

import pytest
import torch
import torch.nn.functional as F
from integration.support import assert_close, images, pair

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
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_on_a_dense_block_raises_autograds_error(memory_efficient, change):
    model, _ = pair(memory_efficient=memory_efficient)
    for name in ("denseblock1", "denseblock2"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            through(model, images(), name, change)


@pytest.mark.parametrize("change", [c for n, c in CHANGES.items() if n != "detached"])
@pytest.mark.parametrize("name", ["pool0", "transition1", "norm5"])
def test_elsewhere_is_stocks_result(name, change):
    x = images()
    assert_close(*(through(model, x, name, change) for model in pair()))


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


def test_a_hook_that_changes_a_block_in_place_raises():
    model, _ = pair()
    model.features.denseblock1.register_forward_hook(lambda m, i, o: o.relu_())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(images()).sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_a_graph_it_is_stocks_result(mode):
    results = []
    for model, x in zip(pair(training=False), [images()] * 2):
        with mode():
            for child in model.features.children():
                x = child(x).mul_(0.9).relu_()
        results.append(x)
    assert_close(*results)


def test_compiled_it_is_right_or_raises_the_same_error():
    """Torch 2.11 copies what a graph changes in place and this op keeps, torch 2.13 refuses it."""
    torch.compiler.reset()
    module, x = DenseBlock(1, 6, 4, 4).double(), images(2, 6, 5, 4)
    gradients = []
    for run in (lambda x: module(x).relu(), torch.compile(lambda x: module(x).relu_(), backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        try:
            run(leaf).square().sum().backward()
        except RuntimeError as error:
            assert gradients and "modified by an inplace operation" in str(error), error
        else:
            gradients.append(leaf.grad)
    assert_close(gradients[-1], gradients[0])
    torch.compiler.reset()
