"""Pictures of what ``bench`` measured: told apart by lightness, shape and label, not by colour alone."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from densenet_fast.benchmarking.competitors import COMPETITORS
from densenet_fast.benchmarking.results import Row

__all__ = ["GREY", "INK", "bench_bars", "draw", "floor_bars"]

INK = {"ours": "#0072b2", "ours-me": "#111111", "ours-compile": "#56b4e9"}
"""Okabe and Ito's blues and black. Everyone else is grey."""
GREY = "#a8a8a8"
DPI = 200
"""At 8 inches, twice the width at which a README shows a picture."""


def draw(path: Path, size: tuple[float, float], paint: Callable[[Any], None]) -> None:
    """Writes the figure that ``paint`` fills. Without matplotlib there is none, and a line on stderr says so."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed: {path.name} is left out", file=sys.stderr)
        return
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure)
    figure.savefig(path, dpi=DPI)


def bench_bars(path: Path, title: str, rows: Sequence[Row], baseline: str) -> None:
    """A bar each for speed and memory of the best rows, labelled with the value and its ratio to the baseline's."""
    several = len({row["batch"] for row in rows}) > 1
    names = [COMPETITORS[row["competitor"]].label.replace(" ", "\n") for row in rows]
    if several:
        names = [f"{name}, {row['batch']} images" for name, row in zip(names, rows)]
    panels = [("images per second", "images_per_s", "speed_ratio")]
    if any(row["peak_mib"] is not None for row in rows):
        panels.append(("peak memory of a step (MiB)", "peak_mib", "memory_ratio"))

    def paint(figure: Any) -> None:
        figure.suptitle(f"{title}\nin brackets: {baseline} = 1", fontsize=11)
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (label, value, ratio) in zip(all_axes, panels):
            lengths = [row[value] or 0.0 for row in rows]
            drawn = axes.barh(range(len(rows)), lengths, 0.72, color=[INK.get(row["competitor"], GREY) for row in rows])
            labels = [_short(row[value]) + ("" if row[ratio] is None else f" ({row[ratio]:.2f})") for row in rows]
            axes.bar_label(drawn, labels, padding=3, fontsize=9)
            axes.set_xlabel(label)
            axes.set_xlim(0, 1.5 * max([*lengths, 1e-9]))
            axes.spines[["top", "right"]].set_visible(False)
        all_axes[0].set_yticks(range(len(rows)), names)
        all_axes[0].invert_yaxis()

    draw(path, (8, 1.6 + 0.42 * len(rows)), paint)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def floor_bars(path: Path, title: str, lines: Sequence[Any]) -> None:
    """Each kernel's measured time, and within it, dark, its floor."""
    shown = [line for line in lines if line.measured > 0.002 * sum(each.measured for each in lines)]

    def paint(figure: Any) -> None:
        figure.suptitle(title, fontsize=11)
        axes = figure.subplots()
        places = range(len(shown))
        axes.barh(places, [1e3 * line.measured for line in shown], 0.72, color=GREY)
        axes.barh(places, [1e3 * line.floor for line in shown], 0.36, color=INK["ours"])
        labels = [
            f"{1e3 * line.measured:.1f}" + (f" = {line.measured / line.floor:.2f} x floor" if line.floor else "")
            for line in shown
        ]
        for place, line, label in zip(places, shown, labels):
            axes.annotate(
                label, (1e3 * max(line.measured, line.floor), place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(places, [line.kernel for line in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.35 * max(1e3 * max(line.measured, line.floor) for line in shown))
        axes.set_xlabel("milliseconds of a step (wide, grey: measured; narrow, blue: the floor)")
        axes.spines[["top", "right"]].set_visible(False)

    draw(path, (8, 1.3 + 0.32 * len(shown)), paint)
