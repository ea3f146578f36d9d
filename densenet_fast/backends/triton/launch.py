"""How every kernel is launched: on its tensors' device and that device's current stream, and counted if asked.

Nothing here waits for the device, so launches can be captured in a CUDA graph.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends.triton.config import Tile


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its run-time arguments in order, its compile-time constants, warps, stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int | float, ...]
    constants: dict[str, Any]
    tile: Tile

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def __str__(self) -> str:
        constants = ", ".join(f"{key}={value}" for key, value in self.constants.items())
        return f"{self.name}[{self.grid}]({constants}; {self.tile.warps} warps, {self.tile.stages} stages)"


_recordings: list[list[Launch]] = []
_planning = 0


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches of the ``with`` block, of every thread."""
    launches: list[Launch] = []
    _recordings.append(launches)
    try:
        yield launches
    finally:
        _recordings[:] = [other for other in _recordings if other is not launches]


@contextlib.contextmanager
def planning() -> Iterator[list[Launch]]:
    """Collects the launches of the ``with`` block and runs none: results stay uninitialised."""
    global _planning
    _planning += 1
    try:
        with recording() as launches:
            yield launches
    finally:
        _planning -= 1


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int | float, tile: Tile, **constants: Any) -> None:
    """Launches ``kernel`` on the device of its first argument, a tensor."""
    item = Launch(kernel, grid, arguments, constants, tile)
    for launches in _recordings:
        launches.append(item)
    if not _planning:
        run(item)


def run(item: Launch) -> None:
    """Runs a launch."""
    if math.prod(item.grid) == 0:
        return
    device = item.arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        item.kernel[item.grid](
            *item.arguments,
            **item.constants,
            num_warps=item.tile.warps,
            num_stages=item.tile.stages,
            enable_fp_fusion=True,
        )


def units(stride: int) -> tuple[int, int]:
    """``stride`` as (count, unit), whose product it is, unit the largest power of two up to 16 that divides it.

    Triton knows of a run-time integer only whether 16 divides it; with the unit a compile-time constant, the loads of
    rows that are 8 half floats apart are 16 bytes wide as well.
    """
    unit = math.gcd(stride, 16)
    return stride // unit, unit
