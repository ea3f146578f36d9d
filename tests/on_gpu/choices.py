"""Configurations that are open, each timed beside the table's, and its results compared with float64."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch

from densenet_fast.backends.triton import config, launch, tune
from densenet_fast.backends.triton.config import Tile
from densenet_fast.backends.triton.launch import Launch
from densenet_fast.benchmarking.ceilings import median_seconds
from on_gpu.checks import Check, Record, Wrong
from on_gpu.settings import Choice, Settings

LIMIT = 128
"""Columns of the results of the table's row that is compared with."""


def checks(settings: Settings) -> list[Check]:
    """One a kernel and configuration."""
    return [
        Check(f"{choice.kernel}, {label}", partial(compared, settings, choice, tile))
        for choice in settings.choices
        for label, tile in choice.tiles.items()
    ]


def compared(settings: Settings, choice: Choice, tile: Tile) -> Record:
    """Seconds of the kernel's launches in a layer of each shape, in the table's configuration and in this one.

    Raises:
        Wrong: its results are further from float64 than allowed.
    """
    bench = Bench(choice.kernel, settings)
    fault = bench.fault(tile)
    if fault:
        raise Wrong(fault, tile=tuple(tile))
    return {
        "kernel": choice.kernel,
        "tile": tuple(tile),
        "table_s": bench.seconds(bench.now),
        "seconds": bench.seconds(tile),
    }


class Bench:
    """Layers in which a kernel is timed, and what is right of the last."""

    def __init__(self, kernel: str, settings: Settings) -> None:
        self.kernel, self.settings, self.device = kernel, settings, torch.device(settings.device)
        self.dtype = tune.DTYPES[settings.dtypes[0]][0]
        self.target = config.device_of(self.device)
        self.now = config.tile(kernel, self.target, self.dtype, LIMIT)
        self.steps = [tune.Step(shape, self.dtype, self.device) for shape in settings.shapes]
        self.results = tune.Results(self.steps[-1])

    def row(self, tile: Tile) -> AbstractContextManager[None]:
        """The table with ``tile``."""
        return tune.row_of(self.kernel, config.row(self.target, self.dtype), tile)

    def launches(self, tile: Tile, steps: Sequence[tune.Step]) -> list[Launch]:
        """The kernel's."""
        with self.row(tile), config.assume(self.target):
            return [item for step in steps for item in step.launches() if item.name == self.kernel]

    def fault(self, tile: Tile) -> str | None:
        """What is wrong with the results, or None."""
        with self.row(tile):
            return self.results.fault()

    def seconds(self, tile: Tile) -> float:
        """Of all launches, the sum of their medians."""
        items, repeats = self.launches(tile, self.steps), self.settings.repeats
        return sum(median_seconds(partial(launch.run, item), self.device, repeats) for item in items)
