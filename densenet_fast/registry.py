"""Models by name, as in ``torchvision.models``; and in timm's registry."""

import fnmatch
import importlib
from collections.abc import Iterable
from typing import Any

from densenet_fast import models, thirdparty
from densenet_fast.reference import ARCHITECTURES

__all__ = ["get_model", "list_models", "register_timm"]


def get_model(name: str, **config: Any) -> models.DenseNet:
    """The model of that name, as ``torchvision.models.get_model`` has it: ``get_model("densenet121", weights=...)``.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(name, str) or name.lower() not in ARCHITECTURES:
        raise ValueError(f"name: expected one of {list_models()}, got {name!r}")
    return getattr(models, name.lower())(**config)


def list_models(include: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None) -> list[str]:
    """The names that :func:`get_model` knows, or those that match ``include`` (wildcards, one or several) and do not
    match ``exclude``."""
    included, excluded = ([given] if isinstance(given, str) else [*(given or ())] for given in (include, exclude))
    return [
        name
        for name in sorted(ARCHITECTURES)
        if (not included or _matches(name, included)) and not _matches(name, excluded)
    ]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def register_timm() -> list[str]:
    """Registers timm's densenets, converted, with timm, as ``densenet121_fast`` and so on: ``timm.create_model`` takes
    these names with the same tags of weights and the same arguments. Returns them.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    thirdparty.needed("timm", "register_timm")
    thirdparty.import_timm()
    return list(importlib.import_module("densenet_fast.timm_models").default_cfgs)
