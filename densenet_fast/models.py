"""The drop-in DenseNet: torchvision's models, parameters and initialisation over fused parts."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast import checkpoints, functional, reference
from densenet_fast.functional import BatchStatistics
from densenet_fast.nn import DenseBlock, Transition, fusion
from densenet_fast.reference import ARCHITECTURES

__all__ = ["DenseNet", "densenet121", "densenet161", "densenet169", "densenet201", "densenet264"]

STEM = ["norm0", "relu0", "pool0"]


class Step:
    """A part of the network. Parts that know each other's interface hand a feature map's batch statistics on."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def reads_statistics(self) -> bool:
        """Whether the statistics of its input spare it work."""
        return False

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, describe: bool
    ) -> tuple[Tensor, BatchStatistics | None]:
        """From ``x`` and its statistics to the result and, if asked to describe it, its statistics where known."""
        return self.module(x), None


class Stem(Step):
    """``norm0``, ``relu0`` and ``pool0`` of ``module``."""

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, describe: bool
    ) -> tuple[Tensor, BatchStatistics | None]:
        if fusion.call_obstacle(x, 2):
            for name in STEM:
                x = self.module._modules[name](x)
            return x, None
        norm = fusion.batch_norm(self.module.norm0)
        if not describe:
            return functional.bn_relu_maxpool(x, norm), None
        return functional.bn_relu_maxpool(x, norm, return_statistics=True)


class Head(Step):
    """``norm5`` of ``module`` with the ReLU and the average behind it."""

    def reads_statistics(self) -> bool:
        return fusion.normalises_by_batch(self.module.norm5)

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, describe: bool
    ) -> tuple[Tensor, BatchStatistics | None]:
        norm5 = self.module.norm5
        if fusion.call_obstacle(x, 2):
            return reference.rectified_average(norm5(x)), None
        return functional.bn_relu_global_avgpool(x, fusion.batch_norm(norm5), statistics=statistics), None


class Features(nn.Sequential):
    """The convolutional part. Inside, feature maps are channels last; the result is so for a channels-last input alone,
    and contiguous for every other. ``norm0``, ``relu0`` and ``pool0``, the stem, run as one op."""

    __prepare_scriptable__ = fusion.refuse_scripting

    def stem_obstacle(self) -> str | None:
        """Why ``norm0``, ``relu0`` and ``pool0`` cannot run as one op, or None."""
        names = list(self._modules)
        if "norm0" not in names or names[names.index("norm0") :][:3] != STEM:
            return f"its children {', '.join(STEM)} do not follow each other"
        return (
            fusion.hook_obstacle(self, *STEM)
            or fusion.norm_obstacle(self, "norm0", 2)
            or fusion.relu_obstacle(self, "relu0")
            or fusion.max_pool_obstacle(self, "pool0")
        )

    def steps(self) -> list[Step | DenseBlock | Transition]:
        """Its children in order, the stem as one step if it can run as one."""
        modules = dict(self._modules)
        if self.stem_obstacle() is None:
            modules = {n: Stem(self) if n == "norm0" else m for n, m in modules.items() if n not in STEM[1:]}
        return [m if isinstance(m, Step) or _knows_statistics(m) else Step(m) for m in modules.values()]

    def through(self, x: Tensor, steps: Sequence[Step | DenseBlock | Transition]) -> Tensor:
        """``x``, which can run fused, through ``steps``, which begin with the first."""
        if any(isinstance(step, Stem) for step in steps[:2]):
            x = x.contiguous(memory_format=torch.channels_last)  # the images, instead of the larger maps made from them
        statistics = None
        for step, reader in zip(steps, [*steps[1:], None]):
            x, statistics = step.run(x, statistics, describe=reader is not None and reader.reads_statistics())
        return x

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x) if fusion.call_obstacle(x, 2) else self.through(x, self.steps())
        if not isinstance(x, Tensor) or functional.active_transform():
            return features  # made by stock modules, which keep the memory format
        if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            return features
        return features.contiguous()


def _knows_statistics(module: nn.Module) -> bool:
    """Whether calling ``module`` is nothing but its ``run``."""
    kind = next((kind for kind in (DenseBlock, Transition) if isinstance(module, kind)), None)
    return kind is not None and type(module).forward is kind.forward and not fusion.has_hooks(module)


