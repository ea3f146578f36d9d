"""Every way to look at features shows what torchvision's network shows."""

import pytest
import torch
from integration.support import assert_close, images, pair
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import densenet_fast

LAST = ["features", "features.norm5"]


def kept_by_a_hook(name):
    def look(model, x):
        kept = []
        model.get_submodule(name).register_forward_hook(lambda m, i, o: kept.append((o, o.detach().clone())))
        return model(x), kept

    return look


def extracted(model, x):
    return create_feature_extractor(model, ["features.denseblock2", "features.norm5", "classifier"])(x)


def got_by_layers(model, x):
    layers = {"denseblock1": "one", "transition1": "two", "norm5": "last"}
    return dict(IntermediateLayerGetter(model.features, layers)(x))


WAYS = {**{f"a hook on {name}": kept_by_a_hook(name) for name in LAST}, "extracted": extracted, "layers": got_by_layers}
WAYS["called"] = lambda model, x: model.features(x)
WAYS["a slice"] = lambda model, x: model.features[:-1](x)
WAYS["keywords"] = lambda model, x: (model.features(input=x), model(x=x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("look", WAYS.values(), ids=WAYS)
def test_shows_the_same(look, channels_last, training):
    """What is kept is looked at after the forward pass, which rectifies norm5's output in place."""
    x = images().to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert_close(*(look(model, x) for model in pair(training=training)))


@pytest.mark.parametrize("name", LAST)
def test_class_activation_maps(name):
    """Grad-CAM weighs the kept activations by their gradients; Eigen-CAM takes their first principal component."""
    maps, x = [], images(2, 3, 64, 64)
    for model in pair(block_config=(2, 2, 3), training=False):
        kept = {}

        def keep(module, inputs, output, kept=kept):
            kept["activations"] = output
            output.register_hook(lambda g: kept.update(gradients=g))

        model.get_submodule(name).register_forward_hook(keep)
        model(x)[:, 2].sum().backward()
        activations = kept["activations"].detach()
        grad_cam = torch.relu((kept["gradients"].mean((2, 3), keepdim=True) * activations).sum(1))
        pixels = activations[0].flatten(1).T
        principal = torch.linalg.svd(pixels - pixels.mean(0), full_matrices=False)[2][0]
        maps.append((grad_cam, (pixels @ principal).abs()))
    assert_close(*maps)


@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_node_names_are_torchvisions_in_both_modes(drop_rate):
    ours, stock = pair()
    for model in (ours, stock):
        for module in model.modules():
            if hasattr(module, "drop_rate"):
                module.drop_rate = drop_rate
    assert get_graph_node_names(ours) == get_graph_node_names(stock)
    assert len(set(map(tuple, get_graph_node_names(ours)))) == 1


@pytest.mark.parametrize("part", ["features.denseblock1.denselayer2", "features.transition1", "features.denseblock1"])
def test_parts_take_torchvisions_arguments(part):
    results, x, wide = [], images(2, 6, 8, 6), images(2, 14, 8, 6)
    for model in pair():
        module = model.get_submodule(part)
        if "layer" in part:
            x10 = torch.cat([x, wide[:, :4]], 1)
            results.append([module(input=[x, wide[:, :4]]), module(x10), module.bn_function([x, wide[:, :4]])])
        elif "transition" in part:
            results.append([module(input=wide)])
        else:
            results.append([module(init_features=x)])
    assert_close(*results)


def test_a_hook_on_every_part_that_calls_view_or_writes(recwarn):
    """One after the other, on contiguous images."""
    names = [name for name, module in pair()[0].named_modules() if name.count(".") > 1 or name.startswith("features.")]
    for name in names:
        model, stock = pair(training=False)
        for network in (model, stock):
            network.get_submodule(name).register_forward_hook(lambda m, i, o: o.view(o.shape[0], -1).view(o.shape) * 2)
        x = images()
        assert_close(model(x), stock(x), name=name)
    assert densenet_fast.explain(pair()[0])[0].fused
