"""What the device can do at best, measured: how many bytes it copies a second, how many multiply-adds it makes."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

__all__ = ["Ceilings", "measure_ceilings", "seconds_of"]

COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Bytes of the source of the copy, far above any cache."""
PRODUCTS = {
    "cpu": ((1024, 1024, 1024), (8192, 128, 512), (4096, 512, 512)),
    "cuda": ((8192, 8192, 8192), (1 << 18, 128, 1024), (1 << 16, 512, 512)),
}
"""Rows, columns and terms of the products that are tried; the best counts. The long ones are shaped as a dense
block's."""
HEAD_START = 4_000_000
"""Cycles, about two milliseconds, that a GPU waits before it begins a run, until all of its launches have arrived."""


class Ceilings(NamedTuple):
    """Bytes read and written a second by a copy, multiply-adds a second by a matrix product."""

    bandwidth: float
    products: float

    def floor(self, moved: float, products: float) -> float:
        """Seconds that a kernel needs at least: to move ``moved`` bytes and, meanwhile, to make ``products``."""
        return max(moved / self.bandwidth, products / self.products)


def measure_ceilings(device: torch.device, dtype: torch.dtype, repeats: int = 7) -> Ceilings:
    """Measures both, the best of ``repeats``. Products are in ``dtype``, as torch's settings have them (TF32 if
    allowed)."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = min(seconds_of(lambda: target.copy_(source), device, repeats, flush=False))
    rates = []
    for rows, columns, terms in PRODUCTS[device.type]:
        a, b = (torch.randn(s, device=device).to(dtype) for s in ((rows, terms), (terms, columns)))
        best = min(seconds_of(lambda a=a, b=b: a @ b, device, repeats, flush=False))
        rates.append(rows * columns * terms / best)
    return Ceilings(2 * COPIED[device.type] / copy, max(rates))


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int, flush: bool = True) -> list[float]:
    """Seconds of each of ``repeats`` runs, after one of warming up.

    On a GPU they are by its own clock, without what the host needs to enqueue the runs. With ``flush`` its cache is
    emptied before each.
    """
    run()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return times
    cache = torch.empty(1 << 28, dtype=torch.uint8, device=device) if flush else None
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        if cache is not None:
            cache.zero_()
        torch.cuda._sleep(HEAD_START)
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(stop) * 1e-3 for start, stop in events]


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of :func:`seconds_of`."""
    return median(seconds_of(run, device, repeats))
