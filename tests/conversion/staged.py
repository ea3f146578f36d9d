"""DenseNets in the styles of libraries, for large images: a stage holds a transition and layers, layers stand in one
Sequential without blocks, normalisations are frozen, layers drop channels or are checkpointed."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from conversion.small_images import CLASSES, NeckUnit, conv1x1, conv3x3, plan

# The transition comes first in a stage, its layers behind it; normalisation, ReLU and convolution are a module.


class PreConvolution(nn.Module):
    def __init__(self, channels, conv):
        super().__init__()
        self.bn, self.activ, self.conv = nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv

    def forward(self, x):
        return self.conv(self.activ(self.bn(x)))


class NestedUnit(nn.Module):
    def __init__(self, channels, growth, rate):
        super().__init__()
        self.conv1 = PreConvolution(channels, conv1x1(channels, 4 * growth))
        self.conv2 = PreConvolution(4 * growth, conv3x3(4 * growth, growth))
        self.dropout = nn.Dropout(p=rate) if rate else None

    def forward(self, x):
        new = self.conv2(self.conv1(x))
        if self.dropout is not None:
            new = self.dropout(new)
        return torch.cat((x, new), dim=1)


class NestedTransition(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.conv, self.pool = PreConvolution(channels, conv1x1(channels, out)), nn.AvgPool2d(2, stride=2)

    def forward(self, x):
        return self.pool(self.conv(x))


class InitBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(channels)
        self.activ, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)

    def forward(self, x):
        return self.pool(self.activ(self.bn(self.conv(x))))


class Activation(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bn, self.activ = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.activ(self.bn(x))


class StagedNet(nn.Module):
    def __init__(self, growth, layers, size, rate=0.0, small=False):
        super().__init__()
        stem = conv3x3(3, 2 * growth) if small else InitBlock(2 * growth)
        self.features = nn.Sequential(OrderedDict(init_block=stem))
        above = None
        for i, (reads, channels) in enumerate(plan(2 * growth, growth, layers), start=1):
            stage = nn.Sequential()
            if above is not None:
                stage.add_module(f"trans{i}", NestedTransition(above, reads[0]))
            for j, c in enumerate(reads, start=1):
                stage.add_module(f"unit{j}", NestedUnit(c, growth, rate))
            self.features.add_module(f"stage{i}", stage)
            above = channels
        self.features.add_module("post_activ", Activation(channels))
        pool = (size if small else size // 4) >> len(layers) - 1
        self.features.add_module("final_pool", nn.AvgPool2d(kernel_size=pool, stride=1))
        self.output = nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.features(x)
        return self.output(x.view(x.size(0), -1))


# The transition stands behind the units, in one Sequential with them.


class TailNet(nn.Module):
    def __init__(self, growth, layers, size):
        super().__init__()
        self.stem, self.stages = conv3x3(3, 2 * growth), nn.ModuleList()
        for i, (reads, channels) in enumerate(plan(2 * growth, growth, layers), start=1):
            stage = [NeckUnit(c, growth) for c in reads]
            if i < len(layers):
                pool = nn.AvgPool2d(2)
                norm, conv = nn.BatchNorm2d(channels), conv1x1(channels, channels // 2)
                stage.append(nn.Sequential(norm, nn.ReLU(inplace=True), conv, pool))
            self.stages.append(nn.Sequential(*stage))
        self.norm, self.classifier = nn.BatchNorm2d(channels), nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))


# One flat Sequential, from the first convolution to the classifier.


def flat_net(growth, layers, size):
    stem = nn.Conv2d(3, 2 * growth, 7, stride=2, padding=3, bias=False)
    modules = [stem, nn.BatchNorm2d(2 * growth), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)]
    for i, (reads, channels) in enumerate(plan(2 * growth, growth, layers), start=1):
        modules += [NeckUnit(c, growth) for c in reads]
        if i < len(layers):
            modules.append(LibraryTransition(channels, channels // 2))
    modules += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()]
    return nn.Sequential(*modules, nn.Linear(channels, CLASSES))


# A library's names, its batch normalisations frozen if wanted, and its layers checkpointed.


class FrozenNorm(nn.Module):
    """A batch normalisation of constants: buffers, which no step changes."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in dict(weight=1.0, bias=0.0, running_mean=0.0, running_var=1.0).items():
            self.register_buffer(name, torch.full((num_features,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class LibraryLayer(nn.Module):
    def __init__(self, channels, growth, norm, checkpointed):
        super().__init__()
        self.norm1, self.relu1 = norm(channels), nn.ReLU(inplace=True)
        self.conv1 = conv1x1(channels, 4 * growth)
        self.norm2, self.relu2 = norm(4 * growth), nn.ReLU(inplace=True)
        self.conv2 = conv3x3(4 * growth, growth)
        self.grad_checkpointing = checkpointed

    def bottleneck(self, *features):
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

    def forward(self, features):
        if self.grad_checkpointing and any(f.requires_grad for f in features):
            made = torch.utils.checkpoint.checkpoint(self.bottleneck, *features, use_reentrant=False)
        else:
            made = self.bottleneck(*features)
        return self.conv2(self.relu2(self.norm2(made)))


class LibraryBlock(nn.ModuleDict):
    def __init__(self, reads, *options):
        super().__init__({f"denselayer{i}": LibraryLayer(c, *options) for i, c in enumerate(reads, start=1)})

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class LibraryTransition(nn.Sequential):
    def __init__(self, channels, out, norm=nn.BatchNorm2d):
        super().__init__()
        self.norm, self.relu = norm(channels), nn.ReLU(inplace=True)
        self.conv, self.pool = conv1x1(channels, out), nn.AvgPool2d(kernel_size=2, stride=2)


def library_features(growth, layers, norm=nn.BatchNorm2d, checkpointed=False):
    """The Sequential of a library's network, and its channels."""
    stem = nn.Conv2d(3, 2 * growth, 7, stride=2, padding=3, bias=False)
    pool = nn.MaxPool2d(3, stride=2, padding=1)
    features = nn.Sequential(OrderedDict(conv0=stem, norm0=norm(2 * growth), relu0=nn.ReLU(inplace=True), pool0=pool))
    for i, (reads, channels) in enumerate(plan(2 * growth, growth, layers), start=1):
        features.add_module(f"denseblock{i}", LibraryBlock(reads, growth, norm, checkpointed))
        if i < len(layers):
            features.add_module(f"transition{i}", LibraryTransition(channels, channels // 2, norm))
    features.add_module("norm5", norm(channels))
    return features, channels


class LibraryNet(nn.Module):
    def __init__(self, growth, layers, size, norm=nn.BatchNorm2d, checkpointed=False):
        super().__init__()
        self.features, channels = library_features(growth, layers, norm, checkpointed)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, x):
        out = F.adaptive_avg_pool2d(F.relu(self.features(x), inplace=True), (1, 1))
        return self.classifier(torch.flatten(out, 1))


# Volumes, as medical libraries have it: a layer holds its modules in one Sequential, with dropout of whole channels.


class VolumeLayer(nn.Module):
    def __init__(self, channels, growth, rate):
        super().__init__()
        self.layers = nn.Sequential(
            OrderedDict(
                norm1=nn.BatchNorm3d(channels),
                relu1=nn.ReLU(inplace=True),
                conv1=nn.Conv3d(channels, 4 * growth, kernel_size=1, bias=False),
                norm2=nn.BatchNorm3d(4 * growth),
                relu2=nn.ReLU(inplace=True),
                conv2=nn.Conv3d(4 * growth, growth, kernel_size=3, padding=1, bias=False),
            )
        )
        if rate > 0:
            self.layers.add_module("dropout", nn.Dropout3d(rate))

    def forward(self, x):
        return torch.cat([x, self.layers(x)], 1)


class VolumeNet(nn.Module):
    def __init__(self, growth, layers, size, rate=0.2):
        super().__init__()
        stem = nn.Conv3d(1, 2 * growth, kernel_size=7, stride=2, padding=3, bias=False)
        norm, pool = nn.BatchNorm3d(2 * growth), nn.MaxPool3d(3, stride=2, padding=1)
        self.features = nn.Sequential(OrderedDict(conv0=stem, norm0=norm, relu0=nn.ReLU(inplace=True), pool0=pool))
        for i, (reads, channels) in enumerate(plan(2 * growth, growth, layers), start=1):
            block = nn.Sequential()
            for j, c in enumerate(reads, start=1):
                block.add_module(f"denselayer{j}", VolumeLayer(c, growth, rate))
            self.features.add_module(f"denseblock{i}", block)
            if i < len(layers):
                out = channels // 2
                norm, conv = nn.BatchNorm3d(channels), nn.Conv3d(channels, out, kernel_size=1, bias=False)
                pool = nn.AvgPool3d(kernel_size=2, stride=2)
                transition = OrderedDict(norm=norm, relu=nn.ReLU(inplace=True), conv=conv, pool=pool)
                self.features.add_module(f"transition{i}", nn.Sequential(transition))
        self.features.add_module("norm5", nn.BatchNorm3d(channels))
        self.class_layers = nn.Sequential(
            nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1), nn.Flatten(1), nn.Linear(channels, CLASSES)
        )

    def forward(self, x):
        return self.class_layers(self.features(x))
