"""Dense blocks of the many ways in which people write them, and near misses."""

import torch
import torch.nn.functional as F
from torch import nn

from conversion import twins
from densenet_fast.reference import BATCH_NORMS, CONVOLUTIONS


def sequential(layer, layers=3, channels=12, growth=8, **options):
    """Layers that concatenate themselves, in a plain Sequential."""
    return nn.Sequential(*[layer(channels + i * growth, growth, **options) for i in range(layers)])


def looped(layer, block=twins.OwnBlock, layers=3, channels=12, growth=8, **options):
    """Layers that make new features alone, in a block that concatenates them."""
    made = block(layers, channels, growth)
    made.units = nn.ModuleList([layer(channels + i * growth, growth, **options) for i in range(layers)])
    return made


# New features in front.


class Front(twins.OwnLayer):
    """Small networks for CIFAR: the layer concatenates, the block is a Sequential of them."""

    def forward(self, x):
        return torch.cat([super().forward(x), x], 1)


class FrontOfOneNet(nn.Module):
    """As tutorials write it: one Sequential inside the layer, another inside the block."""

    def __init__(self, channels, growth, dropout=0.0):
        super().__init__()
        parts = list(twins.bottleneck(channels, growth, 2).values())
        self.net = nn.Sequential(*parts, *([nn.Dropout(dropout)] if dropout else []))

    def forward(self, x):
        return torch.cat([self.net(x), x], dim=1)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.block = inner

    def forward(self, x):
        return self.block(x)


class FrontBlock(twins.OwnBlock):
    def forward(self, x):
        for unit in self.units:
            x = torch.cat([unit(x), x], 1)
        return x


# New features alone: one class makes both paths of a segmentation network.


class PathLayer(nn.Sequential):
    def __init__(self, channels, growth, dims=2, drop=0.2):
        super().__init__()
        self.add_module("norm", BATCH_NORMS[dims](channels))
        self.add_module("relu", nn.ReLU(True))
        self.add_module("conv", CONVOLUTIONS[dims](channels, growth, 3, padding=1))
        self.add_module("drop", (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[dims - 1](drop))


class PathBlock(nn.Module):
    def __init__(self, layers, channels, growth, upsample=True, front=False, dims=2):
        super().__init__()
        self.upsample, self.front = upsample, front
        self.units = nn.ModuleList([PathLayer(channels + i * growth, growth, dims) for i in range(layers)])

    def joined(self, x, new):
        return torch.cat([new, x] if self.front else [x, new], 1)

    def forward(self, x):
        made = None
        for unit in self.units:
            new = unit(x)
            x = self.joined(x, new)
            made = new if made is None else self.joined(made, new)
        return made if self.upsample else x


# Units that are modules of their own.


class Unit(nn.Module):
    def __init__(self, channels, out, kernel, **norm):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, **norm)
        self.activ = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)

    def forward(self, x):
        return self.conv(self.activ(self.bn(x)))


class OfUnits(nn.Module):
    def __init__(self, channels, growth, dropout=0.0):
        super().__init__()
        self.use_dropout = dropout != 0
        self.conv1, self.conv2 = Unit(channels, 3 * growth, 1), Unit(3 * growth, growth, 3)
        if self.use_dropout:
            self.dropout = nn.Dropout(p=dropout)

    def forward(self, x):
        new = self.conv2(self.conv1(x))
        if self.use_dropout:
            new = self.dropout(new)
        return torch.cat((x, new), dim=1)


class Deep(nn.Module):
    """Units two modules down, the second one registered first, with dropout by a rate of their own."""

    class Dropping(Unit):
        def __init__(self, *args):
            super().__init__(*args)
            self.p_drop = 0.0

        def forward(self, x):
            return F.dropout(super().forward(x), self.p_drop, self.training)

    def __init__(self, channels, growth):
        super().__init__()
        wrap = lambda unit: nn.ModuleDict(dict(body=nn.Sequential(unit)))  # noqa: E731
        self.last, self.first = wrap(self.Dropping(24, growth, 3)), wrap(self.Dropping(channels, 24, 1))

    def forward(self, x):
        return torch.cat([x, self.last["body"](self.first["body"](x))], 1)


