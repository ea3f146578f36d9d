"""How kernels are launched: by the names of their arguments, on their tensors' device and its current stream.

Launches can be written down while they run, or planned: then they are written down and not run, and what they need is
compiled before they come. Nothing here waits for the device, so launches can be captured in a CUDA graph.
"""

import contextlib
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends.triton.config import Tile
from densenet_fast.progress import progress


class Launch(NamedTuple):
    """One launch: the kernel, its grid, its run-time arguments in the kernel's order, its compile-time constants, and
    the tile, of which the warps and stages count here."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int | float, ...]
    constants: dict[str, Any]
    tile: Tile

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def named(self) -> dict[str, Any]:
        """The arguments and constants by name."""
        return dict(zip(self.kernel.arg_names, self.arguments)) | self.constants

    @property
    def options(self) -> dict[str, Any]:
        """What a kernel is compiled with, besides its constants."""
        return {"num_warps": self.tile.warps, "num_stages": self.tile.stages, "enable_fp_fusion": True}

    @property
    def variant(self) -> tuple[Any, ...]:
        """Equal for launches that one compiled kernel serves. Kernels are not specialised on numbers."""
        tensors = [(t.dtype, t.data_ptr() % 16 == 0) for t in self.arguments if isinstance(t, Tensor)]
        return self.kernel, tuple(tensors), tuple(self.constants.items()), self.tile.warps, self.tile.stages

    def __str__(self) -> str:
        constants = ", ".join(f"{key}={value}" for key, value in self.constants.items())
        return f"{self.name}[{self.grid}]({constants}; {self.tile.warps} warps, {self.tile.stages} stages)"


_recordings: list[list[Launch]] = []


class _ThisThread(threading.local):
    plan: Callable[[Launch], None] | None = None
    """What takes this thread's launches instead of the device."""


_this_thread = _ThisThread()


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches that the ``with`` block runs, of every thread."""
    launches: list[Launch] = []
    _recordings.append(launches)
    try:
        yield launches
    finally:
        _recordings[:] = [other for other in _recordings if other is not launches]


@contextlib.contextmanager
def planning(append: Callable[[Launch], None] | None = None) -> Iterator[list[Launch]]:
    """Collects this thread's launches of the ``with`` block, or gives them to ``append``. None is run: results stay
    uninitialised."""
    launches: list[Launch] = []
    before, _this_thread.plan = _this_thread.plan, append or launches.append
    try:
        yield launches
    finally:
        _this_thread.plan = before


def is_planning() -> bool:
    """Whether this thread's launches are collected and not run."""
    return _this_thread.plan is not None


def is_recording() -> bool:
    """Whether launches are collected while they run."""
    return bool(_recordings)


def launcher(kernel: Any) -> Callable[..., None]:
    """The function that launches ``kernel``: ``launch(grid, tile, x=x, ..., ROWS=tile.rows)``.

    It takes each of the kernel's arguments and compile-time constants by its name. It runs on the device of the first
    argument, a tensor. It raises a TypeError that tells the kernel's name where a name is missing, unknown or given
    twice.

    Args:
        kernel: made by ``triton.jit``; annotated are its constants alone, which stand behind its arguments.
    """
    constant_names = kernel.fn.__annotations__.keys()
    names = [name for name in kernel.arg_names if name not in constant_names]

    def launch(grid: tuple[int, ...], tile: Tile, /, **named: Any) -> None:
        try:
            arguments = tuple(map(named.pop, names))
        except KeyError as missing:
            raise _misnamed(kernel, {*names[: names.index(missing.args[0])], *named}) from None
        if named.keys() != constant_names:
            raise _misnamed(kernel, {*names, *named})
        item = Launch(kernel, grid, arguments, named, tile)
        plan = _this_thread.plan
        if plan is not None:
            plan(item)
            return
        for launches in _recordings:
            launches.append(item)
        run(item)

    launch.__module__, launch.__qualname__ = kernel.fn.__module__, kernel.fn.__qualname__
    return launch


def _misnamed(kernel: Any, given: set[str]) -> TypeError:
    missing, unknown = sorted({*kernel.arg_names} - given), sorted(given - {*kernel.arg_names})
    faults = [f"{what} {', '.join(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
    return TypeError(f"{kernel.__name__}: expected each argument by its name, got {' and '.join(faults)}")


def run(item: Launch) -> None:
    """Runs a launch."""
    if 0 in item.grid:
        return
    with current(item.arguments[0].device):
        item.kernel.run(*item.arguments, grid=item.grid, warmup=False, **item.constants, **item.options)


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` torch's current one, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def compiled(item: Launch) -> Any:
    """The kernel that would be launched, compiled for the current device: Triton's ``CompiledKernel``."""
    return item.kernel.warmup(*item.arguments, grid=item.grid, **item.constants, **item.options)


def compile_all(launches: Iterable[Launch], device: torch.device, ignore_errors: bool = False) -> None:
    """Compiles what ``launches`` need for ``device`` and is not compiled yet. It shows a progress bar where that takes
    more than a second. From Python 3.12 on it compiles in parallel."""
    import triton

    variants = {item.variant: item for item in launches if math.prod(item.grid)}.values()
    told = "densenet_fast: compiling kernels, once"
    pool = ThreadPoolExecutor(max(1, min(len(variants), os.cpu_count() or 1)))
    if sys.version_info < (3, 12):  # whose parser fails at random in several threads: python/cpython issue 106905
        with current(device):
            for item in progress(variants, told, delay=1):
                with contextlib.suppress(Exception) if ignore_errors else contextlib.nullcontext():
                    _finished(compiled(item))
        return
    # An error that Triton's mode raised itself would leave it active.
    with current(device), pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        kernels = [compiled(item) for item in variants]
        for kernel in progress(kernels, told, delay=1):
            _finished(kernel)
    for kernel in kernels:
        if hasattr(kernel, "future") and not ignore_errors:
            kernel.result()


def _finished(kernel: Any) -> None:
    """Waits for a kernel that is being compiled."""
    if hasattr(kernel, "future"):
        wait([kernel.future])


def units(stride: int) -> tuple[int, int]:
    """(count, unit), whose product is ``stride``. ``unit`` is the largest power of two up to 16 that divides it.

    Triton knows of a run-time integer only whether 16 divides it. The unit is a compile-time constant. With it the
    loads of rows that are 8 half floats apart are 16 bytes wide as well.
    """
    unit = math.gcd(stride, 16)
    return stride // unit, unit
