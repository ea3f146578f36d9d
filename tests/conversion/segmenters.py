"""Networks that segment: the fully convolutional DenseNet, with dense blocks on the way up too, and U-Nets over a
library's DenseNet."""

import torch
import torch.nn.functional as F
from torch import nn

from conversion.small_images import CLASSES, conv1x1, conv3x3
from conversion.staged import library_features

# The fully convolutional DenseNet: no bottlenecks; blocks on the way up hand on their new features alone.


class FCLayer(nn.Sequential):
    def __init__(self, channels, growth, rate):
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("conv", conv3x3(channels, growth, bias=True))
        self.add_module("drop", nn.Dropout2d(rate))


class FCBlock(nn.Module):
    def __init__(self, channels, growth, count, rate, upsample=False):
        super().__init__()
        self.upsample = upsample
        self.layers = nn.ModuleList([FCLayer(channels + i * growth, growth, rate) for i in range(count)])

    def forward(self, x):
        if not self.upsample:
            for layer in self.layers:
                x = torch.cat([x, layer(x)], 1)
            return x
        made = []
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x, new], 1)
            made.append(new)
        return torch.cat(made, 1)


class Down(nn.Sequential):
    def __init__(self, channels, rate):
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(inplace=True))
        self.add_module("conv", conv1x1(channels, channels, bias=True))
        self.add_module("drop", nn.Dropout2d(rate))
        self.add_module("maxpool", nn.MaxPool2d(2))


class Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.grow = nn.ConvTranspose2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x, skip):
        x, (height, width) = self.grow(x), skip.shape[2:]
        top, left = (x.size(2) - height) // 2, (x.size(3) - width) // 2
        return torch.cat([x[:, :, top : top + height, left : left + width], skip], 1)


class FCDenseNet(nn.Module):
    """As many layers in the blocks of the way up as of the way down; the last of ``layers`` is the bottom."""

    def __init__(self, growth, layers, size, rate=0.2, stem=None):
        super().__init__()
        channels = stem or 4 * growth
        self.first = conv3x3(3, channels, bias=True)
        self.blocks_down, self.downs, skips = nn.ModuleList(), nn.ModuleList(), []
        for count in layers[:-1]:
            self.blocks_down.append(FCBlock(channels, growth, count, rate))
            channels += count * growth
            skips.append(channels)
            self.downs.append(Down(channels, rate))
        self.bottom = FCBlock(channels, growth, layers[-1], rate, upsample=True)
        self.ups, self.blocks_up, made = nn.ModuleList(), nn.ModuleList(), layers[-1] * growth
        for i, count in enumerate(reversed(layers[:-1]), start=1):
            self.ups.append(Up(made))
            channels = made + skips.pop()
            self.blocks_up.append(FCBlock(channels, growth, count, rate, upsample=i < len(self.downs)))
            made = count * growth
        self.last = conv1x1(channels + made, CLASSES, bias=True)

    def forward(self, x):
        out, skips = self.first(x), []
        for block, down in zip(self.blocks_down, self.downs):
            out = block(out)
            skips.append(out)
            out = down(out)
        out = self.bottom(out)
        for up, block in zip(self.ups, self.blocks_up):
            out = block(up(out, skips.pop()))
        return F.log_softmax(self.last(out), dim=1)


# U-Nets over a library's DenseNet, whose features are taken stage by stage.


class SkippingTransition(nn.Module):
    """A transition that hands out what its ReLU makes too."""

    def __init__(self, transition):
        super().__init__()
        self.transition = transition

    def forward(self, x):
        for module in self.transition:
            x = module(x)
            if isinstance(module, nn.ReLU):
                skip = x
        return x, skip


class Encoder(nn.Module):
    """``inside``: skips are taken behind the ReLU of a transition, else behind the block."""

    def __init__(self, growth, layers, inside):
        super().__init__()
        self.features, channels = library_features(growth, layers)
        self.inside, self.count = inside, len(layers)
        down = [t.norm.num_features for name, t in self.features.named_children() if name.startswith("transition")]
        self.channels = [2 * growth, *down, channels]

    def stages(self):
        f = self.features
        yield nn.Sequential(f.conv0, f.norm0, f.relu0)
        behind = f.pool0
        for i in range(1, self.count + 1):
            block, last = f.get_submodule(f"denseblock{i}"), i == self.count
            if self.inside and not last:
                yield nn.Sequential(behind, block, SkippingTransition(f.get_submodule(f"transition{i}")))
                behind = nn.Identity()
            else:
                yield nn.Sequential(behind, block, *([f.norm5] if last else []))
                behind = nn.Identity() if last else f.get_submodule(f"transition{i}")

    def forward(self, x):
        skips = []
        for stage in self.stages():
            x = stage(x)
            x, skip = x if isinstance(x, tuple) else (x, x)
            skips.append(skip)
        return skips


class DecoderBlock(nn.Module):
    def __init__(self, channels, skip, out):
        super().__init__()
        self.conv1 = nn.Sequential(conv3x3(channels + skip, out), nn.BatchNorm2d(out), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(conv3x3(out, out), nn.BatchNorm2d(out), nn.ReLU(inplace=True))

    def forward(self, x, skip):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv2(self.conv1(x if skip is None else torch.cat([x, skip], 1)))


class UNet(nn.Module):
    def __init__(self, growth, layers, size, inside=False, widths=(256, 128, 64, 32, 16)):
        super().__init__()
        self.encoder = Encoder(growth, layers, inside)
        *skips, channels = self.encoder.channels
        self.decoder = nn.ModuleList()
        for skip, width in zip([*reversed(skips), 0], widths[-len(skips) - 1 :]):
            self.decoder.append(DecoderBlock(channels, skip, width))
            channels = width
        self.head = conv3x3(channels, CLASSES, bias=True)

    def forward(self, x):
        *skips, x = self.encoder(x)
        for block in self.decoder:
            x = block(x, skips.pop() if skips else None)
        return self.head(x)
