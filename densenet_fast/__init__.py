"""A drop-in replacement for torchvision's DenseNet that never concatenates and keeps no normalised copy.

``densenet_fast.densenet121()`` in place of ``torchvision.models.densenet121()``: the same parameters, the same numbers.
"""

import importlib.util
from typing import Any

from densenet_fast import checkpoints, functional, nn, reference
from densenet_fast.conversion import convert, restore
from densenet_fast.explain import explain
from densenet_fast.models import DenseNet, densenet121, densenet161, densenet169, densenet201, densenet264
from densenet_fast.nn.fusion import set_fused
from densenet_fast.ops.flops import add_flops
from densenet_fast.registry import get_model, list_models, register_timm
from densenet_fast.version import __version__

__all__ = [
    "DenseNet",
    "__version__",
    "add_flops",
    "convert",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "explain",
    "functional",
    "get_model",
    "list_models",
    "nn",
    "reference",
    "register_timm",
    "restore",
    "set_fused",
]


def __getattr__(name: str) -> Any:
    """torchvision's enums of weights (``DenseNet121_Weights``, ...), which import torchvision when they are asked for.

    Raises:
        AttributeError: there is nothing of that name.
        ModuleNotFoundError: it is an enum and torchvision is not installed.
    """
    if name in checkpoints.ENUMS:
        return checkpoints.enum(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    enums = checkpoints.ENUMS if importlib.util.find_spec("torchvision") else ()
    return sorted({*globals(), *enums})
