"""What stands in for a GPU in a dry run: functions and classes that take the arguments of the real ones."""

from types import SimpleNamespace
from unittest import mock

import torch
from triton.backends.nvidia import driver

from densenet_fast.benchmarking import ceilings

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


def install() -> None:
    """For the rest of this process."""
    for name, value in RETURNED.items():
        setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name), return_value=value))
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=GIB)
    torch.cuda.get_device_properties = mock.create_autospec(torch.cuda.get_device_properties, return_value=properties)
    for owner, names in ((torch.cuda, ("CUDAGraph", "Stream", "graph")), (driver, ("CudaUtils", "CudaLauncher"))):
        for name in names:
            setattr(owner, name, mock.create_autospec(getattr(owner, name)))
    torch.cuda.current_stream = mock.create_autospec(torch.cuda.current_stream, return_value=torch.cuda.Stream())
    torch.cuda.graph.return_value.__enter__ = mock.MagicMock()
    torch.cuda.graph.return_value.__exit__ = mock.MagicMock(return_value=False)
    ceilings.COPIED["cpu"], ceilings.PRODUCTS["cpu"] = 1 << 20, ((64, 64, 64),)
