"""A drop-in replacement for torchvision's DenseNet that never concatenates and keeps no normalised copy.

``densenet_fast.densenet121()`` in place of ``torchvision.models.densenet121()``: the same parameters, the same numbers.
"""

from densenet_fast import functional, nn, reference
from densenet_fast.conversion import convert, restore
from densenet_fast.explain import explain
from densenet_fast.models import DenseNet, densenet121, densenet161, densenet169, densenet201, densenet264
from densenet_fast.nn.fusion import set_fused
from densenet_fast.version import __version__

__all__ = [
    "DenseNet",
    "__version__",
    "convert",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "explain",
    "functional",
    "nn",
    "reference",
    "restore",
    "set_fused",
]
