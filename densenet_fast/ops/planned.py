"""An op's body, by a launch plan where there is one: on a GPU with both kinds of kernels. Else the body itself runs, in
Python: where launches are recorded, and where it does more than a plan holds.

That is the backward pass of convolutions with biases and of dense layers without a bottleneck; processes
that normalise together; convolutions by torch, as in 1 and 3 dimensions; float64; copies of what is not laid out as the
kernels read it, such as a contiguous input of a transition that a caller made."""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from densenet_fast.backends import cuda, plan, select, triton
from densenet_fast.backends.symbolic import Unplannable
from densenet_fast.backends.triton import launch

DEVICE = "cuda"
"""The type of the devices on which bodies are planned."""


class _ThisThread(threading.local):
    reason: str | None = "no op was called"


_this_thread = _ThisThread()


def run(name: str, body: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """``body(*inputs)``, which is the op ``name``'s."""
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
    """Why the body that this thread ran last was not planned, None if it was."""
    return _this_thread.reason


def obstacle(x: Any) -> str | None:
    """Why no op on x is planned, or None."""
    if x.device.type != DEVICE:
        return f"the input is on {x.device.type}"
    if launch.is_recording() or launch.is_planning():
        return "launches are recorded"
    return unserved(x.device, x.dtype)


@functools.cache
def unserved(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why not both kinds of kernels serve tensors of ``dtype`` on ``device``, or None."""
    if select(device, dtype) is not cuda:
        return "the compiled kernels for GPUs do not serve it"
    if triton.unavailable() is not None or not triton.supports(device, dtype):
        return triton.unavailable() or f"Triton's kernels do not serve {dtype} on {device}"
    return None
