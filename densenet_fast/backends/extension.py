"""The compiled kernels: one shared library, loaded where it is installed."""

import functools
import os
from pathlib import Path

import torch

LIBRARY = Path(os.environ.get("DENSENET_FAST_LIBRARY") or Path(__file__).parents[1] / "_kernels.so")
"""The path of the library: beside the package, or the one in the environment variable DENSENET_FAST_LIBRARY."""


@functools.cache
def unavailable() -> str | None:
    """Loads the library. Returns why it cannot be used, or None."""
    if not LIBRARY.is_file():
        return (
            "the compiled kernels are not installed (pip install --no-build-isolation . with a C++ compiler and ninja)"
        )
    try:
        torch.ops.load_library(LIBRARY.resolve())
    except OSError as error:
        return f"the compiled kernels do not load: {error.__cause__ or error}"
    return None
