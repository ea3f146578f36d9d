"""Peak memory of this process: resident memory on the CPU, memory allocated by torch on a GPU."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["GIB", "MIB", "MemoryUse", "PeakMemory"]

MIB, GIB = 1 << 20, 1 << 30

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class MemoryUse(NamedTuple):
    """Memory use since the measurement began, in bytes."""

    peak: int
    """The highest use."""
    added: int
    """``peak`` minus the use at the beginning."""
    reserved: int
    """The GPU memory that torch's allocator reserved in addition; on the CPU, the same as ``added``."""


class PeakMemory:
    """Measures from its construction on. Construct it after the model, before the first training step.

    On Linux the constructor resets the kernel's high-water mark of the process, so that earlier use (imports, reading
    the data) does not count. On other systems the mark covers the whole life of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.baseline = torch.cuda.memory_allocated(device)
            self.reserved_baseline = torch.cuda.memory_reserved(device)
        else:
            _reset_peak_resident()
            self.baseline = _peak_resident()

    def read(self) -> MemoryUse:
        """The memory use so far."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device) - self.reserved_baseline
            return MemoryUse(peak, peak - self.baseline, reserved)
        peak = _peak_resident()
        added = max(0, peak - self.baseline)
        return MemoryUse(peak, added, added)


def _reset_peak_resident() -> None:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return  # not Linux, or not permitted: the mark covers the whole life of the process


def _peak_resident() -> int:
    # getrusage's ru_maxrss may include the peak of the parent process, because exec does not reset it.
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
