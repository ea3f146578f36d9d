"""``python -m densenet_fast.backends.triton.tune``: measures launch configurations and prints rows for config.TABLE.

For each product and each class of widths, every candidate runs on scratch tensors of a few layers' shapes; the one of
the least total time is printed as the table writes it, with the time of the row in the table beside it. Candidates that
do not fit the device are left out. With --dry-run nothing runs: it plans every launch, on any machine.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from densenet_fast.backends import triton as backend
from densenet_fast.backends.affine import Affine, empty_statistics
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.config import ANY, Device, Tile

DTYPES = {
    "bf16": (torch.bfloat16, "tf32"),
    "fp16": (torch.float16, "tf32"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
}


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


def training_step(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[launch.Launch]:
    """The launches of a layer's and a transition's forward and backward pass, on scratch tensors; none is run."""

    def scratch(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(sizes, dtype=dtype, device=device)

    def affine(n: int) -> Affine:
        return Affine(*scratch(3, n, dtype=torch.float32).unbind())

    images, size, channels, bottleneck, growth, transition = shape
    grid, rows = (images, size, size), images * size * size
    buffer, gradient = scratch(rows, channels + 4 * growth), scratch(rows, channels + 4 * growth)
    features, new = buffer[:, :channels], buffer[:, channels : channels + growth]
    first, second = affine(channels), affine(bottleneck)
    w1, w2, w3 = scratch(bottleneck, channels), scratch(growth, bottleneck, 3, 3), scratch(transition, channels)
    with launch.planning() as launches:
        z, dz = scratch(rows, bottleneck), scratch(rows, bottleneck)
        backend.bn_relu_conv1x1(features, first, w1, None, z, empty_statistics(z, bottleneck, 1e-5))
        backend.bn_relu_conv3x3(z, second, w2, None, grid, new, None, 1.0, empty_statistics(new, growth, 1e-5))
        backend.bn_relu_conv3x3_backward(scratch(rows, growth), z, second, w2, grid, dz, True)
        backend.bn_relu_conv1x1_backward(dz, features, first, w1, gradient[:, :channels], True, True)
        out = backend.bn_relu_pool_conv1x1(features, first, w3, None, grid, empty_statistics(z, transition, 1e-5))
        backend.bn_relu_pool_conv1x1_backward(out, features, first, w3, grid, True, True)
    return launches


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
    """The table with ``tile`` in place of a row."""
    before = config.TABLE[kernel][key]
    config.TABLE[kernel][key] = ((ANY, tile),)
    try:
        yield
    finally:
        config.TABLE[kernel][key] = before


def milliseconds(items: Iterable[launch.Launch]) -> float:
    """The sum of the launches' median times; infinite where one does not fit the device."""
    import triton

    try:
        return sum(triton.testing.do_bench(lambda item=item: launch.run(item), return_mode="median") for item in items)
    except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
        print(f"# left out: {error}", file=sys.stderr)
        return float("inf")


def tune(kernel: str, dtype: torch.dtype, device: torch.device, target: Device, dry_run: bool) -> str:
    """The table's row of ``kernel`` for ``dtype``, measured; the one it has after planning every candidate if
    ``dry_run``."""
    key = (target.generation, config.precision(dtype))
    found = []
    for limit, shapes in SHAPES.items():
        now = config.tile(kernel, target, dtype, limit)
        times = {}
        for tile in dict.fromkeys([now, *candidates(kernel, limit)]):
            with row_of(kernel, key, tile):
                steps = [training_step(shape, dtype, device) for shape in shapes]
            items = [item for step in steps for item in step if item.name == kernel]
            times[tile] = float("nan") if dry_run else milliseconds(items)
        best = now if dry_run else min(times, key=times.__getitem__)
        found.append(f"({'ANY' if limit == ANY else limit}, Tile{tuple(best)})")
        print(
            f"# {kernel}: {len(times)} candidates; now {times[now]:.4f} ms, best {times[best]:.4f} ms", file=sys.stderr
        )
    return f"{key}: ({', '.join(found)}),"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    description = __doc__.split(": ", 1)[1].split("\n\n")[0].replace("\n", " ")
    parser = argparse.ArgumentParser(prog="python -m densenet_fast.backends.triton.tune", description=description)
    parser.add_argument("--kernel", choices=config.TABLE, action="append", help="only these (all)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the features; tf32 and fp32 are float32")
    parser.add_argument("--dry-run", action="store_true", help="plan every launch for an sm_90 device, run none")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        print("no CUDA device; --dry-run plans every launch", file=sys.stderr)
        return 1
    dtype, torch.backends.cudnn.conv.fp32_precision = DTYPES[options.dtype]
    device = torch.device("meta" if options.dry_run else "cuda")
    target = Device(90, 132) if options.dry_run else config.device_of(device)
    for kernel in options.kernel or config.TABLE:
        if (target.generation, config.precision(dtype)) in config.TABLE[kernel]:
            with config.assume(target):
                print(f'"{kernel}": {tune(kernel, dtype, device, target, options.dry_run)}')
    return 0


if __name__ == "__main__":
    sys.exit(main())
