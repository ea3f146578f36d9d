"""Runs an op's body: by a launch plan where there is one, else in Python.

There are plans on GPUs that have both kinds of kernels. These bodies run in Python: those whose launches are being
recorded; backward passes of convolutions with biases and of layers without a bottleneck; processes that normalise
together; convolutions by torch, as in 1 and 3 dimensions; float64; and inputs that have to be copied first, such as a
contiguous input of a transition.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from densenet_fast.backends import cuda, plan, select, triton
from densenet_fast.backends.symbolic import Unplannable
from densenet_fast.backends.triton import launch

DEVICE = "cuda"
"""The type of the devices on which there are launch plans."""


class _ThisThread(threading.local):
    reason: str | None = "no op was called"


_this_thread = _ThisThread()


def run(name: str, body: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Returns ``body(*inputs)``, where ``body`` is that of the op ``name``."""
    reason = obstacle(inputs[0])
    if reason is None:
        result = plan.run(name, body, inputs)
        if not isinstance(result, Unplannable):
            _this_thread.reason = None
            return result
        reason = str(result)
    _this_thread.reason = reason
    return body(*inputs)


def last() -> str | None:
    """Why the last body of this thread had no launch plan; None if it had one."""
    return _this_thread.reason


def obstacle(x: Any) -> str | None:
    """Why there is no launch plan for ops on x, or None."""
    if x.device.type != DEVICE:
        return f"the input is on {x.device.type}"
    if launch.is_recording() or launch.is_planning():
        return "launches are recorded"
    return unserved(x.device, x.dtype)


@functools.cache
def unserved(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why tensors of ``dtype`` on ``device`` are not served by both kinds of kernels, or None."""
    if select(device, dtype) is not cuda:
        return "the compiled kernels for GPUs do not serve it"
    if triton.unavailable() is not None or not triton.supports(device, dtype):
        return triton.unavailable() or f"Triton's kernels do not serve {dtype} on {device}"
    return None
