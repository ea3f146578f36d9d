"""Which NVIDIA GPUs kernels of a minimum compute capability can run on."""

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch


class _ThisThread(threading.local):
    device: torch.device | None = None


_this_thread = _ThisThread()


@contextlib.contextmanager
def standing_in(device: torch.device) -> Iterator[None]:
    """A context in which backends take this thread's CPU tensors for tensors on ``device``. Nothing is computed on
    them."""
    before, _this_thread.device = _this_thread.device, device
    try:
        yield
    finally:
        _this_thread.device = before


def meant(device: torch.device) -> torch.device:
    """The device that tensors on ``device`` stand in for, or ``device`` itself."""
    found = _this_thread.device
    return found if found is not None and device.type == "cpu" else device


@functools.cache
def obstacle(index: int, minimum: tuple[int, int]) -> str | None:
    """Why kernels of this ``minimum`` compute capability cannot run on GPU ``index``, or None."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= minimum:
        return None
    return "cuda:{} has compute capability {}.{}, below {}.{}".format(index, *capability, *minimum)


def obstacles(minimum: tuple[int, int]) -> list[str | None]:
    """:func:`obstacle` of every GPU."""
    return [obstacle(i, minimum) for i in range(torch.cuda.device_count())]


def unavailable(minimum: tuple[int, int]) -> str | None:
    """Why these kernels can run on none of the GPUs here, or None."""
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return "no CUDA device"
    found = obstacles(minimum)
    return None if None in found else "; ".join(found)


def serves(device: torch.device, minimum: tuple[int, int]) -> bool:
    """Whether these kernels can run on ``device``."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return obstacle(torch.cuda.current_device() if device.index is None else device.index, minimum) is None


def current_stream(device: torch.device) -> int:
    """The handle of this thread's current stream on ``device``, as Triton asks for it: no object is made of it. 0 on
    a CPU, which stands in for a GPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
