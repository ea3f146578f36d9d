"""Networks whose parts stand in Sequentials, as other libraries have them, and transitions of all kinds."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from conversion.staged import Activation
from densenet_fast import reference
from densenet_fast.nn import fusion

MEANS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}

# Units, transitions and stems around a module of normalisation, activation and convolution (pytorchcv).


class PreConv(nn.Module):
    def __init__(self, channels, out, kernel):
        super().__init__()
        self.bn, self.activ = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)

    def forward(self, x):
        return self.conv(self.activ(self.bn(x)))


class Unit(nn.Module):
    def __init__(self, channels, growth, rate=0.0):
        super().__init__()
        self.conv1, self.conv2 = PreConv(channels, 2 * growth, 1), PreConv(2 * growth, growth, 3)
        self.drops = rate != 0
        if self.drops:
            self.dropout = nn.Dropout(rate)

    def forward(self, x):
        new = self.conv2(self.conv1(x))
        return torch.cat((x, self.dropout(new) if self.drops else new), dim=1)


class Narrowing(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.conv, self.pool = PreConv(channels, out, 1), nn.AvgPool2d(2, 2, 0)

    def forward(self, x):
        return self.pool(self.conv(x))


class InitBlock(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 7, 2, 3, bias=False)
        self.bn, self.activ, self.pool = nn.BatchNorm2d(out), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        return self.pool(self.activ(self.bn(self.conv(x))))


class StagedNet(nn.Module):
    """Each stage is a Sequential that begins with its transition, or, if not ``first``, ends with it."""

    def __init__(self, growth=4, block_config=(2, 3), init=8, rate=0.0, first=True, classes=3):
        super().__init__()
        self.features, channels = nn.Sequential(OrderedDict(init_block=InitBlock(3, init))), init
        for i, layers in enumerate(block_config, start=1):
            stage = nn.Sequential()
            if first and i > 1:
                stage.add_module(f"trans{i}", Narrowing(channels, channels // 2))
                channels //= 2
            for j in range(layers):
                stage.add_module(f"unit{j + 1}", Unit(channels, growth, rate))
                channels += growth
            if not first and i < len(block_config):
                stage.add_module(f"trans{i}", Narrowing(channels, channels // 2))
                channels //= 2
            self.features.add_module(f"stage{i}", stage)
        self.features.add_module("post_activ", Activation(channels))
        self.output = nn.Linear(channels, classes)

    def forward(self, x):
        return self.output(self.features(x).mean((2, 3)))


# All in one Sequential.


class Concatenating(nn.Module):
    def __init__(self, channels, growth, dims=2, bottleneck=True):
        super().__init__()
        conv, norm = reference.CONVOLUTIONS[dims], reference.BATCH_NORMS[dims]
        parts = [norm(channels), nn.ReLU(), conv(channels, 2 * growth, 1)] if bottleneck else []
        read = 2 * growth if bottleneck else channels
        self.net = nn.Sequential(*parts, norm(read), nn.ReLU(), conv(read, growth, 3, padding=1))

    def forward(self, x):
        return torch.cat([x, self.net(x)], 1)


def flat(dims=2, growth=4, init=6, bottleneck=True, classes=3):
    """Stem, layers, transition, layers and head, without a module for any of them but the layers."""
    conv, norm = reference.CONVOLUTIONS[dims], reference.BATCH_NORMS[dims]
    layer = lambda channels: Concatenating(channels, growth, dims, bottleneck)  # noqa: E731
    stem = [conv(2, init, 5, 2, 2), norm(init), nn.ReLU(inplace=True), fusion.MAX_POOLS[dims](3, 2, 1)]
    c, down = init + 2 * growth, init + growth
    narrow = [norm(c), nn.ReLU(), conv(c, down, 1), reference.AVERAGE_POOLS[dims](2)]
    head = [norm(down + growth), nn.ReLU(), MEANS[dims](1), nn.Flatten(), nn.Linear(down + growth, classes)]
    return nn.Sequential(*stem, layer(init), layer(init + growth), *narrow, layer(down), *head)


# Transitions.


class Linear(nn.Module):
    """Without ReLU (weiaicunzai)."""

    def __init__(self, channels, out, dims=2, bias=False):
        super().__init__()
        self.down_sample = nn.Sequential(
            reference.BATCH_NORMS[dims](channels),
            reference.CONVOLUTIONS[dims](channels, out, 1, bias=bias),
            reference.AVERAGE_POOLS[dims](2, stride=2),
        )

    def forward(self, x):
        return self.down_sample(x)


class Dropping(nn.Module):
    """Functional dropout behind the convolution, and a functional pool (andreasveit), or another one, or none."""

    def __init__(self, channels, out, rate=0.3, pool=F.avg_pool2d, drop=F.dropout):
        super().__init__()
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, out, 1, bias=False)
        self.droprate, self.pool, self.drop = rate, pool, drop

    def forward(self, x):
        out = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            out = self.drop(out, p=self.droprate, training=self.training)
        return out if self.pool is None else self.pool(out, 2)


def down(channels, out, rate=0.2, kind=nn.Dropout2d, pool=None):
    """FC-DenseNet's transition down: dropout and a maximum behind the convolution."""
    parts = OrderedDict(norm=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True), conv=nn.Conv2d(channels, out, 1))
    parts |= dict(drop=kind(rate), maxpool=nn.MaxPool2d(2) if pool is None else pool)
    return nn.Sequential(parts)