class LastFirst(nn.Module):
    """Registers first what it uses last."""

    def __init__(self, channels, growth):
        super().__init__()
        self.conv2, self.norm2 = nn.Conv2d(24, growth, 3, padding=1), nn.BatchNorm2d(24)
        self.conv1, self.norm1 = nn.Conv2d(channels, 24, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


# Dropout.


class Dropping(twins.OwnLayer):
    """Drops out by ``drop`` where ``places`` says: behind the 1x1 ("a"), behind the 3x3 ("b")."""

    def __init__(self, channels, growth, places="ab"):
        super().__init__(channels, growth)
        self.places = places

    def drop(self, place, x):
        return x

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.drop("a", out) if "a" in self.places else out
        out = self.conv2(F.relu(self.bn2(out)))
        return self.drop("b", out) if "b" in self.places else out


class ByFunction(Dropping):
    def __init__(self, channels, growth, places="ab", name="droprate", function="dropout", rate=0.3):
        super().__init__(channels, growth, places)
        setattr(self, name, rate)
        self.name, self.function = name, function

    def drop(self, place, x):
        return getattr(F, self.function)(x, getattr(self, self.name), self.training)


class ByModule(Dropping):
    """One for both places, or with ``rates`` for each."""

    def __init__(self, channels, growth, places="ab", kind=nn.Dropout, rates=(0.3,)):
        super().__init__(channels, growth, places)
        self.drops = nn.ModuleList([kind(rate) for rate in rates])

    def drop(self, place, x):
        return self.drops["ab".index(place) if len(self.drops) > 1 else 0](x)


class ByClass(Dropping):
    """At a rate that stands on the class."""

    drop_rate = 0.0

    def drop(self, place, x):
        return F.dropout(x, self.drop_rate, self.training)


class NoRate(twins.OwnLayer):
    """Has a number that is named like one."""

    def __init__(self, *args):
        super().__init__(*args)
        self.drop_up_to = 0

    def forward(self, x):
        return super().forward([x][self.drop_up_to])


class DroppingBlock(twins.OwnBlock):
    """Drops out its layers' features itself."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.dropout = 0.3

    def forward(self, x):
        for unit in self.units:
            x = torch.cat([x, F.dropout(unit(x), p=self.dropout, training=self.training)], 1)
        return x


# Frozen normalisation.


class Frozen(nn.Module):
    """A batch normalisation by running statistics, its eps in an attribute or, None, as the default has it."""

    def __init__(self, channels, eps=None):
        super().__init__()
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(channels))
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        if eps is not None:
            self.eps = eps

    def scale(self):
        return self.weight / (self.running_var + getattr(self, "eps", 1e-5)).sqrt()

    def forward(self, x):
        scale = self.scale()
        return (x - self.running_mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]


class FrozenOtherwise(Frozen):
    def scale(self):
        return self.weight / (self.running_var.sqrt() + 1e-5)


def with_norms(model, kind):
    """``model`` with every batch normalisation replaced by ``kind(channels)``."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                module._modules[name] = kind(child.num_features)
    return model


class ActivatedLayer(nn.Module):
    """Its normalisations, made by ``kind``, hold their activations."""

    def __init__(self, channels, growth, kind):
        super().__init__()
        self.norm1, self.conv1 = kind(channels), nn.Conv2d(channels, 16, 1, bias=False)
        self.norm2, self.conv2 = kind(16), nn.Conv2d(16, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv2(self.norm2(self.conv1(self.norm1(x))))


class ActivatedTransition(nn.Module):
    def __init__(self, channels, out, kind):
        super().__init__()
        self.norm, self.conv, self.pool = kind(channels), nn.Conv2d(channels, out, 1), nn.AvgPool2d(2)

    def forward(self, x):
        return self.pool(self.conv(self.norm(x)))


# Near misses.


class NowHereNowThere(twins.OwnBlock):
    def forward(self, x):
        for i, unit in enumerate(self.units):
            x = torch.cat([unit(x), x] if i % 2 else [x, unit(x)], 1)
        return x


class ReadsAPart(twins.OwnBlock):
    """The last layer reads the first one's channels twice and its predecessor's never."""

    def forward(self, x):
        features = [x]
        for unit in self.units:
            features.append(unit(torch.cat([features[0], *features[1:2] * (len(features) - 1)], 1)))
        return torch.cat(features, 1)


class NewReversed(twins.OwnBlock):
    def forward(self, x):
        made = []
        for unit in self.units:
            made.append(unit(x))
            x = torch.cat([x, made[-1]], 1)
        return torch.cat(made[::-1], 1)


class DropsBeforeNorm(twins.OwnLayer):
    def __init__(self, *args):
        super().__init__(*args)
        self.drop_rate = 0.2

    def forward(self, x):
        return super().forward(F.dropout(x, self.drop_rate, self.training))


class DropsInInference(twins.OwnLayer):
    def __init__(self, *args):
        super().__init__(*args)
        self.drop_rate = 0.2

    def forward(self, x):
        return F.dropout(super().forward(x), self.drop_rate)


class DropsBetween(twins.OwnLayer):
    """Behind a ReLU."""

    def __init__(self, *args):
        super().__init__(*args)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.conv2(self.drop(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))))


class DropsTheResult(twins.OwnBlock):
    def __init__(self, *args):
        super().__init__(*args)
        self.drop_rate = 0.2

    def forward(self, x):
        return F.dropout(super().forward(x), self.drop_rate, self.training)
