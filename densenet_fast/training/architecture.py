"""From settings to a model: ours or the stock one, with the same architecture."""

import math

import torch
from torch import nn

from densenet_fast import reference
from densenet_fast.training.settings import Settings, UsageError

__all__ = ["architecture", "build_model", "check_image_size", "load_weights"]


def architecture(settings: Settings, *, in_channels: int, num_classes: int) -> dict[str, object]:
    """The constructor arguments that define the network, the same for both implementations."""
    return {
        "growth_rate": settings.growth_rate,
        "block_config": settings.block_config,
        "num_init_features": settings.num_init_features,
        "bn_size": settings.bn_size,
        "drop_rate": settings.drop_rate,
        "num_classes": num_classes,
        "in_channels": in_channels,
        "compression": settings.compression,
        "small_inputs": settings.small_inputs,
        "bias": settings.bias,
    }


def build_model(settings: Settings, *, in_channels: int, num_classes: int) -> nn.Module:
    """The model, freshly initialised from torch's default generator, on the CPU."""
    arguments = architecture(settings, in_channels=in_channels, num_classes=num_classes)
    if settings.is_reference:
        return reference.DenseNet(**arguments)
    from densenet_fast import DenseNet

    return DenseNet(**arguments, memory_efficient=settings.memory_efficient)


def check_image_size(settings: Settings, size: int) -> None:
    """Raises if the network would shrink images of ``size`` x ``size`` pixels to nothing."""
    stem = 1 if settings.small_inputs else 4
    remaining = math.ceil(size / stem) >> (len(settings.block_config) - 1)
    if remaining < 1:
        smallest = (1 << (len(settings.block_config) - 1)) * stem - (stem - 1)
        raise UsageError(
            f"--image-size: expected at least {smallest} for this network, got {size}; "
            "--small-inputs or fewer blocks (--block-config) would fit as well"
        )


def load_weights(model: nn.Module, path: str) -> None:
    """Loads a state dict, or the model of a checkpoint, from ``path``."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("model", state))
    except Exception as error:
        raise UsageError(f"--initial-weights: expected a state dict of this network, got {path}: {error}") from error
