"""Networks built as other libraries build theirs: only what convert() has to recognise, or has to leave alone."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn


def features(in_channels, init, blocks, transition, growth, block_config, last="norm5"):
    """An ImageNet stem, blocks and transitions, and the last normalisation, under torchvision's names."""
    parts = OrderedDict(
        conv0=nn.Conv2d(in_channels, init, 7, 2, 3, bias=False),
        norm0=nn.BatchNorm2d(init),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(3, 2, 1),
    )
    channels = init
    for i, layers in enumerate(block_config, start=1):
        parts[f"denseblock{i}"] = blocks(layers, channels)
        channels += layers * growth
        if i < len(block_config):
            parts[f"transition{i}"] = transition(channels, channels // 2)
            channels //= 2
    parts[last] = nn.BatchNorm2d(channels)
    return nn.Sequential(parts), channels


def bottleneck(channels, growth, bn_size=4):
    """The six modules of a layer with a bottleneck."""
    width = bn_size * growth
    return OrderedDict(
        norm1=nn.BatchNorm2d(channels),
        relu1=nn.ReLU(inplace=True),
        conv1=nn.Conv2d(channels, width, 1, bias=False),
        norm2=nn.BatchNorm2d(width),
        relu2=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(width, growth, 3, padding=1, bias=False),
    )


class Transition(nn.Sequential):
    def __init__(self, channels, out):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, out, 1, bias=False)
        self.pool = nn.AvgPool2d(2, 2)


# torchxrayvision: the layer is a Sequential that concatenates, and so is the block.


class XrayLayer(nn.Sequential):
    def __init__(self, channels, growth, drop_rate):
        super().__init__(bottleneck(channels, growth))
        self.drop_rate = drop_rate

    def forward(self, x):
        new = super().forward(x)
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return torch.cat([x, new], 1)


class XrayBlock(nn.Sequential):
    def __init__(self, layers, channels, growth, drop_rate):
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", XrayLayer(channels + i * growth, growth, drop_rate))


class XrayNet(nn.Module):
    def __init__(self, growth=8, block_config=(2, 3, 2), init=16, drop_rate=0, classes=5, in_channels=1):
        super().__init__()
        self.features, channels = features(
            in_channels, init, lambda n, c: XrayBlock(n, c, growth, drop_rate), Transition, growth, block_config
        )
        self.classifier = nn.Linear(channels, classes)
        self.op_threshs = None

    def features2(self, x):
        out = F.relu(self.features(x), inplace=True)
        return F.adaptive_avg_pool2d(out, (1, 1)).view(out.size(0), -1)

    def forward(self, x):
        out = self.classifier(self.features2(x))
        if hasattr(self, "op_threshs") and self.op_threshs is not None:
            out = torch.sigmoid(out) * self.op_threshs
        return out


# gpleiss/efficient_densenet_pytorch: the block loops over its children and gives each all features.


class EfficientLayer(nn.Module):
    def __init__(self, channels, growth, drop_rate, efficient):
        super().__init__()
        for name, module in bottleneck(channels, growth).items():
            self.add_module(name, module)
        self.drop_rate, self.efficient = drop_rate, efficient

    def forward(self, *features):
        def bottleneck(*features):
            return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

        if self.efficient and any(f.requires_grad for f in features):
            made = torch.utils.checkpoint.checkpoint(bottleneck, *features, use_reentrant=False)
        else:
            made = bottleneck(*features)
        new = self.conv2(self.relu2(self.norm2(made)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class EfficientBlock(nn.Module):
    def __init__(self, layers, channels, growth, drop_rate, efficient):
        super().__init__()
        for i in range(layers):
            layer = EfficientLayer(channels + i * growth, growth, drop_rate, efficient)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, init_features):
        features = [init_features]
        for _, layer in self.named_children():
            features.append(layer(*features))
        return torch.cat(features, dim=1)


class EfficientNet(nn.Module):
    def __init__(self, growth=8, block_config=(2, 3, 2), init=16, drop_rate=0, classes=5, efficient=True):
        super().__init__()
        block = lambda n, c: EfficientBlock(n, c, growth, drop_rate, efficient)  # noqa: E731
        self.features, channels = features(3, init, block, Transition, growth, block_config, last="norm_final")
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x):
        out = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1))


# d2l.ai: plain Sequentials, no bottleneck, biases, lazy modules.


class BookBlock(nn.Module):
    def __init__(self, layers, growth):
        super().__init__()
        self.net = nn.Sequential(*[self.layer(growth) for _ in range(layers)])

    @staticmethod
    def layer(growth):
        return nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(growth, kernel_size=3, padding=1))

    def forward(self, x):
        for layer in self.net:
            x = torch.cat((x, layer(x)), dim=1)
        return x


def book_net(growth=8, block_config=(2, 3), init=16, classes=5):
    """Lazy: it has no shapes before its first call."""
    stem = nn.Sequential(
        nn.LazyConv2d(init, kernel_size=7, stride=2, padding=3),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    net, channels = nn.Sequential(stem), init
    for i, layers in enumerate(block_config):
        net.add_module(f"dense_blk{i + 1}", BookBlock(layers, growth))
        channels += layers * growth
        if i != len(block_config) - 1:
            channels //= 2
            transition = [nn.LazyBatchNorm2d(), nn.ReLU(), nn.LazyConv2d(channels, kernel_size=1), nn.AvgPool2d(2, 2)]
            net.add_module(f"tran_blk{i + 1}", nn.Sequential(*transition))
    head = [nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.LazyLinear(classes)]
    net.add_module("last", nn.Sequential(*head))
    return net


# A user's own: other names, functional ReLU and pooling, one ReLU for all, blocks in a list.


class OwnLayer(nn.Module):
    def __init__(self, channels, growth, scale=1.0):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3, momentum=None)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(2 * growth)
        self.growth, self.scale = growth, scale

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return out if self.scale == 1 else out * self.scale


