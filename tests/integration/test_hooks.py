"""Hooks on any module, inside or outside the blocks, fire as often as in torchvision's, with the same values."""

import copy

import pytest
import torch
from integration.support import assert_close, images, pair
from torch import nn

import densenet_fast

TINY = dict(block_config=(2, 1), num_classes=3)
NAMES = [name for name, _ in pair(**TINY)[1].named_modules()]


def copied(values):
    """Tensors at the moment of a call, in whatever lists and tuples: a later ReLU may change them in place."""
    if isinstance(values, torch.Tensor):
        return values.detach().clone()
    return [copied(value) for value in values] if isinstance(values, (list, tuple)) else values


def forward(module, seen):
    module.register_forward_hook(lambda m, inputs, output: seen.append((copied(inputs), copied(output))))


def forward_with_keywords(module, seen):
    module.register_forward_hook(lambda m, inputs, kw, output: seen.append((copied(output), kw)), with_kwargs=True)


def forward_pre(module, seen):
    module.register_forward_pre_hook(lambda m, inputs: seen.append(copied(inputs)))


def full_backward(module, seen):
    module.register_full_backward_hook(lambda m, inputs, outputs: seen.append((copied(inputs), copied(outputs))))


def full_backward_pre(module, seen):
    module.register_full_backward_pre_hook(lambda m, outputs: seen.append(copied(outputs)))


def tensor_of_the_output(module, seen):
    def hook(module, inputs, output):
        output.register_hook(lambda g: seen.append(copied(g)))

    module.register_forward_hook(hook)


def replaced_output(module, seen):
    module.register_forward_hook(lambda m, i, output: (seen.append(copied(output)), output * 1.5)[1])


def run(model, x):
    """Output and gradients of a training step; None where stock's ReLU may not change a hooked output in place."""
    x = x.clone().requires_grad_()
    try:
        output = model(x)
        output.square().sum().backward()
    except RuntimeError as error:
        assert "being modified inplace" in str(error), error
        return None
    return output, x.grad, {name: p.grad for name, p in model.named_parameters()}


KINDS = [
    forward,
    forward_with_keywords,
    forward_pre,
    full_backward,
    full_backward_pre,
    tensor_of_the_output,
    replaced_output,
]


@pytest.mark.parametrize("register", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients:UserWarning")
def test_hooks_on_every_module(register):
    models, x, hooked = pair(**TINY), images(2, 3, 40, 40), 0
    for model in models:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # else stock refuses full backward hooks on it and on what it reads
    for name in NAMES:
        results = []
        for model in copy.deepcopy(models):
            seen = []
            register(model.get_submodule(name), seen)
            results.append((run(model, x), seen))
        got, expected = results
        if expected[0] is not None:
            assert expected[1], name
            assert_close(got, expected, name=name)
            hooked += 1
    assert hooked >= len(NAMES) - 2  # torchvision's own forward rectifies features, norm5's output, in place


def test_hooks_on_several_modules_at_once_fire_in_stocks_order():
    results, x = [], images(2, 3, 40, 40)
    for model in pair(**TINY):
        seen = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, i, name=name, seen=seen: seen.append(("before", name)))
            module.register_forward_hook(lambda m, i, o, name=name, seen=seen: seen.append(("after", name)))
        model(x)
        results.append(seen)
    assert results[0] == results[1] and len(results[0]) == 2 * len(NAMES)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_tensor_hooks_on_every_parameter(kind):
    results, x = [], images(2, 3, 40, 40)
    for model in pair(**TINY):
        seen = {}
        for name, parameter in model.named_parameters():
            seen[name] = []

            def hook(t, calls=seen[name]):
                calls.append(copied(t.grad if t.is_leaf and t.requires_grad else t))

            getattr(parameter, kind)(hook)
        value = run(model, x)
        assert {len(calls) for calls in seen.values()} == {1}
        results.append((value, seen))
    assert all(row.fused for row in densenet_fast.explain(pair(**TINY)[0]))
    assert_close(*results)


@pytest.mark.parametrize("name", ["relu0", "denseblock1", "denseblock1.denselayer2", "transition1", "norm5"])
def test_hooks_find_running_statistics_updated_so_far(name):
    """Also if the hook then ends the call."""
    x, results = images(2, 3, 40, 40), []
    for model in pair(**TINY):
        seen = []

        def end(module, inputs, model=model, seen=seen):
            seen.append({name: buffer.clone() for name, buffer in model.named_buffers()})
            raise KeyboardInterrupt

        model(x)
        model.features.get_submodule(name).register_forward_pre_hook(end)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        results.append((seen, dict(model.named_buffers())))
    assert_close(*results)


def test_a_hook_on_a_block_or_a_parameter_leaves_the_blocks_fused():
    model, _ = pair()
    for child in (model.features.denseblock1, model.features.transition1, model.features.conv0):
        forward(child, [])
        full_backward(child, [])
    model.features.denseblock1.denselayer1.conv1.weight.register_hook(lambda g: g)
    assert all(row.fused for row in densenet_fast.explain(model))


def test_hooks_for_all_modules_fire_as_often():
    counts, x = [], images(2, 3, 40, 40)
    for model in pair(**TINY):
        seen = []
        handles = [
            nn.modules.module.register_module_forward_pre_hook(lambda m, i, seen=seen: seen.append("pre")),
            nn.modules.module.register_module_forward_hook(lambda m, i, o, seen=seen: seen.append(tuple(o.shape))),
        ]
        try:
            model(x)
        finally:
            for handle in handles:
                handle.remove()
        counts.append(seen)
    assert counts[0] == counts[1] and counts[0].count("pre") == len(NAMES)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["features.denseblock4", "features.norm5"])
def test_grad_cam(name, training):
    """Selvaraju et al. 2017: the channels of a layer, weighted by the mean of the gradients of one class's score."""
    maps = []
    x = images(2, 3, 96, 64)
    for model in pair(block_config=(1, 1, 2, 2), training=training):
        kept = {}

        def keep(module, inputs, output, kept=kept):
            kept["activation"] = copied(output)
            output.register_hook(lambda g: kept.update(gradient=copied(g)))

        handle = model.get_submodule(name).register_forward_hook(keep)
        model(x)[:, 1].sum().backward()
        weights = kept["gradient"].mean((2, 3), keepdim=True)
        maps.append(torch.relu((weights * kept["activation"]).sum(1)))
        handle.remove()
    assert maps[1].norm() > 0
    assert_close(*maps)
