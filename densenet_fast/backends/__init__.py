"""The kernels of the dense block, one object per way of running them.

``aten``, ``cpu``, ``cuda`` and ``triton`` are these objects here; the modules of the same names hold their classes.
``contract`` says what each of their functions does.
"""

import functools
import warnings
from collections.abc import Sequence

import torch

from densenet_fast.backends.aten import aten
from densenet_fast.backends.contract import FUNCTIONS, Backend
from densenet_fast.backends.cpu import cpu
from densenet_fast.backends.cuda import cuda
from densenet_fast.backends.optional import OPTIONAL
from densenet_fast.backends.triton import triton

__all__ = ["BACKENDS", "aten", "capabilities", "cpu", "cuda", "select", "serving", "triton"]

BACKENDS: tuple[Backend, ...] = (cuda, triton, cpu, aten)
"""All backends, the preferred one first."""


def select(device: torch.device, dtype: torch.dtype) -> Backend:
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


def serving(device: torch.device, dtype: torch.dtype) -> list[Backend]:
    """The backends that can run tensors of ``dtype`` on ``device``, the preferred one first."""
    return [b for b in BACKENDS if b.unavailable() is None and b.supports(device, dtype)]


def capabilities(backends: Sequence[Backend], dtype: torch.dtype) -> dict[str, str | None]:
    """For each function of the contract the name of the backend whose kernel runs it: the first of ``backends``, which
    serve the same tensors of ``dtype``, that has its own. None where an optional function has no kernel."""
    return {
        function: next((b.name for b in backends if b.has(function, dtype, backends)), None)
        for function in (*FUNCTIONS, *OPTIONAL)
    }


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
