"""``python -m densenet_fast.backends.triton.tune``: measures launch configurations and prints rows for config.TABLE.

For each product and each class of widths, every candidate runs on scratch tensors of a few layers' shapes. The one of
the least total time is printed as the table writes it. The time of the table's row is printed beside it. Left out are
candidates that do not fit the device, whose code has hazards (``hazards.py``, ``races.py``), or whose results are not
as near to float64 as torch's. With --dry-run nothing runs: it plans every launch, on any machine.
"""

import argparse
import copy
import csv
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import aten
from densenet_fast.backends import triton as backend
from densenet_fast.backends.affine import (
    Affine,
    Completion,
    Reader,
    ThroughStatistics,
    Unfinished,
    accumulation_dtype,
    empty_statistics,
)
from densenet_fast.backends.contract import Backend
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.config import ANY, Device, Tile
from densenet_fast.backends.triton.hazards import disassembled, register_hazards
from densenet_fast.backends.triton.races import races_of

DTYPES = {
    "bf16": (torch.bfloat16, "tf32"),
    "fp16": (torch.float16, "tf32"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}


COLUMNS = ("kernel", "columns", "tile", "ms", "fault", "best")


class Shape(NamedTuple):
    """A layer, and a transition behind it."""

    images: int
    size: int
    channels: int
    bottleneck: int
    growth: int
    transition: int


SHAPES = {
    128: (Shape(32, 56, 160, 128, 32, 128), Shape(32, 28, 256, 128, 32, 128), Shape(32, 14, 640, 128, 32, 128)),
    ANY: (Shape(32, 56, 240, 192, 48, 192), Shape(32, 28, 480, 192, 48, 384), Shape(32, 14, 1248, 192, 48, 384)),
}
"""By the widest result that a row of the table serves: layers of DenseNet-121 and of DenseNet-161."""


class Step:
    """A layer's and a transition's forward and backward pass, on scratch tensors."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

        def scratch(*sizes: int, like: float = 1.0) -> Tensor:
            return torch.randn(sizes, device=device, generator=generator).mul_(like).to(dtype)

        def affine(n: int) -> Affine:
            return Affine(*torch.randn(4, n, device=device, generator=generator).unbind())

        images, size, channels, bottleneck, growth, transition = shape
        self.shape, self.grid, rows = shape, (images, size, size), images * size * size
        self.buffer, self.gradient = scratch(rows, channels + 4 * growth), scratch(rows, channels + 4 * growth)
        self.first, self.second = affine(channels), affine(bottleneck)
        self.w1 = scratch(bottleneck, channels, like=channels**-0.5)
        self.w2 = scratch(growth, bottleneck, 3, 3, like=bottleneck**-0.5 / 3)
        self.w3 = scratch(transition, channels, like=channels**-0.5)
        self.z, self.dy = scratch(rows, bottleneck), scratch(rows, growth)
        self.dout = scratch(images * (size // 2) ** 2, transition)

    def run(self, backend: Backend) -> list[Tensor]:
        """The results of every function of ``backend``, the layer's backward pass in one piece, as a block has it."""
        channels, growth, grid = self.shape.channels, self.shape.growth, self.grid
        buffer, gradient = self.buffer.clone(), self.gradient.clone()
        features, new = buffer[:, :channels], buffer[:, channels : channels + growth]
        z, dz = (torch.empty_like(self.z) for _ in range(2))
        own = [empty_statistics(z, n, 1e-5) for n in (self.shape.bottleneck, growth, self.shape.transition)]
        w1, w2, w3, first, second = self.w1, self.w2, self.w3, self.first, self.second
        backend.bn_relu_conv1x1(features, first, w1, None, z, own[0])
        backend.bn_relu_conv3x3(self.z, second, w2, None, grid, new, statistics=own[1])
        inner, outer, behind = (reader_of(affine) for affine in (second, first, first))
        unfinished = Unfinished(ThroughStatistics(self.z, second.mean, *inner.after, len(z)))
        like1, like2, like3 = (w.to(accumulation_dtype(w.dtype)) for w in (w1, w2, w3))
        grad_w2, _ = backend.bn_relu_conv3x3_backward(
            self.dy, self.z, second, w2, grid, dz, need_weight=True, reader=inner, unfinished=unfinished, like=like2
        )
        grad_x, last = gradient[:, :channels], slice(channels - growth, channels)
        through = ThroughStatistics(features[:, last], first.mean[last], *(v[last] for v in outer.after), len(z))
        completion = Completion(last, through, grad_x[:, last])
        grad_w1, _ = backend.bn_relu_conv1x1_backward(
            dz,
            features,
            first,
            w1,
            grad_x,
            need_weight=True,
            need_sums=True,
            reader=outer,
            completion=completion,
            unfinished=unfinished,
            like=like1,
        )
        pooled = backend.bn_relu_pool_conv1x1(features, first, w3, None, grid, own[2])
        dx, grad_w3, _ = backend.bn_relu_pool_conv1x1_backward(
            self.dout, features, first, w3, grid, need_input=True, need_weight=True, reader=behind, like=like3
        )
        statistics = [t for one in own for t in one[:3]]
        read = [t for reader in (inner, outer, behind) for t in (*reader.after, reader.weight, reader.bias)]
        weights = [grad.flatten() for grad in (grad_w1, grad_w2, grad_w3)]
        return [z, dz, new, grad_x, *statistics, pooled, dx, *weights, *read]

    def launches(self) -> list[launch.Launch]:
        """What the Triton backend launches; none is run."""
        with launch.planning() as launches, config.convolution_in_triton():
            self.run(backend)
        return launches

    def to(self, dtype: torch.dtype) -> "Step":
        """The same values in ``dtype``."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Affine):
                setattr(other, name, Affine(*(t.to(accumulation_dtype(dtype)) for t in value)))
            elif isinstance(value, Tensor):
                setattr(other, name, value.to(dtype))
        return other


def reader_of(affine: Affine) -> Reader:
    """A reader that asks for everything and has none before it."""
    p, q, weight, bias = (torch.empty_like(affine.mean) for _ in range(4))
    return Reader(None, (p, q), weight, bias)


def candidates(kernel: str, limit: int) -> Iterator[Tile]:
    """Configurations worth measuring for a result of up to ``limit`` columns."""
    wide = 256 if limit == ANY else 128
    rows, columns, inner = {
        "bn_relu_conv1x1": ((64, 128), (64, 128, wide), (16, 32, 64)),
        "bn_relu_conv1x1_backward": ((16, 32, 64), (32, 64), (wide,)),
        "bn_relu_conv3x3": ((64, 128), (64,), (32, 64, 128)),
        "bn_relu_conv3x3_grad_input": ((64, 128), (64, 128), (32, 64)),
        "bn_relu_conv3x3_grad_weight": ((32, 64, 128), (64, 128), (32, 64)),
        "bn_relu_pool_conv1x1": ((32, 64, 128), (64, 128, wide), (16, 32, 64)),
        "bn_relu_pool_conv1x1_backward": ((32, 64), (32, 64), (32, 64)),
    }[kernel]
    for sides in itertools.product(rows, columns, inner):
        for warps, stages in itertools.product((4, 8), (2, 3, 4)):
            yield Tile(*sides, warps, stages)


@contextmanager
def row_of(kernel: str, key: tuple[int, str], tile: Tile) -> Iterator[None]:
    """In the ``with`` block the table has ``tile`` in the place of a row."""
    before = config.TABLE[kernel][key]
    config.TABLE[kernel][key] = ((ANY, tile),)
    try:
        yield
    finally:
        config.TABLE[kernel][key] = before


class Results:
    """The right results of a :class:`Step`, and how far torch in the same dtype is from them."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.truth = step.to(torch.float64).run(aten)
        dtype = step.z.dtype
        rounding = 2.0**-10 if config.precision(dtype) == "tf32" else torch.finfo(dtype).eps
        self.allowed = [
            2 * (theirs.double() - truth).norm() + 4 * rounding * truth.norm()
            for theirs, truth in zip(step.run(aten), self.truth, strict=True)
        ]

    def fault(self, backend: Backend = backend) -> str | None:
        """What is wrong with the results of ``backend``, or None."""
        for i, (ours, truth, allowed) in enumerate(zip(self.step.run(backend), self.truth, self.allowed)):
            error = (ours.double() - truth).norm()
            if not error <= allowed:
                return f"result {i} is off by {error / truth.norm():.1e}, where {allowed / truth.norm():.1e} is allowed"
        return None


def code_fault(items: Iterable[launch.Launch]) -> str | None:
    """What is wrong with the machine code of the launches, or None."""
    found = []
    for item in {item.variant: item for item in items}.values():
        asm = launch.compiled(item).asm
        try:
            found += [*register_hazards(disassembled(asm["cubin"])), *races_of(item, asm["ptx"])]
        except ValueError as error:  # what cannot be read is not known to be right
            found.append(str(error))
    return f"{len(found)} hazards: {found[0]}" if found else None


def milliseconds(items: Iterable[launch.Launch]) -> tuple[float, str | None]:
    """The sum of the launches' median times, and None; infinity, and why, where one does not compile or fit."""
    import triton

    try:
        return sum(triton.testing.do_bench(partial(launch.run, item), return_mode="median") for item in items), None
    except (triton.runtime.errors.TritonError, RuntimeError) as error:
        return inf, f"{type(error).__name__}: {error}"


def fastest(times: dict[Tile, float], fault: Callable[[Tile], str | None], found: Callable[..., None]) -> Tile:
    """The candidate of the least time that has no fault. ``found(tile, fault=why)`` is told of those that have one.

    Raises:
        RuntimeError: every candidate has a fault.
    """
    for tile in sorted((tile for tile in times if times[tile] < inf), key=times.__getitem__):
        why = fault(tile)
        if why is None:
            return tile
        found(tile, fault=why)
    raise RuntimeError("every candidate is wrong")


class Tuner:
    """Measures the candidates of a kernel for ``dtype`` on ``device``. ``write`` takes a row of ``COLUMNS`` of each as
    soon as it is measured, and another where it turns out to be wrong."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, target: Device, write: Callable[[dict[str, Any]], None]
    ) -> None:
        self.dtype, self.device, self.target, self.write = dtype, device, target, write
        self.key = config.row(target, dtype)

    def row(self, kernel: str, limits: Iterable[int]) -> str:
        """The table's row of ``kernel``, measured for results of up to ``limits`` columns. On the meta device every
        candidate is planned and none is run: the row is the table's own."""
        best = [self.best(kernel, limit) for limit in limits]
        written = ", ".join(f"({'ANY' if limit == ANY else limit}, Tile{tuple(tile)})" for limit, tile in best)
        return f'"{kernel}": {{{self.key}: ({written},)}}'

    def best(self, kernel: str, limit: int) -> tuple[int, Tile]:
        """The fastest candidate that is right."""
        now = config.tile(kernel, self.target, self.dtype, limit)
        steps = [Step(shape, self.dtype, self.device) for shape in SHAPES[limit]]

        def items(tile: Tile) -> list[launch.Launch]:
            with row_of(kernel, self.key, tile):
                return [item for step in steps for item in step.launches() if item.name == kernel]

        def found(tile: Tile, **more: Any) -> None:
            self.write({"kernel": kernel, "columns": limit, "tile": tuple(tile), **more})

        planned = {tile: items(tile) for tile in dict.fromkeys([now, *candidates(kernel, limit)])}
        if self.device.type == "meta":
            found(now, best="not measured")
            return limit, now
        launch.compile_all([item for each in planned.values() for item in each], self.device, ignore_errors=True)
        times = {}
        for tile, each in planned.items():
            times[tile], why = milliseconds(each)
            found(tile, ms=round(times[tile], 5), fault=why)
        results = Results(steps[-1])

        def fault(tile: Tile) -> str | None:
            with row_of(kernel, self.key, tile), config.convolution_in_triton():
                return code_fault(planned[tile]) or results.fault()

        best = fastest(times, fault, found)
        found(
            best,
            ms=round(times[best], 5),
            best=f"{times[now] / times[best]:.2f} times as fast as the table's {tuple(now)}",
        )
        return limit, best


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    description = __doc__.split(": ", 1)[1].split("\n\n")[0].replace("\n", " ")
    parser = argparse.ArgumentParser(prog="python -m densenet_fast.backends.triton.tune", description=description)
    parser.add_argument("--kernel", choices=config.TABLE, action="append", help="only these (all)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the features; tf32 and fp32 are float32")
    parser.add_argument("--narrow", action="store_true", help="only for results of up to 128 columns")
    parser.add_argument("--csv", type=Path, help="where a row a candidate goes, as soon as it is measured")
    parser.add_argument("--dry-run", action="store_true", help="plan every launch for an sm_90 device, run none")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run plans every launch", file=sys.stderr)
        return 1
    dtype, torch.backends.cudnn.conv.fp32_precision = DTYPES[options.dtype]
    device = torch.device("meta" if options.dry_run else "cuda")
    target = Device(90, 132) if options.dry_run else config.device_of(device)
    limits = [limit for limit in SHAPES if limit != ANY or not options.narrow]
    with rows_to(options.csv) as write, config.assume(target):
        tuner = Tuner(dtype, device, target, write)
        for kernel in options.kernel or config.TABLE:
            if tuner.key in config.TABLE[kernel]:
                print(tuner.row(kernel, limits), flush=True)
    return 0


@contextmanager
def rows_to(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that writes rows of ``COLUMNS`` to ``path``, if there is one, and to stderr."""
    path = path or Path(os.devnull)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()

        def write(row: dict[str, Any]) -> None:
            writer.writerow(row)
            print("#", *(value for value in row.values() if value is not None), file=sys.stderr, flush=True)

        yield write


if __name__ == "__main__":
    sys.exit(main())
