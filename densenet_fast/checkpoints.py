"""Pretrained weights: torchvision's hosted checkpoints and local ones."""

import re
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

URLS = {
    "densenet121": "https://download.pytorch.org/models/densenet121-a639ec97.pth",
    "densenet161": "https://download.pytorch.org/models/densenet161-8d451a50.pth",
    "densenet169": "https://download.pytorch.org/models/densenet169-b2777c0a.pth",
    "densenet201": "https://download.pytorch.org/models/densenet201-c1103571.pth",
}
"""torchvision's checkpoints; the name's end is the start of the file's SHA-256, checked on download."""

NAMES = ("IMAGENET1K_V1", "DEFAULT")

_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")
_DOTTED_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")


def legacy_argument(weights: Any, kwargs: dict[str, Any]) -> Any:
    """``weights``, or what torchvision's former ``pretrained=True`` (also as first argument) stands for."""
    pretrained = kwargs.pop("pretrained", weights if isinstance(weights, bool) else None)
    if pretrained is None:
        return weights
    warnings.warn("pretrained is deprecated: use weights='IMAGENET1K_V1' or weights=None", FutureWarning, stacklevel=4)
    return "IMAGENET1K_V1" if pretrained else None


def load(model: str, weights: Any, progress: bool) -> dict[str, Tensor] | None:
    """The state dict of ``weights`` for the architecture named ``model`` ("densenet121"), with today's key names.

    Args:
        weights: None, torchvision's name or enum member, or the path of a checkpoint.
        progress: whether to show a progress bar while downloading.

    Raises:
        ValueError: no such weights, or those of another model.
        TypeError: ``weights`` is of another kind.
    """
    if weights is None:
        return None
    if isinstance(weights, (str, PathLike)):
        path = Path(weights).expanduser()
        if path.is_file():
            return normalised(_read(path))
    elif not hasattr(weights, "url"):
        raise TypeError(
            f"weights: expected None, a name, a torchvision weights enum member or a path, got {type(weights).__name__}"
        )
    return normalised(
        torch.hub.load_state_dict_from_url(
            _url(model, weights), map_location="cpu", progress=progress, check_hash=True, weights_only=True
        )
    )


def _url(model: str, weights: Any) -> str:
    enum = f"DenseNet{model.removeprefix('densenet')}_Weights"
    if hasattr(weights, "url"):
        if type(weights).__name__ != enum:
            raise ValueError(f"weights: expected a member of {enum} for {model}, got {weights!r}")
        return weights.url
    if str(weights).removeprefix(f"{enum}.") not in NAMES:
        raise ValueError(f"weights: expected one of {NAMES} or the path of a file that exists, got {str(weights)!r}")
    if model not in URLS:
        raise ValueError(f"weights: none are hosted for {model}; expected None or the path of a file")
    return URLS[model]


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights: expected a checkpoint of tensors, got {path}: {error!r}") from error


def normalised(checkpoint: Any) -> dict[str, Tensor]:
    """The model's state dict in ``checkpoint``, in today's key names.

    Unpacks a training checkpoint (``state_dict``, ``model_state_dict`` or ``model``), strips the prefixes ``module.``
    of DataParallel and ``_orig_mod.`` of torch.compile, and writes ``denselayer1.norm1`` for the former
    ``denselayer1.norm.1``.

    Raises:
        ValueError: it is no state dict of a DenseNet.
    """
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, dict) or not all(isinstance(key, str) for key in checkpoint):
        raise ValueError(f"weights: expected a state dict, got a {type(checkpoint).__name__}")
    state_dict = {_DOTTED_KEY.sub(r"\1\2", _PREFIX.sub("", key)): value for key, value in checkpoint.items()}
    if "classifier.weight" not in state_dict:
        found = list(checkpoint)[:5] if checkpoint else "none"
        raise ValueError(f"weights: expected the keys of a DenseNet with its classifier, got {found}")
    return state_dict


def num_classes(state_dict: dict[str, Tensor]) -> int:
    """The number of classes that ``state_dict`` distinguishes."""
    return state_dict["classifier.weight"].shape[0]