class OwnBlock(nn.Module):
    def __init__(self, layers, channels, growth, **options):
        super().__init__()
        self.units = nn.ModuleList([OwnLayer(channels + i * growth, growth, **options) for i in range(layers)])

    def forward(self, x):
        for unit in self.units:
            x = torch.cat([x, unit(x)], 1)
        return x


class OwnTransition(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 1)

    def forward(self, x):
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class OwnNet(nn.Module):
    def __init__(self, growth=8, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.block1, self.down = OwnBlock(3, 12, growth, **options), OwnTransition(12 + 3 * growth, 20)
        self.block2, self.head = OwnBlock(2, 20, growth, **options), nn.Linear(20 + 2 * growth, 5)

    def forward(self, x):
        return self.head(F.relu(self.block2(self.down(self.block1(self.stem(x))))).mean((2, 3)))


# What has the modules of a dense block, or nearly so, and computes something else.


class ResidualBlock(XrayBlock):
    def forward(self, x):
        out = super().forward(x)
        return out + F.pad(x, (0, 0, 0, 0, 0, out.shape[1] - x.shape[1])) * 1e-3


class TwoInputBlock(XrayBlock):
    def forward(self, x, skip):
        return super().forward(x) + skip


class GatedLayer(XrayLayer):
    """With an attention gate that starts at zero."""

    def __init__(self, channels, growth, drop_rate=0):
        super().__init__(channels, growth, drop_rate)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return super().forward(x) * (1 + self.gate)


class GatedBlock(nn.Sequential):
    def __init__(self, layers, channels, growth):
        super().__init__(*[GatedLayer(channels + i * growth, growth) for i in range(layers)])


class InPlaceABN(nn.Module):
    """Normalisation and activation in one, as InPlaceABN's networks have it."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.leaky_relu(F.instance_norm(x, weight=self.weight, bias=self.bias), 0.01)


class ActivatedLayer(nn.Module):
    def __init__(self, channels, growth):
        super().__init__()
        self.norm1, self.conv1 = InPlaceABN(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = InPlaceABN(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.conv2(self.norm2(self.conv1(self.norm1(x))))], 1)


def activated_block(layers, channels, growth):
    return nn.Sequential(*[ActivatedLayer(channels + i * growth, growth) for i in range(layers)])


class CroppingBlock(nn.Module):
    """HoVer-Net's: grouped convolutions without padding, the features cropped to fit."""

    def __init__(self, layers, channels, growth, groups=4):
        super().__init__()
        self.units = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    preact_bn=nn.BatchNorm2d(channels + i * growth),
                    preact_relu=nn.ReLU(),
                    conv1=nn.Conv2d(channels + i * growth, 32, 1, bias=False),
                    bn=nn.BatchNorm2d(32),
                    relu=nn.ReLU(),
                    conv2=nn.Conv2d(32, growth, 3, groups=groups, bias=False),
                )
            )
            for i in range(layers)
        )
        self.blk_bna = nn.Sequential(nn.BatchNorm2d(channels + layers * growth), nn.ReLU())

    def forward(self, x):
        for unit in self.units:
            new = unit(x)
            x = torch.cat([x[..., 1:-1, 1:-1], new], 1)
        return self.blk_bna(x)


class LearnedGroupConv(nn.Module):
    """CondenseNet's: normalisation, ReLU and a masked 1x1 convolution."""

    def __init__(self, channels, out):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv = nn.Conv2d(channels, out, 1, bias=False)
        self.register_buffer("_mask", torch.ones(self.conv.weight.shape))

    def forward(self, x):
        return F.conv2d(self.relu(self.norm(x)), self.conv.weight * self._mask)


class CondensedLayer(nn.Module):
    def __init__(self, channels, growth, groups=4):
        super().__init__()
        self.conv_1 = LearnedGroupConv(channels, 4 * growth)
        self.conv_2 = nn.Sequential(
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, groups=groups, bias=False),
        )

    def forward(self, x):
        return torch.cat([x, self.conv_2(self.conv_1(x))], 1)


def condensed_block(layers, channels, growth):
    return nn.Sequential(*[CondensedLayer(channels + i * growth, growth) for i in range(layers)])


class ResidualInResidual(nn.Module):
    """RRDB's dense block: no normalisation, a residual connection."""

    def __init__(self, channels=16, growth=8):
        super().__init__()
        for i in range(4):
            self.add_module(f"conv{i + 1}", nn.Conv2d(channels + i * growth, growth, 3, padding=1))
        self.conv5 = nn.Conv2d(channels + 4 * growth, channels, 3, padding=1)

    def forward(self, x):
        features = x
        for i in range(4):
            features = torch.cat([features, F.leaky_relu(self._modules[f"conv{i + 1}"](features), 0.2)], 1)
        return self.conv5(features) * 0.2 + x


class ResidualDenseLayer(nn.Module):
    """RDN's: convolution and ReLU."""

    def __init__(self, channels, growth):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(channels, growth, 3, padding=1), nn.ReLU())

    def forward(self, x):
        return torch.cat([x, self.conv(x)], 1)


class ResidualDense(nn.Module):
    def __init__(self, channels=16, growth=8, layers=3):
        super().__init__()
        self.convs = nn.Sequential(*[ResidualDenseLayer(channels + i * growth, growth) for i in range(layers)])
        self.fuse = nn.Conv2d(channels + layers * growth, channels, 1)

    def forward(self, x):
        return self.fuse(self.convs(x)) + x
