"""DenseNets for small images, each written as its kind is: which modules hold what, what is functional, in which order
features are concatenated.

A network has ``growth`` features a layer, ``layers`` in each block, and takes images of ``size`` by ``size``.
"""

import torch
import torch.nn.functional as F
from torch import nn

CLASSES = 5


def conv1x1(channels, out, bias=False):
    return nn.Conv2d(channels, out, kernel_size=1, bias=bias)


def conv3x3(channels, out, bias=False):
    return nn.Conv2d(channels, out, kernel_size=3, padding=1, bias=bias)


def plan(init, growth, layers):
    """Of each block the channels that each of its layers reads, and what it makes, of which the next block has half."""
    channels = init
    for count in layers:
        yield [channels + i * growth for i in range(count)], channels + count * growth
        channels = (channels + count * growth) // 2


# New features in front of those there were; stages are Sequentials of units; ReLU and pooling are functions.


class FrontUnit(nn.Module):
    def __init__(self, channels, growth):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv1x1(channels, 4 * growth)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv3x3(4 * growth, growth)

    def forward(self, x):
        new = self.conv1(F.relu(self.bn1(x)))
        new = self.conv2(F.relu(self.bn2(new)))
        return torch.cat([new, x], 1)


class FunctionalTransition(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), conv1x1(channels, out)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class FrontNet(nn.Module):
    def __init__(self, growth, layers, size):
        super().__init__()
        self.conv1 = conv3x3(3, 2 * growth)
        self.stages, self.pool = len(layers), size >> len(layers) - 1
        for i, (reads, channels) in enumerate(plan(2 * growth, growth, layers), start=1):
            setattr(self, f"dense{i}", nn.Sequential(*[FrontUnit(c, growth) for c in reads]))
            if i < self.stages:
                setattr(self, f"trans{i}", FunctionalTransition(channels, channels // 2))
        self.bn, self.linear = nn.BatchNorm2d(channels), nn.Linear(channels, CLASSES)

    def forward(self, x):
        out = self.conv1(x)
        for i in range(1, self.stages + 1):
            out = getattr(self, f"dense{i}")(out)
            if i < self.stages:
                out = getattr(self, f"trans{i}")(out)
        out = F.avg_pool2d(F.relu(self.bn(out)), self.pool)
        return self.linear(out.view(out.size(0), -1))


# A tutorial's: every module holds a Sequential that does the work; new features in front.


class TutorialLayer(nn.Module):
    def __init__(self, channels, growth, act):
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm2d(channels),
            act(),
            conv1x1(channels, 2 * growth),
            nn.BatchNorm2d(2 * growth),
            act(),
            conv3x3(2 * growth, growth),
        )

    def forward(self, x):
        made = self.net(x)
        return torch.cat([made, x], dim=1)


class TutorialBlock(nn.Module):
    def __init__(self, reads, growth, act):
        super().__init__()
        self.block = nn.Sequential(*[TutorialLayer(c, growth, act) for c in reads])

    def forward(self, x):
        return self.block(x)


class TutorialTransition(nn.Module):
    def __init__(self, channels, out, act):
        super().__init__()
        self.transition = nn.Sequential(
            nn.BatchNorm2d(channels), act(), conv1x1(channels, out), nn.AvgPool2d(kernel_size=2, stride=2)
        )

    def forward(self, x):
        return self.transition(x)


class TutorialNet(nn.Module):
    def __init__(self, growth, layers, size, act=nn.ReLU):
        super().__init__()
        self.input_net = nn.Sequential(conv3x3(3, 2 * growth, bias=True))
        blocks = []
        for i, (reads, channels) in enumerate(plan(2 * growth, growth, layers), start=1):
            blocks.append(TutorialBlock(reads, growth, act))
            if i < len(layers):
                blocks.append(TutorialTransition(channels, channels // 2, act))
        self.blocks = nn.Sequential(*blocks)
        self.output_net = nn.Sequential(
            nn.BatchNorm2d(channels), act(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(channels, CLASSES)
        )

    def forward(self, x):
        return self.output_net(self.blocks(self.input_net(x)))


# Dropout behind every convolution, by a function, at a rate that modules hold under this name.


class DroppingUnit(nn.Module):
    def __init__(self, channels, growth, droprate, bottleneck=True):
        super().__init__()
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.bottleneck, self.droprate = bottleneck, droprate
        if bottleneck:
            self.conv1 = conv1x1(channels, 4 * growth)
            self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv3x3(4 * growth, growth)
        else:
            self.conv1 = conv3x3(channels, growth)

    def drop(self, x):
        return F.dropout(x, p=self.droprate, inplace=False, training=self.training) if self.droprate > 0 else x

    def forward(self, x):
        new = self.drop(self.conv1(self.relu(self.bn1(x))))
        if self.bottleneck:
            new = self.drop(self.conv2(self.relu(self.bn2(new))))
        return torch.cat([x, new], 1)


class DroppingTransition(nn.Module):
    def __init__(self, channels, out, droprate):
        super().__init__()
        self.bn1, self.relu, self.conv1 = nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv1x1(channels, out)
        self.droprate = droprate

    def forward(self, x):
        out = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, inplace=False, training=self.training)
        return F.avg_pool2d(out, 2)


class DroppingBlock(nn.Module):
    def __init__(self, reads, *options):
        super().__init__()
        self.layer = nn.Sequential(*[DroppingUnit(c, *options) for c in reads])

    def forward(self, x):
        return self.layer(x)


class DroppingNet(nn.Module):
    def __init__(self, growth, layers, size, droprate=0.2, bottleneck=True):
        super().__init__()
        self.conv1 = conv3x3(3, 2 * growth)
        self.stages, self.pool = len(layers), size >> len(layers) - 1
        for i, (reads, channels) in enumerate(plan(2 * growth, growth, layers), start=1):
            setattr(self, f"block{i}", DroppingBlock(reads, growth, droprate, bottleneck))
            if i < self.stages:
                setattr(self, f"trans{i}", DroppingTransition(channels, channels // 2, droprate))
        self.bn1, self.relu, self.fc = nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Linear(channels, CLASSES)
        self.in_planes = channels

    def forward(self, x):
        out = self.conv1(x)
        for i in range(1, self.stages):
            out = getattr(self, f"trans{i}")(getattr(self, f"block{i}")(out))
        out = self.relu(self.bn1(getattr(self, f"block{self.stages}")(out)))
        return self.fc(F.avg_pool2d(out, self.pool).view(-1, self.in_planes))


# Everything in one Sequential, built by name; blocks are Sequentials; transitions have no ReLU.


class NeckUnit(nn.Module):
    def __init__(self, channels, growth):
        super().__init__()
        self.bottle_neck = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            conv1x1(channels, 4 * growth),
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(inplace=True),
            conv3x3(4 * growth, growth),
        )

    def forward(self, x):
        return torch.cat([x, self.bottle_neck(x)], 1)


class LinearTransition(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.down_sample = nn.Sequential(nn.BatchNorm2d(channels), conv1x1(channels, out), nn.AvgPool2d(2, stride=2))

    def forward(self, x):
        return self.down_sample(x)


class LinearTransitionNet(nn.Module):
    def __init__(self, growth, layers, size):
        super().__init__()
        self.conv1, self.features = conv3x3(3, 2 * growth), nn.Sequential()
        for i, (reads, channels) in enumerate(plan(2 * growth, growth, layers), start=1):
            block = nn.Sequential()
            for j, c in enumerate(reads):
                block.add_module(f"bottle_neck_layer_{j}", NeckUnit(c, growth))
            self.features.add_module(f"dense_block_layer_{i}", block)
            if i < len(layers):
                self.features.add_module(f"transition_layer_{i}", LinearTransition(channels, channels // 2))
        self.features.add_module("bn", nn.BatchNorm2d(channels))
        self.features.add_module("relu", nn.ReLU(inplace=True))
        self.avgpool, self.linear = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(channels, CLASSES)

    def forward(self, x):
        out = self.avgpool(self.features(self.conv1(x)))
        return self.linear(out.view(out.size()[0], -1))


# Dropout of the new features by a function, always called; one ReLU for all of a unit.


class AlwaysDroppingUnit(nn.Module):
    def __init__(self, channels, growth, rate):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv1x1(channels, 4 * growth)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), conv3x3(4 * growth, growth)
        self.dropRate = rate

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        out = F.dropout(out, p=self.dropRate, training=self.training)
        return torch.cat((x, out), 1)


class AlwaysDroppingNet(nn.Module):
    def __init__(self, growth, layers, size, rate=0.1):
        super().__init__()
        self.conv1 = conv3x3(3, 2 * growth)
        stages = []
        for i, (reads, channels) in enumerate(plan(2 * growth, growth, layers), start=1):
            stages.append(nn.Sequential(*[AlwaysDroppingUnit(c, growth, rate) for c in reads]))
            if i < len(layers):
                stages.append(FunctionalTransition(channels, channels // 2))
        self.stages = nn.ModuleList(stages)
        self.bn, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.avgpool, self.fc = nn.AvgPool2d(size >> len(layers) - 1), nn.Linear(channels, CLASSES)

    def forward(self, x):
        x = self.conv1(x)
        for stage in self.stages:
            x = stage(x)
        x = self.avgpool(self.relu(self.bn(x)))
        return self.fc(x.view(x.size(0), -1))
