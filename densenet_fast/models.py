"""The drop-in DenseNet: torchvision's models, parameter names and initialisation, with fused parts."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast import checkpoints, pretrained, reference
from densenet_fast.nn import DenseBlock, Transition, calls, fusion
from densenet_fast.nn.features import Features, rectified
from densenet_fast.nn.snapshot import Found, Memory
from densenet_fast.nn.whole import Head, Whole
from densenet_fast.reference import ARCHITECTURES

__all__ = ["DenseNet", "densenet121", "densenet161", "densenet169", "densenet201", "densenet264"]


class DenseNet(reference.DenseNet):
    """DenseNet with torchvision's arguments, parameter names and initialisation, in a fraction of the memory.

    Args:
        growth_rate: number of channels that each layer adds, k.
        block_config: number of layers of each dense block; any number of blocks.
        num_init_features: number of channels of the stem.
        bn_size: bottlenecks have bn_size * k channels; None for layers without a bottleneck.
        drop_rate: dropout rate of each layer's new features.
        num_classes: number of classes.
        memory_efficient: whether the backward pass recomputes the bottlenecks and the output of the stem's convolution.
            They are not stored then.
        in_channels: number of channels of the images.
        compression: theta; a transition reduces C channels to floor(theta * C); 1 for no reduction.
        small_inputs: the CIFAR stem (one 3x3 convolution) instead of the ImageNet stem.
        bias: whether the convolutions have biases.

    Input: images [N, in_channels, H, W], any floating dtype. Output: logits [N, num_classes].

    Raises:
        ValueError: an empty ``block_config`` or a ``drop_rate`` or ``compression`` out of range.
    """

    block_type = DenseBlock
    transition_type = Transition
    features_type = Features

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
        self._arguments = (
            ("growth_rate", growth_rate),
            ("block_config", (*block_config,)),
            ("num_init_features", num_init_features),
            ("bn_size", bn_size),
            ("drop_rate", drop_rate),
            ("num_classes", num_classes),
            ("memory_efficient", memory_efficient),
            ("in_channels", in_channels),
            ("compression", compression),
            ("small_inputs", small_inputs),
            ("bias", bias),
        )

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes the model's arguments to ``config.json`` and its tensors to ``model.safetensors``, both in ``folder``.

        Creates ``folder`` if it does not exist. ``huggingface_hub.upload_folder`` turns it into a repository.

        Raises:
            ModuleNotFoundError: safetensors is not installed.
            ValueError: ``folder`` is a file, or a part of the model was replaced, so that the arguments no longer
                rebuild it.
        """
        arguments = dict(self._arguments)
        if isinstance(self.classifier, nn.Linear):
            arguments["num_classes"] = self.classifier.out_features
        pretrained.save(self, arguments, folder)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **arguments: Any,
    ) -> "DenseNet":
        """Loads a model from a folder or from a repository of the Hugging Face Hub, in eval mode.

        :meth:`save_pretrained` writes such a folder. A repository is an uploaded folder, or one of timm's DenseNets
        ("timm/densenet121.ra_in1k").

        Args:
            source: the folder, or the repository's name, owner/name.
            revision, token, cache_dir, force_download, local_files_only: see ``huggingface_hub.hf_hub_download``.
            **arguments: arguments of :class:`DenseNet` that replace the saved ones.

        Raises:
            ModuleNotFoundError: safetensors is not installed, or, for a repository, huggingface_hub.
            ValueError: the folder does not exist, or does not contain a model of this class with these arguments.
        """
        options = dict(revision=revision, token=token, cache_dir=cache_dir, force_download=force_download)
        options["local_files_only"] = local_files_only
        config, state_dict = pretrained.read(source, arguments, options)
        try:
            model = cls(**config)
        except TypeError as error:
            raise ValueError(f"source: expected arguments of {cls.__name__} in {source}, got {config}") from error
        pretrained.check(f"source: expected in {source}", config, model, state_dict)
        model.load_state_dict(state_dict)
        return model.eval()

    def head_obstacle(self) -> str | None:
        """Why ``features.norm5``, the ReLU and the average behind it cannot run as one op, or None."""
        if type(self).forward is not DenseNet.forward:
            return f"{type(self).__name__} has a forward of its own"
        features = self.features
        if type(features) is not Features:
            return f"features is a {type(features).__name__}, not Features"
        if fusion.has_hooks(features):
            return "features has a hook or a forward of its own"
        if list(features._modules)[-1:] != ["norm5"]:
            return "norm5 is not the last of features"
        return fusion.hook_obstacle(features, "norm5") or fusion.norm_obstacle(features, "norm5", 2)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            reason, whole = fusion.chain_obstacle(x), None
            if reason is None:
                reason, whole = _head_memory(self)
            if reason is None:
                return self.classifier(whole.means(self.features, x))
            calls.note(self, reason, None, "Head")
        return self.classifier(reference.average(rectified(self.features(x))))


