"""A training step in each style that DenseNets are written in, stock beside converted: ``python benchmarks/styles.py``.

The networks are those of ``tests/conversion/styles.py``, in float32 on the sizes below; ``beside_stock.py`` says how
they are measured. Files are written after every network.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import densenet_fast
from beside_stock import HEADER, cells, in_layout, measured, peak_here, shape, told
from beside_stock import peak as peak_by
from densenet_fast.benchmarking.steps import Disagreement, enqueue
from densenet_fast.table import table
from figures import Figure, parser_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conversion.styles import STYLES  # noqa: E402

MARGIN = 1e-2
"""Relative error of the converted network's logits against stock's, in float32."""
peak = partial(peak_by, __file__)


class Setting(NamedTuple):
    """The network's growth, its layers in each block, and its input."""

    growth: int
    layers: tuple[int, ...]
    size: int
    batch: int


BC100 = Setting(12, (16, 16, 16), 32, 64)
SIMPLE40 = Setting(12, (12, 12, 12), 32, 64)
IMAGENET = Setting(32, (6, 12, 24, 16), 128, 8)
LARGE = IMAGENET._replace(size=224, batch=4)
SETTINGS = {
    "dropout behind each convolution, no bottleneck": SIMPLE40,
    "frozen normalisations": LARGE,
    "U-Net": LARGE,
    "U-Net, skips from transitions": LARGE,
    "volumes, dropout of channels": Setting(32, (6, 12, 24, 16), 64, 8),
    "fully convolutional": Setting(12, (4, 4, 4, 4, 4, 4), 128, 4),
}
"""Of those that are neither DenseNet-BC-100 on small images nor DenseNet-121 on middling ones: detectors and segmenters
see large images."""


def setting_of(style: str) -> Setting:
    return SETTINGS.get(style, BC100 if STYLES[style].small else IMAGENET)


class Classifier(nn.Module):
    """A network, whose logits of pixels, if it makes such, are averaged."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return logits if logits.dim() == 2 else logits.flatten(2).mean(2)


@dataclass(frozen=True)
class Entry:
    """A network in one style, stock or converted, in one memory layout."""

    style: str
    setting: Setting
    converted: bool
    channels_last: bool
    dtype = "fp32"
    compiled = False

    @property
    def size(self) -> int:
        return self.setting.size

    @property
    def batch(self) -> int:
        return self.setting.batch

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    def model(self, device: torch.device, train: bool) -> nn.Module:
        torch.manual_seed(0)
        growth, layers, size, _ = self.setting
        network = STYLES[self.style].make(growth, layers, size)
        if self.converted:
            densenet_fast.convert(network)
        return self._placed(Classifier(network).to(device).train(train))

    def images(self, batch: int, size: int, device: torch.device) -> Tensor:
        style = STYLES[self.style]
        shape = (batch, style.channels, *[size] * style.dims)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        return self._placed(images)

    def _placed(self, thing: Any) -> Any:
        return in_layout(thing, self.channels_last, STYLES[self.style].dims)


def entry_of(fields: dict[str, Any]) -> Entry:
    """From JSON."""
    return Entry(**{**fields, "setting": Setting(*fields["setting"])})


def main() -> None:
    parser = parser_of("styles", __doc__)
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES), metavar="STYLE")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps after one of warming up (5)")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_here(entry_of(json.loads(options.peak)), options))
        return
    figure, rows = Figure("styles", options), []
    for style in options.styles:
        print(style, file=sys.stderr, flush=True)
        rows.append(row_of(style, options))
        write(figure, rows, show=style == options.styles[-1])


def row_of(style: str, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured of ``style``."""
    setting = setting_of(style)
    entries = [Entry(style, setting, converted, last) for converted in (False, True) for last in (False, True)]
    fused, left = parts(entries[0], entries[2], options.device)
    row = {"style": style, **setting._asdict(), "layers": " ".join(map(str, setting.layers))}
    return row | measured(entries, options, peak)[0] | {"fused": fused, "left": left}


def parts(stock: Entry, converted: Entry, device: torch.device) -> tuple[str, str]:
    """What runs fused in a step of ``converted``, and what does not, by kind.

    Raises:
        Disagreement: its logits are not ``stock``'s.
    """
    setting, logits = stock.setting, []
    for entry in (stock, converted):
        model = entry.model(device, True)
        torch.manual_seed(2)
        images = entry.images(setting.batch, setting.size, device)
        logits.append(enqueue(model, images, torch.float32, True).detach())
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    if not error <= MARGIN:
        raise Disagreement(f"{stock.style}: the converted network's logits are off by {error:.1e}")
    report = densenet_fast.explain(model)
    return told(row.kind for row in report if row.fused), told(row.kind for row in report if not row.fused)


def write(figure: Figure, rows: list[dict[str, Any]], show: bool) -> None:
    """The table and the files of what has been measured."""
    header = ("style", "input", *HEADER, "fused", "left")
    lines = [
        (row["style"], shape(row, STYLES[row["style"]].dims), *cells(row), row["fused"], row["left"] or "-")
        for row in rows
    ]
    figure.write("A training step in each style, stock and converted, float32", rows, table(header, lines), show)


if __name__ == "__main__":
    main()
