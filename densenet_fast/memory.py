"""Peak memory of this process, on the CPU as resident memory, on a GPU as what torch has allocated."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["GIB", "MIB", "MemoryUse", "PeakMemory"]

MIB, GIB = 1 << 20, 1 << 30

CLEAR_REFS = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class MemoryUse(NamedTuple):
    """Bytes: the highest use since the measurement began, how much of it was added to the use at its beginning, and how
    much torch's allocator added to what it holds of a GPU's memory (on the CPU, the same as ``added``)."""

    peak: int
    added: int
    reserved: int


class PeakMemory:
    """Measures from its construction on; construct it when the model is built and nothing has been trained.

    On Linux the kernel's own high-water mark of the process is set back first, so that what happened earlier (imports,
    reading the data) does not count. Elsewhere the mark covers the process's whole life.
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
        """The use so far."""
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
        return  # not Linux, or not permitted: the mark then covers the process's whole life


def _peak_resident() -> int:
    # getrusage's ru_maxrss would include the peak of the process that started this one: exec does not reset it.
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
