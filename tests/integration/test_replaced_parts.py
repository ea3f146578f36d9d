"""Whatever a user puts in place of a part, in train and eval mode, the result is stock's."""

import copy

import pytest
import torch
from integration.support import assert_close, images, pair
from torch import nn
from torch.nn.utils import prune

import densenet_fast
from helpers import step

LAYERS = [f"features.denseblock{b}.denselayer{i}" for b, i in ((1, 1), (2, 3))]
NORMS = ["features.norm0", "features.transition1.norm", "features.norm5"]
NORMS += [f"{layer}.norm{i}" for layer in LAYERS for i in (1, 2)]
RELUS = ["features.relu0", "features.transition1.relu", *(f"{layer}.relu{i}" for layer in LAYERS for i in (1, 2))]
CONVOLUTIONS = [
    "features.conv0",
    "features.transition1.conv",
    *(f"{layer}.conv{i}" for layer in LAYERS for i in (1, 2)),
]
POOLS = ["features.pool0", "features.transition1.pool"]
CONTAINERS = ["features", "features.denseblock1", "features.denseblock2", "features.transition1", *LAYERS]


class Wrapped(nn.Module):
    """Calls what it holds, under another name; knows none of its attributes."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args):
        return self.inner(*args)


class Doubled(Wrapped):
    def forward(self, *args):
        return 2 * self.inner(*args)


class ChannelsFirstLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def of_a_subclass(part):
    """The same module, of a class with a forward of its own."""
    part = copy.deepcopy(part)

    def forward(self, *args):
        return type(self).__base__.forward(self, *args) * 1.5

    part.__class__ = type(f"Own{type(part).__name__}", (type(part),), {"forward": forward})
    return part


def with_a_forward(part):
    """A copy with a forward of its own."""
    part = copy.deepcopy(part)
    part.forward = lambda *args: type(part).forward(part, *args) * 0.5
    return part


def convolution(part, **changes):
    same = dict(stride=part.stride, padding=part.padding, dilation=part.dilation, groups=part.groups, bias=False)
    return nn.Conv2d(part.in_channels, part.out_channels, part.kernel_size, **{**same, **changes})


def weight_normalised(part):
    return nn.utils.parametrizations.weight_norm(copy.deepcopy(part))


def pruned(part):
    return prune.random_unstructured(copy.deepcopy(part), "weight", 0.3)


OF_ANY_KIND = [Wrapped, Doubled, of_a_subclass, with_a_forward, lambda m: nn.Sequential(m, nn.Hardtanh())]
OF_NORMS = [
    lambda m: nn.GroupNorm(1, m.num_features),
    lambda m: ChannelsFirstLayerNorm(m.num_features),
    lambda m: nn.InstanceNorm2d(m.num_features),
    lambda m: nn.InstanceNorm2d(m.num_features, affine=True, track_running_stats=True),
    lambda m: nn.BatchNorm2d(m.num_features, track_running_stats=False),
    lambda m: nn.BatchNorm2d(m.num_features, affine=False, eps=0.1, momentum=None),
    lambda m: copy.deepcopy(m).eval(),
    lambda m: nn.Identity(),
]
OF_RELUS = [
    lambda m: nn.GELU(),
    lambda m: nn.LeakyReLU(0.1, inplace=True),
    lambda m: nn.Identity(),
    lambda m: nn.ReLU(),
]
OF_CONVOLUTIONS = [
    lambda m: convolution(m, bias=True),
    lambda m: convolution(m, padding_mode="circular"),
    lambda m: convolution(m, dilation=2, padding=m.kernel_size[0] // 2 * 2),
    lambda m: convolution(m, padding="same") if m.stride == (1, 1) else convolution(m),
    weight_normalised,
    pruned,
]
OF_POOLS = [
    lambda m: nn.MaxPool2d(m.kernel_size, m.stride, m.padding, ceil_mode=True),
    lambda m: nn.AvgPool2d(m.kernel_size, m.stride, m.padding, count_include_pad=False),
    lambda m: nn.MaxPool2d(3, 1, 1),
    lambda m: nn.Identity(),
]
CASES = [
    (names, make)
    for names, kinds in (
        (NORMS, OF_NORMS),
        (RELUS, OF_RELUS),
        (CONVOLUTIONS, OF_CONVOLUTIONS),
        (POOLS, OF_POOLS),
        (CONTAINERS, []),
    )
    for make in [*OF_ANY_KIND, *kinds]
]


def replaced(model, name, make):
    """A copy of the model, in its mode, with what ``make`` makes of its part ``name``."""
    model = copy.deepcopy(model)
    path, _, last = name.rpartition(".")
    holder = model.get_submodule(path)
    training = model.training
    torch.manual_seed(3)
    made = make(getattr(holder, last)).double()
    frozen = isinstance(made, nn.BatchNorm2d) and not made.training
    setattr(holder, last, made if frozen else made.train(training))
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_is_stocks_result(case, training):
    (names, make), x = CASES[case], images(2, 3, 24, 20)
    pairs = [pair(training=training, memory_efficient=memory_efficient) for memory_efficient in (False, True)]
    for i, name in enumerate(names):
        models = pairs[i % 2]
        results = [dict(step(replaced(model, name, make), x)) for model in models]
        assert_close(*results, name=name)
        densenet_fast.explain(replaced(models[0], name, make))
