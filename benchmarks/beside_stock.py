"""A training step of a network, stock beside converted: what ``styles.py`` and ``volumes.py`` share.

Times are of steps in turns, in one process. Each of the two has its faster memory layout, and stock has the memory of
the layout that needs less. Peak memory is what the first step adds, in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from densenet_fast.benchmarking.steps import DTYPES, enqueue
from densenet_fast.benchmarking.times import Timing, measure_times
from densenet_fast.memory import MIB, PeakMemory

__all__ = ["HEADER", "Entry", "cells", "in_layout", "measured", "peak", "peak_here", "shape", "told"]

HEADER = ("stock ms", "ours ms", "speed", "stock MiB", "ours MiB", "memory")
LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}
"""By the number of spatial dimensions. For one dimension torch has none."""


class Entry(Protocol):
    """A network, stock or converted, in one memory layout, with the input of a step.

    It is a dataclass. ``measure_times`` takes it as it takes a competitor's entry.
    """

    size: int
    batch: int
    dtype: str
    compiled: bool

    @property
    def layout(self) -> str:
        """Its name."""

    def model(self, device: torch.device, train: bool) -> nn.Module:
        """The network, from the same weights as the other one."""

    def images(self, batch: int, size: int, device: torch.device) -> Tensor:
        """The input, the same for both."""


def in_layout(thing: Any, channels_last: bool, dims: int) -> Any:
    """A network or its input, channels last if so wanted."""
    return thing.to(memory_format=LAYOUTS[dims]) if channels_last else thing


def measured(
    entries: Sequence[Entry], options: argparse.Namespace, peak: Callable[[Entry, argparse.Namespace], int]
) -> tuple[dict[str, Any], Entry, Entry]:
    """Measures time and memory of four ``entries``: stock in two layouts, then converted in two.

    Returns a row of figures and the entries of the faster layouts, stock and converted. ``peak`` measures the memory of
    one entry.
    """
    turns, first = [(entry, entry.batch) for entry in entries], entries[0]
    timings = measure_times(turns, first.size, DTYPES[first.dtype], True, options.device, options.repeats)
    stock, ours = (min(timings[i : i + 2], key=_median) for i in (0, 2))
    row = {"stock_layout": stock.entry.layout, "stock_s": _median(stock)}
    row |= {"ours_layout": ours.entry.layout, "ours_s": _median(ours), "speed_ratio": _median(stock) / _median(ours)}
    row["stock_mib"] = min(peak(entry, options) for entry in entries[:2]) / MIB
    row["ours_mib"] = peak(ours.entry, options) / MIB
    row["memory_ratio"] = row["ours_mib"] / row["stock_mib"]
    return row, stock.entry, ours.entry


def _median(timing: Timing) -> float:
    return timing.quantile(0.5)


def peak(script: str, entry: Entry, options: argparse.Namespace) -> int:
    """Bytes that the first training step adds, measured in a new process.

    The process is ``script`` with ``--peak`` and the entry as JSON. It prints :func:`peak_here`. What the C library
    frees it returns to the system at once; the memory of large tensors that is kept for the next ones counts.
    """
    command = [sys.executable, script, "--peak", json.dumps(asdict(entry))]
    command += ["--device", str(options.device), "--threads", str(options.threads)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(process.stdout)


def peak_here(entry: Entry, options: argparse.Namespace) -> int:
    """:func:`peak` in this process, which should have done nothing else."""
    torch.set_num_threads(options.threads)
    device = options.device
    model, images = entry.model(device, True), entry.images(entry.batch, entry.size, device)
    memory = PeakMemory(device)
    enqueue(model, images, DTYPES[entry.dtype], True)
    return memory.read().added


def shape(row: dict[str, Any], dims: int) -> str:
    """The row's input for a reader: ``2 of 64x64x64``."""
    return f"{row['batch']} of {'x'.join([str(row['size'])] * dims)}"


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The row's figures for a reader, under ``HEADER``."""
    return (
        f"{1e3 * row['stock_s']:.0f} ({row['stock_layout']})",
        f"{1e3 * row['ours_s']:.0f} ({row['ours_layout']})",
        f"{row['speed_ratio']:.2f}x",
        f"{row['stock_mib']:.0f}",
        f"{row['ours_mib']:.0f}",
        f"{row['memory_ratio']:.2f}",
    )


def told(kinds: Iterable[str]) -> str:
    """How many parts of each kind."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(kinds).items())
