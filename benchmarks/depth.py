"""Memory and time of a training step against depth: ``python benchmarks/depth.py``.

Pleiss et al.'s figure (https://arxiv.org/abs/1707.06990): DenseNet-BC, k = 12, images of 32x32, batches of 64, channels
last. Stock is torchvision's; with memory_efficient=True it is checkpointed. At each depth the peak memory of a step is
measured first, for each network in a process of its own. Then those that could run are timed in turns. A network that
runs out of memory gets a row that says so. So does one that would need more than ``--memory-limit``, as the depths
before it tell. Files are written after every depth.
"""

import argparse
import sys
from typing import Any

from densenet_fast.benchmarking.competitors import COMPETITORS, Entry, available
from densenet_fast.benchmarking.memory import Job, free_memory, measure
from densenet_fast.benchmarking.results import milliseconds
from densenet_fast.benchmarking.steps import DTYPES
from densenet_fast.benchmarking.times import measure_times
from densenet_fast.memory import GIB, MIB
from densenet_fast.table import number, table
from figures import Figure, parser_of
from pictures import Line, curves, style

WHO = ("torchvision", "torchvision-me", "ours", "ours-me")
NO_FIT = "does not fit"

Row = dict[str, Any]


def main() -> None:
    parser = parser_of("depth", __doc__)
    parser.add_argument("--depths", nargs="+", type=int, default=[40, 100, 160, 250, 340], metavar="L")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps after one of warming up (2)")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="(95 %% of what is free; GPU 95 %% of all)")
    options = parser.parse_args()
    figure = Figure("depth", options)
    limit = options.memory_limit or 0.95 * free_memory(options.device) / GIB
    rows: list[Row] = []
    for depth in sorted(options.depths):
        network = f"densenet_bc{depth}"
        new = [
            memory_row(name, depth, limit, rows, options)
            for name in available(WHO, network, True, DTYPES[options.dtype], options.device)[0]
        ]
        rows += new
        write(figure, options, rows, show=False)  # should the times need more than the system has
        add_times(new, network, options)
        write(figure, options, rows, show=depth == max(options.depths))


def memory_row(name: str, depth: int, limit: float, rows: list[Row], options: argparse.Namespace) -> Row:
    """The peak of a step of a competitor at a depth, or why there is none."""
    row = {"depth": depth, "competitor": name, "median_s": None, "peak_mib": None, "failure": ""}
    before = [r for r in rows if r["competitor"] == name]
    expected = expected_gib(before, depth)
    if expected > limit or any(r["failure"] for r in before):
        about = f", about {expected:.1f} GiB expected" if expected else ""
        row["failure"] = f"{NO_FIT} in {limit:.1f} GiB{about}"
    else:
        say(f"depth {depth}, {name}: memory")
        entry = Entry(name, "channels_last", f"densenet_bc{depth}")
        memory = measure(Job.of(entry, options.batch, options.size, options))
        row["peak_mib"] = None if memory.failure else memory.added / MIB
        row["failure"] = f"{NO_FIT}: {memory.failure}" if memory.out_of_memory else memory.failure
    say(f"depth {depth}, {name}: {row['failure'] or number(row['peak_mib'], 0) + ' MiB'}")
    return row


def add_times(rows: list[Row], network: str, options: argparse.Namespace) -> None:
    """To those ``rows``, all of one depth, that have a memory."""
    fitting = [row for row in rows if not row["failure"]]
    say(f"{network}: times of {', '.join(row['competitor'] for row in fitting)}")
    turns = [(Entry(row["competitor"], "channels_last", network), options.batch) for row in fitting]
    place = (options.size, DTYPES[options.dtype], True, options.device)
    for row, timing in zip(fitting, measure_times(turns, *place, options.repeats), strict=True):
        row["failure"] = timing.failure
        row["median_s"] = None if timing.failure else timing.quantile(0.5)
        say(f"{network}, {row['competitor']}: {timing.failure or number(row['median_s'], 3) + ' s'}")


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def expected_gib(measured: list[Row], depth: int) -> float:
    """What a step at ``depth`` will need, from the depths that were ``measured``.

    The last two determine a and b of a L^2 + b L. One alone determines b of b L, which is less. Without any it is 0.
    """
    points = [(row["depth"], row["peak_mib"] / 1024) for row in measured if row["peak_mib"] is not None]
    if len(points) < 2:
        return sum(gib / before * depth for before, gib in points)
    (first, low), (second, high) = points[-2:]
    a = (high / second - low / first) / (second - first)
    return depth * (low / first + a * (depth - first))


def write(figure: Figure, options: argparse.Namespace, rows: list[Row], show: bool) -> None:
    """The table, the files and the picture of the depths measured so far."""
    series = {name: [row for row in rows if row["competitor"] == name] for name in WHO}
    place = {"batch": options.batch, "size": options.size, "dtype": options.dtype}
    ordered = [
        {**row, **place, **slopes(before, row)} for own in series.values() for before, row in zip([None, *own], own)
    ]
    title = (
        f"DenseNet-BC (k = 12), training step, {options.batch} images of {options.size}x{options.size}, {options.dtype}"
    )
    header = ("implementation", "depth", "peak MiB", "MiB a layer", "ms", "ms a layer")
    cells = [
        (
            COMPETITORS[row["competitor"]].label,
            row["depth"],
            row["failure"] if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            number(row["mib_per_layer"], 1),
            number(milliseconds(row["median_s"]), 0),
            number(row["ms_per_layer"], 1),
        )
        for row in ordered
    ]
    figure.write(title, ordered, table(header, cells), show)
    panels = {
        "peak memory of a step (GiB)": lines_of(ordered, "peak_mib", 1 / 1024, "mib_per_layer", "MiB"),
        "time of a step (s)": lines_of(ordered, "median_s", 1, "ms_per_layer", "ms"),
    }
    curves(figure.path("png"), f"{title}\n{figure.device}", "depth L (layers)", panels)


def slopes(before: Row | None, row: Row) -> Row:
    """What each layer added since the depth before."""
    result: Row = {}
    for slope, value, scale in (("mib_per_layer", "peak_mib", 1), ("ms_per_layer", "median_s", 1e3)):
        known = before is not None and before[value] is not None and row[value] is not None
        result[slope] = scale * (row[value] - before[value]) / (row["depth"] - before["depth"]) if known else None
    return result


def lines_of(rows: list[Row], value: str, scale: float, slope: str, unit: str) -> list[Line]:
    """A curve for each competitor. Its label gives its last slope, and the depth from which on it does not run."""
    lines = []
    for name in WHO:
        own = [row for row in rows if row["competitor"] == name]
        known = [row for row in own if row[value] is not None]
        if known:
            last = known[-1][slope]
            label = COMPETITORS[name].label.replace(" ", "\n")
            label += "" if last is None else f"\n{last:.3g} {unit} a layer"
            missing = [row for row in own if row["failure"].startswith(NO_FIT)]
            label += f"\nL = {missing[0]['depth']} {NO_FIT}" if missing else ""
            lines.append(
                Line(label, [row["depth"] for row in known], [scale * row[value] for row in known], style(name))
            )
    return lines


if __name__ == "__main__":
    main()
