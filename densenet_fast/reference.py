"""The plain DenseNet in stock PyTorch, written to be read: Huang et al., "Densely Connected Convolutional Networks"
(https://arxiv.org/abs/1608.06993).

It uses no fused ops. It defines the architecture once, with torchvision's parameter names, their order and their
initialisation. Tests and benchmarks compare with it. A fused module runs this ``forward`` when it cannot run fused.

Well-known networks and their constructor calls:

=======================================  =======================================================================
DenseNet-121 (and -161, -169, -201, -264)  ``densenet121()``
DenseNet (L = 40, k = 12), CIFAR         ``DenseNet(12, (12,) * 3, 16, None, 0, 10, compression=1, small_inputs=True)``
DenseNet-B (L = 100, k = 12), CIFAR      ``DenseNet(12, (16,) * 3, 16, 4, 0, 10, compression=1, small_inputs=True)``
DenseNet-C (L = 40, k = 12), CIFAR       ``DenseNet(12, (12,) * 3, 16, None, 0, 10, small_inputs=True)``
DenseNet-BC (L = 100, k = 12), CIFAR     ``DenseNet(12, (16,) * 3, 24, 4, 0, 10, small_inputs=True)``
d2l.ai's DenseNet                        ``DenseNet(32, (4,) * 4, 64, None, 0, 10, in_channels=1, bias=True)``
=======================================  =======================================================================
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Architecture",
    "ARCHITECTURES",
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "Transition",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
]

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVERAGE_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def dropout_mask(x: Tensor, p: float) -> Tensor:
    """The mask that ``F.dropout(x, p)`` draws for a contiguous ``x``: bool, shaped like ``x``, True for kept values."""
    return torch.native_dropout(torch.empty_like(x, memory_format=torch.contiguous_format), p, True)[1]


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """``F.dropout(x, p, training)`` with a mask that does not depend on the memory format of ``x``.

    Traced and exported graphs contain ``F.dropout`` itself, so that ``eval()`` of the graph can switch it off.
    """
    if torch.jit.is_scripting():
        return F.dropout(x, p, training)
    else:
        traced = not isinstance(x, Tensor) or torch.jit.is_tracing() or torch.compiler.is_exporting()
        if traced or not training or x.is_contiguous():
            return F.dropout(x, p, training)
        return x * dropout_mask(x, p) * (1 / (1 - p) if p < 1 else 0.0)


class DenseLayer(nn.Module):
    """BN-ReLU-Conv1x1-BN-ReLU-Conv3x3: from all features so far to ``growth_rate`` new ones.

    With ``bn_size=None`` it has no bottleneck: BN-ReLU-Conv3x3.

    Args:
        num_input_features: number of channels of its input, C.
        growth_rate: number of channels of its output, k.
        bn_size: the bottleneck has bn_size * k channels; None for no bottleneck.
        drop_rate: probability of zeroing a new feature value in training.
        bias: whether the convolutions have biases.
        spatial_dims: 1, 2 or 3.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        *,
        bias: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__()
        batch_norm, convolution = BATCH_NORMS[spatial_dims], CONVOLUTIONS[spatial_dims]
        self.norm1 = batch_norm(num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        if bn_size is None:
            self.conv1 = convolution(num_input_features, growth_rate, kernel_size=3, padding=1, bias=bias)
        else:
            self.conv1 = convolution(num_input_features, bn_size * growth_rate, kernel_size=1, bias=bias)
            self.norm2 = batch_norm(bn_size * growth_rate)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = convolution(bn_size * growth_rate, growth_rate, kernel_size=3, padding=1, bias=bias)
        self.drop_rate = float(drop_rate)

    @property
    def bottleneck(self) -> bool:
        return hasattr(self, "conv2")

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        """BN-ReLU-convolution of the concatenated ``inputs``: the bottleneck, if the layer has one."""
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, input: Tensor | list[Tensor]) -> Tensor:
        """From [N, C, *spatial], whole or as a list to be concatenated, to [N, k, *spatial]."""
        x = self.bn_function([input] if isinstance(input, Tensor) else input)
        if hasattr(self, "conv2"):  # torch.jit.script can decide this when it compiles
            x = self.conv2(self.relu2(self.norm2(x)))
        if self.drop_rate > 0:
            x = dropout(x, self.drop_rate, self.training)
        return x


