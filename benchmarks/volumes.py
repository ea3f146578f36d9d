"""A training step of MONAI's DenseNet-121 on volumes, stock beside converted: ``python benchmarks/volumes.py``.

``beside_stock.py`` says how time and memory are measured. Errors are against a step in float64: of the logits, of the
gradient of the volumes and of those of all weights, each norm relative to stock's error. Files are written after every
setting.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import densenet_fast
from beside_stock import HEADER, cells, in_layout, measured, peak_here, shape, told
from beside_stock import peak as peak_by
from densenet_fast.benchmarking.steps import DTYPES, enqueue
from densenet_fast.table import table
from figures import Figure, parser_of

LAYERS = (6, 12, 24, 16)
"""Of each block."""
ERRORS = ("logits", "input", "weights")
peak = partial(peak_by, __file__)


@dataclass(frozen=True)
class Entry:
    """The network, stock or converted, in one dtype and one memory layout."""

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
        return in_layout(thing, self.channels_last, 3)


def main() -> None:
    parser = parser_of("volumes", __doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96], help="of a volume's edge (64 96)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"], help="bf16 is autocast")
    parser.add_argument("--batch", type=int, default=2, help="volumes in a step (2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps after one of warming up (5)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_here(Entry(**json.loads(options.peak)), options))
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
    row, stock, ours = measured(entries, options, peak)
    return {"batch": options.batch, "size": size, "dtype": dtype} | row | compared(stock, ours, options.device)


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


def write(figure: Figure, rows: list[dict[str, Any]], show: bool) -> None:
    """The table and the files of what has been measured."""
    header = ("input", "dtype", *HEADER, *(f"error, {what}" for what in ERRORS), "fused", "left")
    lines = []
    for row in rows:
        errors = [f"{row[f'ours_error_{what}'] / row[f'stock_error_{what}']:.2f}" for what in ERRORS]
        lines.append((shape(row, 3), row["dtype"], *cells(row), *errors, row["fused"], row["left"] or "-"))
    figure.write("A training step of MONAI's DenseNet-121 on volumes", rows, table(header, lines), show)


if __name__ == "__main__":
    main()
