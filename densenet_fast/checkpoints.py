"""Pretrained weights: torchvision's hosted checkpoints and local ones."""

import re
import types
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, Union

import torch
from torch import Tensor

from densenet_fast.thirdparty import import_torchvision

URLS = {
    "densenet121": "https://download.pytorch.org/models/densenet121-a639ec97.pth",
    "densenet161": "https://download.pytorch.org/models/densenet161-8d451a50.pth",
    "densenet169": "https://download.pytorch.org/models/densenet169-b2777c0a.pth",
    "densenet201": "https://download.pytorch.org/models/densenet201-c1103571.pth",
}
"""torchvision's checkpoints. Each name ends with the first digits of the file's SHA-256, which the download checks."""

NAMES = ("IMAGENET1K_V1", "DEFAULT")

_PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")
_DOTTED_KEY = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")
_NAME = re.compile(r"(?:\w+_Weights\.)?\w+")


def enum_name(model: str) -> str:
    """The name of torchvision's enum with the weights of ``model``, for instance "densenet121"."""
    return f"DenseNet{model.removeprefix('densenet')}_Weights"


ENUMS = tuple(enum_name(model) for model in URLS)


def enum(name: str) -> type:
    """The weights enum ``name`` of torchvision.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    try:
        torchvision = import_torchvision()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name}: expected torchvision, which it belongs to, to be installed; weights='IMAGENET1K_V1' works without"
        ) from error
    return getattr(torchvision.models, name)


class WeightsAnnotation(types.GenericAlias):
    """The union of the types that ``weights`` may have.

    torchvision's enum is one of them. Reading ``__args__`` imports torchvision.
    """

    def __new__(cls, name: str) -> "WeightsAnnotation":
        return super().__new__(cls, Union, (name, str, PathLike[str], type(None)))

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightsAnnotation, super().__args__[:1]

    @property
    def __args__(self) -> tuple[Any, ...]:
        name, *others = super().__args__
        try:
            return enum(name), *others
        except ModuleNotFoundError:
            return tuple(others)


def annotated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Annotates ``function``, which has a model's name, for ``torchvision.models.get_model_weights``."""
    function.__annotations__["weights"] = WeightsAnnotation(enum_name(function.__name__))
    return function


def legacy_argument(model: str, weights: Any, kwargs: dict[str, Any]) -> Any:
    """Translates torchvision's former ``pretrained=True``, also as first argument, to ``weights``.

    Warns as torchvision does. The warnings point at the code that calls the model's function. Other ``weights`` are
    returned as they are.

    Raises:
        TypeError: both ``weights`` and ``pretrained`` are given.
    """
    if "pretrained" not in kwargs and not isinstance(weights, bool):
        return weights
    if "pretrained" in kwargs:
        if weights is not None:
            raise TypeError(f"pretrained: expected no weights beside it, got {weights!r}")
        warnings.warn(
            "The parameter 'pretrained' is deprecated since 0.13 and may be removed in the future, please use "
            "'weights' instead.",
            UserWarning,
            stacklevel=4,
        )
    name = NAMES[0] if kwargs.pop("pretrained", weights) else None
    equivalent = f"weights={enum_name(model)}.{name}" if name else "weights=None"
    more = f" You can also use `weights={enum_name(model)}.DEFAULT` to get the most up-to-date weights." if name else ""
    warnings.warn(
        "Arguments other than a weight enum or `None` for 'weights' are deprecated since 0.13 and may be removed in "
        f"the future. The current behavior is equivalent to passing `{equivalent}`.{more}",
        UserWarning,
        stacklevel=4,
    )
    return name


def load(model: str, weights: Any, progress: bool) -> dict[str, Tensor] | None:
    """The state dict of ``weights`` for the architecture ``model``, for instance "densenet121", with today's key names.

    Args:
        weights: None, torchvision's name or enum member, or the path of a checkpoint.
        progress: whether to show a progress bar while downloading.

    Raises:
        KeyError: no weights have that name.
        TypeError: ``weights`` has another type, or is a member of another model's enum.
        ValueError: no weights are hosted for the model, or the file does not exist or has no weights.
    """
    if weights is None:
        return None
    if isinstance(weights, (str, PathLike)):
        path = Path(weights).expanduser()
        if path.is_file():
            return normalised(_read(path))
        url = _url_by_name(model, weights)
    else:
        url = _url_of_member(model, weights)
    return normalised(
        torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=progress, check_hash=True, weights_only=True
        )
    )


def _url_of_member(model: str, weights: Any) -> str:
    """The URL of ``weights``, a member of torchvision's enum."""
    if not hasattr(weights, "url"):
        expected = "None, a name, a torchvision weights enum member or a path"
        raise TypeError(f"weights: expected {expected}, got {type(weights).__name__}")
    if type(weights).__name__ != enum_name(model):
        raise TypeError(f"weights: expected a member of {enum_name(model)} for {model}, got {weights!r}")
    return weights.url


def _url_by_name(model: str, weights: str | PathLike[str]) -> str:
    """The URL of the weights with the name ``weights``."""
    if str(weights).removeprefix(f"{enum_name(model)}.") not in NAMES:
        error = KeyError if isinstance(weights, str) and _NAME.fullmatch(weights) else ValueError
        raise error(f"weights: expected one of {NAMES} or the path of a file that exists, got {str(weights)!r}")
    if model not in URLS:
        raise ValueError(f"weights: none are hosted for {model}; expected None or the path of a file")
    return URLS[model]


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"weights: expected a checkpoint of tensors, got {path}: {error!r}") from error


def normalised(checkpoint: Any) -> dict[str, Tensor]:
    """The model's state dict in ``checkpoint``, with today's key names.

    Unpacks a training checkpoint (``state_dict``, ``model_state_dict`` or ``model``). Removes the prefixes ``module.``
    of DataParallel and ``_orig_mod.`` of torch.compile. Renames the former ``denselayer1.norm.1`` to
    ``denselayer1.norm1``.

    Raises:
        ValueError: ``checkpoint`` has no state dict of a DenseNet.
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
    """The number of classes of the model with this ``state_dict``."""
    return state_dict["classifier.weight"].shape[0]