def _examine_head(model: DenseNet) -> Found:
    reason = model.head_obstacle()
    return Found(reason, Whole(Head(model)) if reason is None else None)


_head_memory = Memory(_examine_head, lambda model: [model.features, model.features.norm5], (DenseNet,))

fusion.watch(DenseNet, "forward")


Weights = str | PathLike[str] | Any | None


def _densenet(name: str, weights: Weights, progress: bool, kwargs: dict[str, Any]) -> DenseNet:
    state_dict = checkpoints.load(name, checkpoints.legacy_argument(name, weights, kwargs), progress)
    if state_dict is not None:
        num_classes = checkpoints.num_classes(state_dict)
        if kwargs.setdefault("num_classes", num_classes) != num_classes:
            raise ValueError(f"num_classes: expected {num_classes}, as the weights have, got {kwargs['num_classes']}")
    model = DenseNet(*ARCHITECTURES[name], **kwargs)
    if state_dict is not None:
        model.load_state_dict(state_dict)
    return model


@checkpoints.annotated
def densenet121(weights: Weights = None, progress: bool = True, **kwargs: Any) -> DenseNet:
    """DenseNet-121.

    Args:
        weights: None; the name of torchvision's weights ("IMAGENET1K_V1" or "DEFAULT", with or without the enum's name
            in front); a member of torchvision's weights enum; or the path of a local checkpoint.
        progress: whether to show a progress bar while downloading.
        **kwargs: passed to :class:`DenseNet`; ``num_classes`` is taken from the weights.

    ``pretrained=True``, also as the first argument, works as it did in torchvision: it warns, and loads
    "IMAGENET1K_V1".

    Raises:
        KeyError: no weights have that name.
        TypeError: ``weights`` has another type, or is a member of another model's enum.
        ValueError: the file does not exist or does not contain such weights, or ``num_classes`` differs from the
            weights.
    """
    return _densenet("densenet121", weights, progress, kwargs)


@checkpoints.annotated
def densenet161(weights: Weights = None, progress: bool = True, **kwargs: Any) -> DenseNet:
    """DenseNet-161 (k = 48); arguments and errors as for :func:`densenet121`."""
    return _densenet("densenet161", weights, progress, kwargs)


@checkpoints.annotated
def densenet169(weights: Weights = None, progress: bool = True, **kwargs: Any) -> DenseNet:
    """DenseNet-169; arguments and errors as for :func:`densenet121`."""
    return _densenet("densenet169", weights, progress, kwargs)


@checkpoints.annotated
def densenet201(weights: Weights = None, progress: bool = True, **kwargs: Any) -> DenseNet:
    """DenseNet-201; arguments and errors as for :func:`densenet121`."""
    return _densenet("densenet201", weights, progress, kwargs)


def densenet264(weights: Weights = None, progress: bool = True, **kwargs: Any) -> DenseNet:
    """DenseNet-264 of the paper. No weights are hosted for it; ``weights`` may be a local path."""
    return _densenet("densenet264", weights, progress, kwargs)
