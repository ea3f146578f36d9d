"""Pictures of a run and of a comparison: told apart by line style and lightness, not by colour alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from densenet_fast.training.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "plot_comparison", "plot_run"]

BLUE, ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito's palette, dark and light in greyscale
DARK = {"color": BLUE, "linestyle": "-", "linewidth": 1.6, "marker": "o", "zorder": 3}
LIGHT = {"color": ORANGE, "linestyle": "--", "linewidth": 2.6, "marker": "s", "zorder": 2}


class Curve(NamedTuple):
    """One labelled line."""

    label: str
    epochs: Sequence[float]
    values: Sequence[float]
    style: dict[str, object]


def plot_run(path: Path, title: str, rows: Sequence[dict[str, float]]) -> None:
    """Loss and accuracy of one run over its epochs."""
    _draw(path, title, _panels([("train", rows, "train", LIGHT), ("test", rows, "test", DARK)]))


def plot_comparison(path: Path, title: str, runs: dict[str, Sequence[dict[str, float]]]) -> None:
    """Test loss and test accuracy of two runs over their epochs."""
    styles = (LIGHT, DARK)
    panels = _panels([(name, rows, "test", style) for (name, rows), style in zip(runs.items(), styles, strict=True)])
    _draw(path, title, panels)


def _panels(lines: list[tuple[str, Sequence[dict[str, float]], str, dict[str, object]]]) -> dict[str, list[Curve]]:
    loss, accuracy = [], []
    for label, rows, part, style in lines:
        epochs = [row["epoch"] for row in rows]
        loss.append(Curve(label, epochs, [row[f"{part}_loss"] for row in rows], style))
        accuracy.append(Curve(label, epochs, [100 * row[f"{part}_accuracy"] for row in rows], style))
    parts = {part for _, _, part, _ in lines}
    prefix = f"{parts.pop()} " if len(parts) == 1 else ""
    return {f"{prefix}cross-entropy loss (nats per image)": loss, f"{prefix}accuracy (% of images)": accuracy}


def _draw(path: Path, title: str, panels: dict[str, list[Curve]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (label, curves) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for curve in curves:
            axes.plot(curve.epochs, curve.values, markersize=3, **curve.style)
        if "loss" in label:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("epoch (passes over the training images)")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        _label_ends(axes, curves)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _label_ends(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Writes each curve's name beside its last point, moved apart where they would overlap."""
    axes.autoscale_view()  # else the transformation would not know the limits yet
    place = axes.transData + axes.transAxes.inverted()
    ends = [((curve.epochs[-1], curve.values[-1]), curve) for curve in curves]
    lowest = -1.0
    for end, curve in sorted(ends, key=lambda item: item[0][1]):
        lowest = max(place.transform(end)[1], lowest + 0.07)
        axes.annotate(
            f"{curve.label} {curve.values[-1]:.3g}",
            end,
            (1.06, lowest),
            textcoords="axes fraction",
            va="center",
            arrowprops={"arrowstyle": "-", **{name: curve.style[name] for name in ("color", "linestyle", "linewidth")}},
        )
