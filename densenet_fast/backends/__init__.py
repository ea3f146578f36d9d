"""The kernels of the dense block, one module per way of running them; every backend offers ``aten``'s functions."""

from types import ModuleType

import torch

from densenet_fast.backends import aten

BACKENDS: tuple[ModuleType, ...] = (aten,)
"""All backends, the preferred one first."""


def select(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend that runs tensors of ``dtype`` on ``device``.

    Raises:
        TypeError: no backend has kernels for ``dtype`` on ``device``.
    """
    for backend in BACKENDS:
        if backend.unavailable() is None and backend.supports(device, dtype):
            return backend
    raise TypeError(f"expected a floating dtype that a backend supports on {device.type}, got {dtype}")
