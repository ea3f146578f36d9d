"""The kernels of the dense block, one module per way of running them; every backend offers ``aten``'s functions."""

import functools
import warnings
from types import ModuleType

import torch

from densenet_fast.backends import aten, cpu, cuda, triton

BACKENDS: tuple[ModuleType, ...] = (cuda, triton, cpu, aten)
"""All backends, the preferred one first."""


def select(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend that runs tensors of ``dtype`` on ``device``; warns once of a better one that is not available.

    Raises:
        TypeError: no backend has kernels for ``dtype`` on ``device``.
    """
    for backend in BACKENDS:
        if backend.supports(device, dtype):
            if backend.unavailable() is None:
                return backend
            _warn(f"densenet_fast: slower without its {backend.name} backend: {backend.unavailable()}")
    raise TypeError(f"expected a floating dtype that a backend supports on {device.type}, got {dtype}")


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
