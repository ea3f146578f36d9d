"""A training step of MONAI's DenseNet-121 on volumes, stock beside converted: its time, its memory and its errors:
``python benchmarks/volumes.py``.

Times are of steps in turns, in one process; each of the two has its faster memory layout, and stock the memory of the
layout that needs less. Peak memory is what the first step adds, in a process of its own. Errors are against a step in
float64: of the logits, of the gradient of the volumes and of those of all weights, each norm relative to stock's error.
Files are written after every setting.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import densenet_fast
from densenet_fast.benchmarking.steps import DTYPES, enqueue
from densenet_fast.benchmarking.times import measure_times
from densenet_fast.memory import PeakMemory
from densenet_fast.table import table
from figures import Figure, parser_of
from styles import MIB, median, told

LAYERS = (6, 12, 24, 16)
"""Of each block."""
ERRORS = ("logits", "input", "weights")


@dataclass(frozen=True)
class Entry:
    """The network, stock or converted, in one dtype and one memory layout; as ``measure_times`` takes it."""

    size: int
    batch: int
    dtype: str
    converted: bool
    channels_last: bool
    compiled = False

    @property
    def layout(self) -> str:
        return "channels_last_3d" if self.channels_last else "contiguous"

    def model(self, device: torch.device, train: bool) -> nn.Module:
        from monai.networks.nets import DenseNet

        torch.manual_seed(0)
        model = DenseNet(spatial_dims=3, in_channels=1, out_channels=2, block_config=LAYERS)
        if self.converted:
            densenet_fast.convert(model)
        return self._placed(model.to(device).train(train))

    def images(self, batch: int, size: int, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return self._placed(torch.randn(batch, 1, size, size, size, generator=generator).to(device))

    def step(self, device: torch.device, exact: bool = False) -> tuple[nn.Module, list[Tensor]]:
        """The model after one step, ``exact`` in float64, and of that what ``ERRORS`` are of."""
        model, images = self.model(device, True), self.images(self.batch, self.size, device)
        if exact:
            model, images = model.double(), images.double()
        images.requires_grad_()
        logits = enqueue(model, images, torch.float32 if exact else DTYPES[self.dtype], True)
        weights = [p.grad.flatten() for p in model.parameters()]
        return model, [t.detach().double() for t in (logits, images.grad, torch.cat(weights))]

    def _placed(self, thing: Any) -> Any:
        return thing.to(memory_format=torch.channels_last_3d) if self.channels_last else thing


def main() -> None:
    parser = parser_of("volumes", __doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96], help="of a volume's edge (64 96)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="bf16 is autocast")
    parser.add_argument("--batch", type=int, default=2, help="volumes in a step (2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps after one of warming up (5)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        torch.set_num_threads(options.threads)
        print(peak_here(Entry(**json.loads(options.peak)), options.device))
        return
    figure, rows = Figure("volumes", options), []
    settings = list(product(options.sizes, options.dtypes))
    for size, dtype in settings:
        print(f"{size} {dtype}", file=sys.stderr, flush=True)
        rows.append(row_of(size, dtype, options))
        write(figure, rows, show=len(rows) == len(settings))


def row_of(size: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured of volumes of ``size``."""
    entries = [Entry(size, options.batch, dtype, *kind) for kind in product((False, True), (False, True))]
    turns = [(entry, options.batch) for entry in entries]
    timings = measure_times(turns, size, DTYPES[dtype], True, options.device, options.repeats)
    stock, ours = (min(timings[i : i + 2], key=median) for i in (0, 2))
    row = {"batch": options.batch, "size": size, "dtype": dtype}
    row |= {"stock_layout": stock.entry.layout, "stock_s": median(stock)}
    row |= {"ours_layout": ours.entry.layout, "ours_s": median(ours), "speed_ratio": median(stock) / median(ours)}
    row["stock_mib"] = min(peak(entry, options) for entry in entries[:2]) / MIB
    row["ours_mib"] = peak(ours.entry, options) / MIB
    row["memory_ratio"] = row["ours_mib"] / row["stock_mib"]
    return row | compared(stock.entry, ours.entry, options.device)


def compared(stock: Entry, ours: Entry, device: torch.device) -> dict[str, Any]:
    """Errors of the two, and what runs fused in ``ours`` and what does not, by kind."""
    truth = stock.step(device, exact=True)[1]
    row: dict[str, Any] = {}
    for name, entry in (("stock", stock), ("ours", ours)):
        model, results = entry.step(device)
        for what, got, exact in zip(ERRORS, results, truth):
            row[f"{name}_error_{what}"] = float((got - exact).norm() / exact.norm())
    parts = densenet_fast.explain(model)
    fused = [part.kind for part in parts if part.last_call == "fused"]
    return row | {"fused": told(fused), "left": told(part.kind for part in parts if part.last_call != "fused")}


def peak(entry: Entry, options: argparse.Namespace) -> int:
    """Bytes that the first training step adds, in a new process that returns what it frees to the system at once."""
    command = [sys.executable, __file__, "--peak", json.dumps(asdict(entry))]
    command += ["--device", str(options.device), "--threads", str(options.threads)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(process.stdout)


def peak_here(entry: Entry, device: torch.device) -> int:
    """:func:`peak` in this process, which should have done nothing else."""
    model, images = entry.model(device, True), entry.images(entry.batch, entry.size, device)
    memory = PeakMemory(device)
    enqueue(model, images, DTYPES[entry.dtype], True)
    return memory.read().added


def write(figure: Figure, rows: list[dict[str, Any]], show: bool) -> None:
    """The table and the files of what has been measured."""
    header = ("input", "dtype", "stock ms", "ours ms", "speed", "stock MiB", "ours MiB", "memory")
    header += (*(f"error, {what}" for what in ERRORS), "fused", "left")
    cells = [
        (
            f"{row['batch']} of {'x'.join([str(row['size'])] * 3)}",
            row["dtype"],
            f"{1e3 * row['stock_s']:.0f} ({row['stock_layout']})",
            f"{1e3 * row['ours_s']:.0f} ({row['ours_layout']})",
            f"{row['speed_ratio']:.2f}x",
            f"{row['stock_mib']:.0f}",
            f"{row['ours_mib']:.0f}",
            f"{row['memory_ratio']:.2f}",
            *(f"{row[f'ours_error_{what}'] / row[f'stock_error_{what}']:.2f}" for what in ERRORS),
            row["fused"],
            row["left"] or "-",
        )
        for row in rows
    ]
    figure.write("A training step of MONAI's DenseNet-121 on volumes", rows, table(header, cells), show)


if __name__ == "__main__":
    main()