class DenseBlock(nn.ModuleDict):
    """``num_layers`` dense layers. Each reads the block's input and the features of all layers before it.

    The output is the concatenation of the input and all new features: [N, C + num_layers * k, *spatial]. By default
    each layer appends its features. With ``prepend`` it puts them in front, so the last layer's come first.
    """

    layer_type = DenseLayer
    prepend = False

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None = 4,
        growth_rate: int = 32,
        drop_rate: float = 0.0,
        *,
        prepend: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self.prepend = prepend
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            layer = self.layer_type(channels, growth_rate, bn_size, drop_rate, **options)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, init_features: Tensor) -> Tensor:
        """From [N, C, *spatial] to [N, C + num_layers * k, *spatial]."""
        return self.one_by_one(init_features)

    def one_by_one(self, init_features: Tensor) -> Tensor:
        """Calls the layers in turn, each on the list of all features so far."""
        features = [init_features]
        for layer in self.values():
            features.insert(0 if self.prepend else len(features), layer(features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """BN-ReLU-Conv1x1-AvgPool2: fewer channels, half the resolution. An odd last row or column is dropped."""

    def __init__(
        self, num_input_features: int, num_output_features: int, *, bias: bool = False, spatial_dims: int = 2
    ) -> None:
        super().__init__()
        self.norm = BATCH_NORMS[spatial_dims](num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = CONVOLUTIONS[spatial_dims](num_input_features, num_output_features, kernel_size=1, bias=bias)
        self.pool = AVERAGE_POOLS[spatial_dims](kernel_size=2, stride=2)


class DenseNet(nn.Module):
    """DenseNet, with torchvision's arguments, parameter names and initialisation.

    Args:
        growth_rate: number of channels that each layer adds, k.
        block_config: number of layers of each dense block; any number of blocks.
        num_init_features: number of channels of the stem.
        bn_size: bottlenecks have bn_size * k channels; None for layers without a bottleneck.
        drop_rate: dropout rate of each layer's new features.
        num_classes: number of classes.
        in_channels: number of channels of the images.
        compression: theta; a transition reduces C channels to floor(theta * C).
        small_inputs: the CIFAR stem (one 3x3 convolution) instead of the ImageNet stem (a 7x7 convolution of stride 2,
            BN, ReLU and a max pool of stride 2).
        bias: whether the convolutions have biases.
    """

    block_type = DenseBlock
    transition_type = Transition
    features_type = nn.Sequential

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        compression: float = 0.5,
        small_inputs: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        _check_configuration(growth_rate, block_config, num_init_features, bn_size, drop_rate, compression)
        self.features = self.features_type()
        if small_inputs:
            self.features.add_module("conv0", nn.Conv2d(in_channels, num_init_features, 3, padding=1, bias=bias))
        else:
            stem = nn.Conv2d(in_channels, num_init_features, kernel_size=7, stride=2, padding=3, bias=bias)
            self.features.add_module("conv0", stem)
            self.features.add_module("norm0", nn.BatchNorm2d(num_init_features))
            self.features.add_module("relu0", nn.ReLU(inplace=True))
            self.features.add_module("pool0", nn.MaxPool2d(kernel_size=3, stride=2, padding=1))

        channels = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            block = self.block_type(num_layers, channels, bn_size, growth_rate, drop_rate, bias=bias)
            self.features.add_module(f"denseblock{i}", block)
            channels += num_layers * growth_rate
            if i != len(block_config):
                compressed = math.floor(compression * channels)
                if compressed < 1:
                    raise ValueError(f"compression: expected to keep some of {channels} channels, got {compression!r}")
                self.features.add_module(f"transition{i}", self.transition_type(channels, compressed, bias=bias))
                channels = compressed
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """From images [N, in_channels, H, W] to logits [N, num_classes]."""
        return self.classifier(average(F.relu(self.features(x), inplace=True)))


def average(x: Tensor) -> Tensor:
    """The means over all pixels, from [N, C, H, W] to [N, C]."""
    return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)


def _check_configuration(
    growth_rate: int,
    block_config: Sequence[int],
    num_init_features: int,
    bn_size: int | None,
    drop_rate: float,
    compression: float,
) -> None:
    sizes = {"growth_rate": growth_rate, "num_init_features": num_init_features, "bn_size": bn_size}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}: expected a positive number, got {size!r}")
    if not block_config or any(n < 0 for n in block_config):
        raise ValueError(f"block_config: expected one non-negative number of layers per block, got {block_config!r}")
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate: expected a probability between 0 and 1, got {drop_rate!r}")
    if not 0 < compression <= 1:
        raise ValueError(f"compression: expected a number in (0, 1], got {compression!r}")


class Architecture(NamedTuple):
    """The arguments in which the ImageNet DenseNets differ (Table 1 of the paper)."""

    growth_rate: int
    block_config: tuple[int, ...]
    num_init_features: int


ARCHITECTURES = {
    "densenet121": Architecture(32, (6, 12, 24, 16), 64),
    "densenet161": Architecture(48, (6, 12, 36, 24), 96),
    "densenet169": Architecture(32, (6, 12, 32, 32), 64),
    "densenet201": Architecture(32, (6, 12, 48, 32), 64),
    "densenet264": Architecture(32, (6, 12, 64, 48), 64),
}


def densenet121(**kwargs: Any) -> DenseNet:
    """DenseNet-121; keyword arguments go to :class:`DenseNet`."""
    return DenseNet(*ARCHITECTURES["densenet121"], **kwargs)


def densenet161(**kwargs: Any) -> DenseNet:
    """DenseNet-161 (k = 48); keyword arguments go to :class:`DenseNet`."""
    return DenseNet(*ARCHITECTURES["densenet161"], **kwargs)


def densenet169(**kwargs: Any) -> DenseNet:
    """DenseNet-169; keyword arguments go to :class:`DenseNet`."""
    return DenseNet(*ARCHITECTURES["densenet169"], **kwargs)


def densenet201(**kwargs: Any) -> DenseNet:
    """DenseNet-201; keyword arguments go to :class:`DenseNet`."""
    return DenseNet(*ARCHITECTURES["densenet201"], **kwargs)


def densenet264(**kwargs: Any) -> DenseNet:
    """DenseNet-264, the largest of the paper; keyword arguments go to :class:`DenseNet`."""
    return DenseNet(*ARCHITECTURES["densenet264"], **kwargs)
