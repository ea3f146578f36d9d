"""Pictures of the scripts' figures: told apart by lightness, shape and label, not by colour alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from densenet_fast.benchmarking.competitors import COMPETITORS
from densenet_fast.benchmarking.plots import GREY, INK, draw

__all__ = ["Line", "curves", "grouped_bars", "ratio_bars", "style"]

TEXT = "#222222"
"""The colour of labels beside marks of any colour: amber and light grey are no colours for letters."""
SHADES = {"reference": "#d8d8d8", "torchvision": "#b8b8b8", "torchvision-me": "#e69f00", "timm": "#7a7a7a"}
STYLES = {
    "ours": {"color": "#0072b2", "marker": "o", "linestyle": "-"},
    "ours-me": {"color": "#111111", "marker": "^", "linestyle": "-"},
    "torchvision-me": {"color": "#e69f00", "marker": "s", "linestyle": "--"},
}
OTHER = {"color": "#777777", "marker": "D", "linestyle": ":"}
LINE_HEIGHT = 0.057
"""Of a label's line, as a fraction of the axes' height."""


def style(competitor: str) -> dict[str, str]:
    """Colour, marker and dashes of a competitor's curve."""
    return STYLES.get(competitor, OTHER)


class Line(NamedTuple):
    """A labelled curve."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: dict[str, str]


def curves(path: Path, title: str, x_label: str, panels: dict[str, Sequence[Line]]) -> None:
    """A panel for each y axis, side by side, from zero. A curve's name is beside its last point. No panel is empty."""
    panels = {label: lines for label, lines in panels.items() if lines}

    def paint(figure: Any) -> None:
        figure.suptitle(title, fontsize=11)
        for axes, (y_label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            for line in lines:
                axes.plot(line.xs, line.ys, markersize=5, linewidth=1.8, **line.style)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
            _label_ends(axes, lines)

    draw(path, (8, 3.9), paint)


def _label_ends(axes: Any, lines: Sequence[Line]) -> None:
    """Names beside the last points, moved apart where they would overlap."""
    right = max(x for line in lines for x in line.xs)
    axes.set_xlim(right=1.42 * right)
    axes.autoscale_view()
    place = axes.transData + axes.transAxes.inverted()
    places = {id(line): place.transform((line.xs[-1], line.ys[-1])) for line in lines}
    column, free = max(x for x, _ in places.values()) + 0.04, 0.0
    for line in sorted(lines, key=lambda line: places[id(line)][1]):
        _, y = places[id(line)]
        half = LINE_HEIGHT * (line.label.count("\n") + 1) / 2
        middle = max(y, free + half)
        free = middle + half
        axes.annotate(
            line.label,
            (line.xs[-1], line.ys[-1]),
            (column, middle),
            textcoords="axes fraction",
            va="center",
            fontsize=8.5,
            color=TEXT,
            arrowprops={"arrowstyle": "-", "color": line.style["color"], "linewidth": 0.8, "relpos": (0, 0.5)},
        )


def ratio_bars(path: Path, title: str, names: Sequence[str], panels: dict[str, Sequence[float]]) -> None:
    """A panel for each ratio, with a bar for each name. Ours are in ink."""

    def colour(name: str) -> str:
        return GREY if not name.startswith("densenet_fast") else INK["ours-me" if "memory" in name else "ours"]

    def paint(figure: Any) -> None:
        figure.suptitle(title, fontsize=11)
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (label, values) in zip(all_axes, panels.items()):
            drawn = axes.barh(range(len(names)), values, 0.72, color=[colour(name) for name in names])
            axes.axvline(1, color="#444444", linewidth=0.8, linestyle=":", zorder=0)
            axes.bar_label(
                drawn,
                [f"{value:.2f}" for value in values],
                padding=3,
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
            axes.set_xlabel(label)
            axes.set_xlim(0, 1.2 * max(values))
            axes.spines[["top", "right"]].set_visible(False)
        all_axes[0].set_yticks(range(len(names)), names)
        all_axes[0].invert_yaxis()

    draw(path, (8, 1.2 + 0.46 * len(names)), paint)


def grouped_bars(
    path: Path, title: str, y_label: str, groups: Sequence[str], values: dict[str, Sequence[float | None]]
) -> None:
    """A group of bars for each network, with a bar and its value for each competitor. None leaves a gap with a dash."""
    width = 0.86 / len(values)

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.set_title(title, fontsize=11)
        highest = max((value or 0 for series in values.values() for value in series), default=0)
        for i, (name, series) in enumerate(values.items()):
            places = [j + (i - (len(values) - 1) / 2) * width for j in range(len(groups))]
            look = {"color": INK.get(name, SHADES.get(name, GREY)), "edgecolor": "white"}
            hatch = "///" if name.endswith("-me") and name not in INK else ""
            heights = [value or 0 for value in series]
            drawn = axes.bar(places, heights, 0.95 * width, label=COMPETITORS[name].label, hatch=hatch, **look)
            labels = ["-" if value is None else f"{value:.0f}" for value in series]
            axes.bar_label(drawn, labels, padding=2, fontsize=9)
        axes.legend(loc="upper left", frameon=False, fontsize=9, ncols=2)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(y_label)
        axes.set_ylim(0, 1.45 * max(highest, 1e-9))
        axes.spines[["top", "right"]].set_visible(False)

    draw(path, (8, 4), paint)
