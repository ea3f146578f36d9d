"""Models by name, as in ``torchvision.models``, and their registration in timm."""

import fnmatch
import importlib
from collections.abc import Iterable
from typing import Any

from densenet_fast import models, thirdparty
from densenet_fast.reference import ARCHITECTURES

__all__ = ["get_model", "list_models", "register_timm"]


def get_model(name: str, **config: Any) -> models.DenseNet:
    """Builds the model ``name``, like ``torchvision.models.get_model``: ``get_model("densenet121", weights=...)``.

    Raises:
        ValueError: there is no such model.
    """
    if not isinstance(name, str) or name.lower() not in ARCHITECTURES:
        raise ValueError(f"name: expected one of {list_models()}, got {name!r}")
    return getattr(models, name.lower())(**config)


def list_models(include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None) -> list[str]:
    """The names of the models, sorted: those that match ``include`` and do not match ``exclude``.

    Each is a wildcard pattern or several of them. By default all names are returned.
    """
    included, excluded = ([p] if isinstance(p, str) else [*(p or ())] for p in (include, exclude))
    return [
        name
        for name in sorted(ARCHITECTURES)
        if (not included or _matches(name, included)) and not _matches(name, excluded)
    ]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def register_timm() -> list[str]:
    """Registers converted versions of timm's DenseNets in timm, as ``densenet121_fast`` and so on.

    ``timm.create_model`` then takes these names, with the same weight tags and arguments. Returns the names.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    thirdparty.needed("timm", "register_timm")
    thirdparty.import_timm()
    return list(importlib.import_module("densenet_fast.timm_models").default_cfgs)