class DenseNet(reference.DenseNet):
    """DenseNet with torchvision's arguments, parameter names and initialisation, in a fraction of the memory.

    Args:
        growth_rate: channels that each layer adds, k.
        block_config: number of layers of each dense block; any number of blocks.
        num_init_features: channels of the stem.
        bn_size: bottlenecks have bn_size * k channels; None for layers without a bottleneck.
        drop_rate: dropout rate of each layer's new features.
        num_classes: number of classes.
        memory_efficient: whether to recompute the bottlenecks in the backward pass instead of keeping them.
        in_channels: channels of the images.
        compression: theta; a transition keeps floor(theta * C) of C channels; 1 for none.
        small_inputs: the CIFAR stem (one 3x3 convolution) instead of the ImageNet stem.
        bias: whether the convolutions have biases.

    Input: images [N, in_channels, H, W], any floating dtype. Output: logits [N, num_classes].

    Raises:
        ValueError: an empty ``block_config`` or a ``drop_rate`` or ``compression`` out of range.
    """

    block_type = DenseBlock
    transition_type = Transition
    features_type = Features
    __prepare_scriptable__ = fusion.refuse_scripting

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
        *,
        in_channels: int = 3,
        compression: float = 0.5,
        small_inputs: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(
            growth_rate,
            block_config,
            num_init_features,
            bn_size,
            drop_rate,
            num_classes,
            in_channels=in_channels,
            compression=compression,
            small_inputs=small_inputs,
            bias=bias,
        )
        for module in self.modules():
            if isinstance(module, DenseBlock):
                module.memory_efficient = memory_efficient

    def head_obstacle(self) -> str | None:
        """Why ``features.norm5`` cannot run as one op with the ReLU and the average behind it, or None."""
        features = self.features
        if type(features) is not Features:
            return f"features is a {type(features).__name__}, not Features"
        if fusion.has_hooks(features):
            return "features has a hook or a forward of its own"
        if list(features._modules)[-1:] != ["norm5"]:
            return "norm5 is not the last of features"
        return fusion.hook_obstacle(features, "norm5") or fusion.norm_obstacle(features, "norm5", 2)

    def forward(self, x: Tensor) -> Tensor:
        if fusion.call_obstacle(x, 2) or self.head_obstacle():
            return super().forward(x)
        return self.classifier(self.features.through(x, [*self.features.steps()[:-1], Head(self.features)]))


Weights = str | PathLike[str] | Any | None


def _densenet(name: str, weights: Weights, progress: bool, kwargs: dict[str, Any]) -> DenseNet:
    state_dict = checkpoints.load(name, checkpoints.legacy_argument(weights, kwargs), progress)
    if state_dict is not None:
        num_classes = checkpoints.num_classes(state_dict)
        if kwargs.setdefault("num_classes", num_classes) != num_classes:
            raise ValueError(f"num_classes: expected {num_classes}, as the weights have, got {kwargs['num_classes']}")
    model = DenseNet(*ARCHITECTURES[name], **kwargs)
    if state_dict is not None:
        model.load_state_dict(state_dict)
    return model


def densenet121(weights: Weights = None, progress: bool = True, **kwargs: Any) -> DenseNet:
    """DenseNet-121.

    Args:
        weights: None; the name of torchvision's weights ("IMAGENET1K_V1" or "DEFAULT", with or without the enum's name
            before it); a member of torchvision's weights enum; or the path of a local checkpoint.
        progress: whether to show a progress bar while downloading.
        **kwargs: passed to :class:`DenseNet`; ``num_classes`` is taken from the weights.

    Raises:
        ValueError: no such weights, or ``num_classes`` is not the weights'.
        TypeError: ``weights`` is of another kind.
    """
    return _densenet("densenet121", weights, progress, kwargs)


def densenet161(weights: Weights = None, progress: bool = True, **kwargs: Any) -> DenseNet:
    """DenseNet-161 (k = 48); arguments and errors as for :func:`densenet121`."""
    return _densenet("densenet161", weights, progress, kwargs)


def densenet169(weights: Weights = None, progress: bool = True, **kwargs: Any) -> DenseNet:
    """DenseNet-169; arguments and errors as for :func:`densenet121`."""
    return _densenet("densenet169", weights, progress, kwargs)


def densenet201(weights: Weights = None, progress: bool = True, **kwargs: Any) -> DenseNet:
    """DenseNet-201; arguments and errors as for :func:`densenet121`."""
    return _densenet("densenet201", weights, progress, kwargs)


def densenet264(weights: Weights = None, progress: bool = True, **kwargs: Any) -> DenseNet:
    """DenseNet-264 of the paper, for which no weights are hosted; ``weights`` takes a local path."""
    return _densenet("densenet264", weights, progress, kwargs)
