"""The least time of a launch on a GPU that need not be there: the slowest of memory, L2 and products, and a start.

    seconds = max(DRAM bytes / copied, L2 bytes / cached, products by wgmma / wgmma + by mma.sync / mma) + start

The model leaves out uneven waves of blocks, too few blocks to hide what a load takes, arithmetic between a load and a
product, and conflicts of shared memory: there it is too short. It charges memory with what one launch writes and the
next reads. At small batches a cache of 50 MB holds that: there it is too long.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from densenet_fast.backends.triton import config
from densenet_fast.table import table
from launches.counts import Counts, total

__all__ = ["GPUS", "Gpu", "Row", "assumptions", "by_kernel", "model_table"]


class Figure(NamedTuple):
    """An assumption and where it is from."""

    value: float
    source: str


class Gpu(NamedTuple):
    """What the model assumes of a GPU.

    Attributes:
        device: what launches are configured by.
        copied: bytes a second that memory reads and writes.
        cached: bytes a second that the L2 cache serves. None where no figure is known; it then bounds nothing.
        wgmma, mma: multiply-adds of 16 bits a second by either instruction.
        start: seconds of a launch that does next to nothing.
    """

    device: config.Device
    copied: Figure
    cached: Figure | None
    wgmma: Figure
    mma: Figure
    start: Figure

    def times(self, counts: Counts, dtype: torch.dtype) -> dict[str, float]:
        """Seconds that each of the three takes for a launch, by name."""
        rate = 2 if dtype == torch.float32 else 1  # TF32 has half the rate, say the data sheets
        products = rate * (counts.wgmma / self.wgmma.value + counts.mma / self.mma.value)
        cached = 0.0 if self.cached is None else counts.l2 / self.cached.value
        return {"memory": counts.dram / self.copied.value, "L2": cached, "products": products}


RUN_3 = "benchmarks/results/nvidia_h200/run_3/kernels.txt"
CACHE = "github.com/te42kyfo/gpu-benches gpu-l2-cache/{}, reads"
SHARE = "the data sheet's {:g} T, times what an H200 reached of its own (403 of 494.7)"
REACHED = 403.3 / 494.7
"""The share of the data sheet's products that a matrix product reached on an H200."""
WARPS = 0.63
"""The share of a Hopper GPU's products that mma.sync reaches. Assumed."""
START = Figure(3e-6, f"measured on an H200, taken for all: unrolled_elementwise_kernel, 12 us in 4 launches ({RUN_3})")
HOPPER_WGMMA = Figure(403.3e12, f"measured on an H200, the best matrix product ({RUN_3})")
HOPPER_MMA = Figure(
    WARPS * 403.3e12, f"assumed, {WARPS} of wgmma's: the share of the peak in arXiv:2402.13499, not checked here"
)
HOPPER = config.Device(90, 132)

GPUS = {
    "h200": Gpu(
        HOPPER,
        Figure(4260e9, f"measured on an H200, a copy of 1 GiB ({RUN_3})"),
        Figure(9700e9, CACHE.format("h200.txt")),
        HOPPER_WGMMA,
        HOPPER_MMA,
        START,
    ),
    "h100": Gpu(
        HOPPER,
        Figure(3350e9 * 4260 / 4800, "the data sheet's 3,350 GB/s (SXM), times what an H200 copied of its own 4,800"),
        Figure(9700e9, CACHE.format("h200.txt") + " on an H200, of the same chip"),
        HOPPER_WGMMA,
        HOPPER_MMA,
        START,
    ),
    "a100": Gpu(
        config.Device(80, 108),
        Figure(1730e9, CACHE.format("a100_80.txt") + " beyond the cache (80 GB)"),
        Figure(5400e9, CACHE.format("a100_80.txt")),
        Figure(REACHED * 156e12, SHARE.format(156)),
        Figure(REACHED * 156e12, SHARE.format(156)),
        START,
    ),
    "rtx3090": Gpu(
        config.Device(80, 82),
        Figure(936e9 * 4260 / 4800, "the data sheet's 936 GB/s, times what an H200 copied of its own 4,800"),
        None,
        Figure(REACHED * 35.6e12, SHARE.format(35.6) + "; GA102 white paper, float32 sums"),
        Figure(REACHED * 35.6e12, SHARE.format(35.6) + "; GA102 white paper, float32 sums"),
        START,
    ),
}


class Row(NamedTuple):
    """A kernel's launches: their counts, the model's seconds, and the seconds that each bound accounts for."""

    counts: Counts
    seconds: float
    bound: dict[str, float]

    @property
    def bound_by(self) -> str:
        """What bounds the most of its time."""
        return max(self.bound, key=self.bound.__getitem__)


def by_kernel(counts: Sequence[Counts], gpu: Gpu, dtype: torch.dtype) -> list[Row]:
    """A row for each kernel, the longest first. A launch whose start is longer than what it does is bound by its
    start."""
    kernels: dict[str, list[Counts]] = {}
    for one in counts:
        kernels.setdefault(one.kernel, []).append(one)
    rows = []
    for kernel, launches in kernels.items():
        seconds, bound = 0.0, {"memory": 0.0, "L2": 0.0, "products": 0.0, "start": 0.0}
        for one in launches:
            times = gpu.times(one, dtype) | {"start": gpu.start.value}
            worst = max(times, key=times.__getitem__)
            took = max(t for name, t in times.items() if name != "start") + gpu.start.value
            seconds += took
            bound[worst] += took
        rows.append(Row(total(launches, kernel), seconds, bound))
    return sorted(rows, key=lambda row: -row.seconds)


def model_table(rows: Sequence[Row]) -> str:
    """For a reader."""
    header = ["kernel", "launches", "DRAM GB", "of it partials", "L2 GB", "G products", "model ms", "bound by"]
    cells = []
    whole = Row(total(row.counts for row in rows), sum(row.seconds for row in rows), {"-": 0.0})
    for row in (*rows, whole):
        c = row.counts
        amounts = (f"{n / 1e9:.3f}" for n in (c.dram, c.partials, c.l2))
        cells.append(
            (c.kernel, c.launches, *amounts, f"{c.products / 1e9:.1f}", f"{1e3 * row.seconds:.3f}", row.bound_by)
        )
    return table(header, cells)


def assumptions(gpu: Gpu) -> str:
    """The figures and their sources, for a reader."""
    rows = [
        ("multiprocessors", gpu.device.processors, "the data sheet's"),
        ("memory, GB/s", f"{gpu.copied.value / 1e9:.0f}", gpu.copied.source),
        (
            "L2 cache, GB/s",
            *(("-", "not known") if gpu.cached is None else (f"{gpu.cached.value / 1e9:.0f}", gpu.cached.source)),
        ),
        ("wgmma, T multiply-adds/s", f"{gpu.wgmma.value / 1e12:.0f}", gpu.wgmma.source),
        ("mma.sync, T multiply-adds/s", f"{gpu.mma.value / 1e12:.0f}", gpu.mma.source),
        ("start of a launch, us", f"{gpu.start.value * 1e6:.1f}", gpu.start.source),
    ]
    return table(["assumed", "", "source"], rows)
