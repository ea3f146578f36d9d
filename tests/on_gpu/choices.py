"""Configurations that are open, each timed beside the table's, and its results compared with that one's."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from densenet_fast.backends.triton import config, launch, tune
from densenet_fast.backends.triton.config import Tile
from densenet_fast.backends.triton.launch import Launch
from densenet_fast.benchmarking.ceilings import median_seconds
from helpers import error
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
        Wrong: its results are others than those of the table's configuration.
    """
    device, dtype = torch.device(settings.device), tune.DTYPES[settings.dtypes[0]][0]
    now = config.tile(choice.kernel, config.device_of(device), dtype, LIMIT)
    table, other = (launches(choice.kernel, settings, each, device) for each in (now, tile))
    worst = max(map(difference, table, other))
    if not worst <= torch.finfo(dtype).eps:
        raise Wrong(f"its results are off by {worst:.2e} from those of the table's configuration", error=worst)
    times = []
    for items in (table, other):
        times.append(sum(median_seconds(partial(launch.run, item), device, settings.repeats) for item in items))
    return {"kernel": choice.kernel, "tile": tuple(tile), "table_s": times[0], "seconds": times[1], "error": worst}


def launches(kernel: str, settings: Settings, tile: Tile, device: torch.device) -> list[Launch]:
    """Of the kernel, in ``tile``, on scratch tensors on ``device``."""
    dtype, key = tune.DTYPES[settings.dtypes[0]][0], (config.device_of(device).generation, settings.precision)
    with tune.row_of(kernel, key, tile):
        steps = [tune.training_step(shape, dtype, device) for shape in settings.shapes]
    return [item for step in steps for item in step if item.name == kernel]


def difference(one: Launch, other: Launch) -> float:
    """The largest relative error between what two launches leave in their matrices, from the same random values; where
    one has more partial results than the other, of their sums."""
    for item in (one, other):
        for i, matrix in matrices(item.arguments):
            matrix.normal_(generator=torch.Generator(matrix.device).manual_seed(i))
        launch.run(item)
    theirs, errors = dict(matrices(other.arguments)), [0.0]
    for i, matrix in matrices(one.arguments):
        got = theirs[i]
        if got.shape != matrix.shape:
            matrix, got = matrix.sum(0), got.sum(0)
        errors.append(error(got, matrix))
    return max(errors)


def matrices(arguments: Sequence[object]) -> Iterator[tuple[int, Tensor]]:
    """With their numbers."""
    return ((i, a) for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.dtype.is_floating_point)
