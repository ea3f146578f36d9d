"""The bandwidth that each kernel in CUDA C++ reaches, against a device copy: one table.

python benchmarks/kernel_bandwidth.py              on a GPU
python benchmarks/kernel_bandwidth.py --dry-run    every call at small sizes, no times; on CPU tensors if emulated

Bytes are what a kernel must move: it reads and writes each matrix once. A time is the median of --repeats runs; the
cache is flushed before each. The aim is 85 % of the copy for matrices of 64 MB and more.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import cuda_kernels as kernels
from densenet_fast.backends.affine import Affine, ThroughStatistics, empty_statistics
from densenet_fast.benchmarking.ceilings import median_seconds
from densenet_fast.benchmarking.steps import DTYPES
from densenet_fast.table import table

SHAPES = {
    # DenseNet-121, 64 images of 224x224: images, side, columns of the buffer, new columns
    "block 1": (64, 56, 256, 32),
    "block 2": (64, 28, 512, 32),
    "k = 12, aligned to 8 bytes": (256, 32, 312, 12),
}
STEM = (64, 112, 64)
HEAD = (256, 7, 1024)


class Work(NamedTuple):
    """One kernel on one shape: what runs, and the bytes that it must move."""

    name: str
    shape: str
    run: Callable[[], object]
    bytes: int


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def affine_of(cols: int) -> Affine:
    return Affine(*torch.randn(3, cols))


def work(dtype: torch.dtype, dry: bool) -> Iterator[Work]:
    """Everything that is measured."""
    for name, (images, side, width, new) in SHAPES.items():
        images, side = (1, 5) if dry else (images, side)
        buffer = torch.randn(images * side * side, width, dtype=dtype)
        yield Work("copy", name, partial(torch.empty_like(buffer).copy_, buffer), 2 * size(buffer))
        own = empty_statistics(buffer, width, 1e-5)
        yield Work("channel_statistics", name, partial(kernels.channel_statistics, buffer, own), size(buffer))
        target, part = buffer[:, -new:], own.of(slice(new))
        rows = torch.randn(images, side, side, new, dtype=dtype).movedim(-1, 1)
        mask = torch.rand(images, new, side, side) > 0.2
        moved = 2 * size(rows)
        for layout, x in (("channels last", rows), ("contiguous", rows.contiguous())):
            run = partial(kernels.append_features, x, target, part)
            yield Work("append_features", f"{name}, {new} columns, {layout}", run, moved)
        run = partial(kernels.append_features, rows, target, part, mask, 1.25)
        yield Work("append_features, dropout", f"{name}, {new} columns", run, moved + size(mask))
        count = torch.tensor(float(buffer.shape[0]), dtype=torch.float64)
        for columns, x in ((f"{name}, {new} columns", target), (name, buffer)):
            grad = torch.randn_like(buffer)[:, -x.shape[1] :]
            through = ThroughStatistics(x, *torch.randn(3, x.shape[1]), count)
            run = partial(kernels.finalise_gradient, grad, through, grad)
            yield Work("finalise_gradient", columns, run, 3 * size(x))
    images, side, cols = (1, 5, 64) if dry else STEM
    x, affine, grid = torch.randn(images * side * side, cols, dtype=dtype), affine_of(cols), (images, side, side)
    out, argmax = kernels.bn_relu_maxpool(x, affine, grid, None)
    for name, own in (("", None), (", statistics", empty_statistics(x, cols, 1e-5))):
        run = partial(kernels.bn_relu_maxpool, x, affine, grid, own)
        yield Work(f"bn_relu_maxpool{name}", "stem", run, size(x, out, argmax))
    run = partial(kernels.bn_relu_maxpool_backward, out, argmax, x, affine, grid)
    yield Work("bn_relu_maxpool_backward", "stem", run, size(out, argmax, x, x))
    images, side, cols = (1, 5, 64) if dry else HEAD
    x, affine, grid = torch.randn(images * side * side, cols, dtype=dtype), affine_of(cols), (images, side, side)
    mean = kernels.bn_relu_global_avgpool(x, affine, grid)
    run = partial(kernels.bn_relu_global_avgpool, x, affine, grid)
    yield Work("bn_relu_global_avgpool", "head", run, size(x, mean))
    run = partial(kernels.bn_relu_global_avgpool_backward, mean, x, affine, grid)
    yield Work("bn_relu_global_avgpool_backward", "head", run, size(mean, x, x))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--dry-run", action="store_true", help="small sizes, no times; without a GPU too")
    arguments = parser.parse_args()
    if kernels.unavailable() is not None:
        raise SystemExit(f"the kernels cannot run here: {kernels.unavailable()}")
    device = "cpu" if kernels.emulated() else "cuda"
    if device == "cpu" and not arguments.dry_run:
        raise SystemExit("no CUDA device; --dry-run runs the emulated kernels")
    rows, copy = [], float("nan")
    with torch.device(device):
        if arguments.dry_run:
            for item in work(DTYPES[arguments.dtype], dry=True):
                item.run()
                rows.append((item.name, item.shape, "", "", "", ""))
        else:
            for item in work(DTYPES[arguments.dtype], dry=False):
                time = median_seconds(item.run, torch.device(device), arguments.repeats)
                rate = item.bytes / time / 1e9
                copy = rate if item.name == "copy" else copy
                share = f"{rate / copy:.0%}"
                rows.append(
                    (item.name, item.shape, f"{item.bytes / 1e6:.0f}", f"{time * 1e6:.1f}", f"{rate:.0f}", share)
                )
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU: emulated, not measured"
    print(f"{arguments.dtype}, {name}, torch {torch.__version__}\n")
    print(table(("kernel", "matrix", "MB", "microseconds", "GB/s", "of the copy"), rows))


if __name__ == "__main__":
    main()
