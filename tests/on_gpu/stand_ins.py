"""What stands in for a GPU in a dry run: functions and classes that take the arguments of the real ones."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.backends.nvidia import driver

from backends.triton import interpreter
from densenet_fast.backends import cuda_kernels, nvidia, plan, triton
from densenet_fast.benchmarking import ceilings
from densenet_fast.ops import planned

GIB = 1 << 30

RETURNED = {
    "current_device": 0,
    "device_count": 1,
    "empty_cache": None,
    "get_device_capability": (9, 0),
    "get_device_name": "a stand-in",
    "is_available": True,
    "max_memory_allocated": GIB,
    "mem_get_info": (GIB, GIB),
    "memory_allocated": 0,
    "memory_reserved": 0,
    "reset_peak_memory_stats": None,
    "set_sync_debug_mode": None,
    "stream": mock.MagicMock(),
    "synchronize": None,
}
"""What each function returns."""


CLASSES = {torch.cuda: ("CUDAGraph", "Stream", "graph"), driver: ("CudaUtils", "CudaLauncher")}
SMALL = {"COPIED": {"cpu": 1 << 20}, "PRODUCTS": {"cpu": ((64, 64, 64),)}}
"""What the ceilings are measured with."""

_installed = contextlib.ExitStack()


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """Bodies on CPU tensors are planned, and plans replayed launch by launch, where all kernels run on CPUs: emulated
    and interpreted."""
    replay = mock.patch.object(plan.Plan, "replay", _interpreted)
    with mock.patch.object(planned, "DEVICE", "cpu"), replay:
        yield


_kinds: dict[plan.Plan, int] = {}
"""Of tensors, for which each plan was made and replayed first."""


def _interpreted(made: plan.Plan, tensors: list[torch.Tensor]) -> Any | None:
    kind = torch.ops.densenet_fast.cuda_signature(tensors)
    return made.interpret(tensors) if _kinds.setdefault(made, kind) == kind else None


def forget_devices() -> None:
    """What was found out about them."""
    for known in (triton.unavailable, cuda_kernels.unavailable, nvidia.obstacle, planned.unserved):
        known.cache_clear()


def install() -> None:
    """For the rest of this process."""
    if triton.interpreted():
        interpreter.take()
    _installed.enter_context(installed())


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """In a ``with`` block."""
    with contextlib.ExitStack() as stack:
        forget_devices()
        stack.callback(forget_devices)

        def replace(owner: Any, name: str, **options: Any) -> Any:
            made = mock.create_autospec(getattr(owner, name), **options)
            return stack.enter_context(mock.patch.object(owner, name, made))

        for name, value in RETURNED.items():
            replace(torch.cuda, name, return_value=value)
        properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=GIB)
        replace(torch.cuda, "get_device_properties", return_value=properties)
        for owner, names in CLASSES.items():
            for name in names:
                replace(owner, name)
        replace(torch.cuda, "current_stream", return_value=torch.cuda.Stream())
        torch.cuda.graph.return_value.__enter__ = mock.MagicMock()
        torch.cuda.graph.return_value.__exit__ = mock.MagicMock(return_value=False)
        for name, value in SMALL.items():
            stack.enter_context(mock.patch.dict(getattr(ceilings, name), value))
        yield
