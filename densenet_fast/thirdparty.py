"""Optional libraries, which are used if they are installed."""

import importlib
import importlib.util
from types import ModuleType

import torch

_declared_operators: list[torch.library.Library] = []


def needed(package: str, by: str) -> None:
    """Checks that ``package``, which ``by`` needs, is installed.

    Raises:
        ModuleNotFoundError: it is not; the message says what to install.
    """
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"{by} needs {package}, which is not installed: pip install {package}", name=package)


def import_torchvision() -> ModuleType:
    """Imports torchvision, even if its compiled operators do not load because torch is built for another device.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    # torchvision's import registers fake kernels of these two operators, so torch must have their declarations. Models
    # and data sets call neither.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared_operators.append(library)
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """Imports timm, and torchvision before it, as :func:`import_torchvision` does.

    Raises:
        ModuleNotFoundError: timm or torchvision is not installed.
    """
    import_torchvision()
    return importlib.import_module("timm")
