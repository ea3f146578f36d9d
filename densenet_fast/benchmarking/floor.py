"""``bench --floor``: every kernel's time beside the least that the device's bandwidth and products allow."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from densenet_fast.benchmarking.ceilings import Ceilings, measure_ceilings, median_seconds
from densenet_fast.benchmarking.competitors import Entry
from densenet_fast.benchmarking.kernels import Kernels
from densenet_fast.benchmarking.networks import architecture
from densenet_fast.benchmarking.times import measure_times
from densenet_fast.benchmarking.traffic import Call, training_step
from densenet_fast.progress import progress
from densenet_fast.table import table

__all__ = ["Line", "as_row", "floor_lines", "floor_table", "largest_gap", "measure_calls"]

OUTSIDE = "outside the kernels"
MINIMAL_FILTERING = {torch.float32: 24 / 72, torch.bfloat16: 16 / 36}
"""The share of the definition's products that F(2x4, 3x3) and F(2x2, 3x3) need. They are the floor on a CPU, whose
kernels use the first in float32 and the second in bfloat16."""


@dataclass
class Line:
    """All calls of a kernel in a step.

    Attributes:
        kernel: its name.
        calls: how many.
        measured: seconds that they took.
        floor: seconds that they take at least.
        floor_by_memory: the part of ``floor`` in calls that memory bounds.
        bytes, products: what they move and multiply.
    """

    kernel: str
    calls: int = 0
    measured: float = 0.0
    floor: float = 0.0
    floor_by_memory: float = 0.0
    bytes: int = 0
    products: float = 0.0

    @property
    def gap(self) -> float:
        return self.measured - self.floor

    @property
    def bound(self) -> str:
        """What the floor is made of, mostly."""
        return "-" if not self.floor else "memory" if self.floor_by_memory >= self.floor / 2 else "products"


def measure_calls(calls: Sequence[Call], device: torch.device, dtype: torch.dtype, repeats: int) -> list[float]:
    """Seconds of each call. Equal calls are measured once."""
    kernels = Kernels(device, dtype)
    known: dict[tuple[object, ...], float] = {}
    seconds, part = [], None
    for call in progress(calls, "kernels"):
        if call.part != part:
            kernels.release()
            part = call.part
        key = call.kernel, call.grid, call.inputs, call.outputs, call.columns
        if key not in known:
            known[key] = median_seconds(kernels.prepare(call), device, repeats)
        seconds.append(known[key])
    return seconds


def floor_lines(
    network: str, batch: int, size: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[list[Line], Line, Ceilings]:
    """A line for each kernel and for what the step spends outside them, by its gap; the whole step; the ceilings."""
    ceilings = measure_ceilings(device, dtype)
    calls = training_step(architecture(network), batch, size, dtype.itemsize)
    seconds = measure_calls(calls, device, dtype, repeats)
    turns = [(Entry("ours", "channels_last", network), batch)]
    (timing,) = measure_times(turns, size, dtype, True, device, repeats, time.perf_counter() + 60)
    filtering = MINIMAL_FILTERING.get(dtype, 1.0) if device.type == "cpu" else 1.0
    lines = summarise(calls, seconds, ceilings, filtering)
    step = Line("whole step", len(calls), timing.quantile(0.5))
    for line in lines:
        step.floor += line.floor
        step.floor_by_memory += line.floor_by_memory
        step.bytes += line.bytes
        step.products += line.products
    rest = step.measured - sum(line.measured for line in lines)
    lines.append(Line(OUTSIDE, 0, max(0.0, rest)))
    return sorted(lines, key=lambda line: -line.gap), step, ceilings


def summarise(calls: Sequence[Call], seconds: Sequence[float], ceilings: Ceilings, filtering: float) -> list[Line]:
    """The calls of each kernel added up. ``filtering`` is the share of their products that 3x3 convolutions need."""
    lines: dict[str, Line] = {}
    for call, measured in zip(calls, seconds, strict=True):
        line = lines.setdefault(call.kernel, Line(call.kernel))
        products = call.products * (filtering if "conv3x3" in call.kernel else 1)
        least = ceilings.floor(call.bytes, products)
        line.calls += 1
        line.measured += measured
        line.floor += least
        line.floor_by_memory += least if call.bytes / ceilings.bandwidth >= products / ceilings.products else 0
        line.bytes += call.bytes
        line.products += products
    return list(lines.values())


def largest_gap(lines: Sequence[Line]) -> str:
    """A sentence."""
    worst = max(lines, key=lambda line: line.gap)
    return f"The largest gap: {worst.kernel}, {1e3 * worst.gap:.1f} ms above its floor of {1e3 * worst.floor:.1f} ms."


def floor_table(lines: Sequence[Line], step: Line, ceilings: Ceilings) -> str:
    """For a reader."""
    header = ["kernel", "calls", "measured ms", "floor ms", "ratio", "bound by", "gap ms", "GB moved", "G products"]
    rows = []
    for line in (*lines, step):
        ratio = f"{line.measured / line.floor:.2f}" if line.floor else "-"
        cells = (f"{1e3 * value:.1f}" for value in (line.measured, line.floor))
        counted = f"{1e3 * line.gap:.1f}", f"{line.bytes / 1e9:.2f}", f"{line.products / 1e9:.2f}"
        rows.append((line.kernel, line.calls or "", *cells, ratio, line.bound, *counted))
    limits = (
        f"Ceilings, measured: {ceilings.bandwidth / 1e9:.1f} GB/s copied, "
        f"{ceilings.products / 1e9:.0f} G multiply-adds/s in a matrix product."
    )
    return f"{limits} {largest_gap(lines)}\n\n{table(header, rows)}"


def as_row(line: Line, ceilings: Ceilings) -> dict[str, object]:
    """For CSV."""
    return {
        "kernel": line.kernel,
        "calls": line.calls,
        "measured_s": line.measured,
        "floor_s": line.floor,
        "ratio": line.measured / line.floor if line.floor else None,
        "bound_by": line.bound,
        "gap_s": line.gap,
        "bytes": line.bytes,
        "products": float(line.products),
        "ceiling_bytes_per_s": ceilings.bandwidth,
        "ceiling_products_per_s": ceilings.products,
    }
