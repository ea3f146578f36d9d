"""The DenseNets of the libraries that are installed, small and whole, and inputs for them."""

import importlib
from typing import Any

import pytest

from densenet_fast.thirdparty import import_torchvision

torchvision = import_torchvision()


def optional(name: str) -> Any:
    """The module ``name``, None where its library is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        return None


timm = optional("timm.models.densenet")
monai = optional("monai.networks.nets.densenet")


def skip_unless_installed(name: str) -> None:
    """Skips a test of the library with whose name ``name`` begins, where it is not installed."""
    library = name.split()[0]
    if {"timm": timm, "monai": monai}.get(library, torchvision) is None:
        pytest.skip(f"{library} is not installed (the Makefile installs it)")


DENSENET121 = {"torchvision": lambda: torchvision.models.densenet121(num_classes=10)}
SHAPES = {"torchvision": (6, 3, 128, 128), "timm": (6, 3, 128, 128)}
if timm is not None:
    DENSENET121["timm"] = lambda: timm.densenet121(num_classes=10)
if monai is not None:
    DENSENET121["monai 2-D"] = lambda: monai.DenseNet121(2, 1, 10)
    DENSENET121["monai 3-D"] = lambda: monai.DenseNet121(3, 1, 10)
SHAPES["monai 2-D"], SHAPES["monai 3-D"] = (6, 1, 128, 128), (8, 1, 64, 64, 64)
