"""Memory and time of a training step against depth: ``python benchmarks/depth.py``.

Pleiss et al.'s figure (https://arxiv.org/abs/1707.06990): DenseNet-BC, k = 12, images of 32x32, batches of 64,
channels last. Stock is torchvision's, with memory_efficient=True checkpointed. Memory is the peak of a step, each in a
process of its own; times are interleaved. What would need more than ``--memory-limit``, by the depths before it, is
left out.
"""

from typing import Any

from densenet_fast.benchmarking.command import default_budget
from densenet_fast.benchmarking.competitors import COMPETITORS, Entry, available
from densenet_fast.benchmarking.memory import Job, measure
from densenet_fast.benchmarking.plots import Line, curves, style
from densenet_fast.benchmarking.progress import progress
from densenet_fast.benchmarking.steps import DTYPES
from densenet_fast.benchmarking.times import measure_times
from densenet_fast.table import table
from figures import GIB, Figure, parser_of

WHO = ("torchvision", "torchvision-me", "ours", "ours-me")


def main() -> None:
    parser = parser_of("depth", __doc__)
    parser.add_argument("--depths", nargs="+", type=int, default=[40, 100, 160, 250, 340], metavar="L")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=2, help="timed steps after one of warming up (2)")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="(70 %% of what is free; GPU 90 %% of all)")
    options = parser.parse_args()
    figure = Figure("depth", options)
    limit = options.memory_limit * GIB if options.memory_limit else default_budget(options.device)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in WHO}
    for depth in progress(sorted(options.depths), "depths"):
        network = f"densenet_bc{depth}"
        fitting = [name for name in available(WHO, network)[0] if expected_bytes(found[name], depth) <= limit]
        entries = [Entry(name, "channels_last", network) for name in fitting]
        timings = measure_times(
            [(entry, options.batch) for entry in entries],
            options.size,
            DTYPES[options.dtype],
            True,
            options.device,
            options.repeats,
            float("inf"),
        )
        for entry, timing in zip(entries, timings, strict=True):
            job = Job(
                entry.competitor,
                entry.layout,
                network,
                options.batch,
                options.size,
                options.dtype,
                True,
                str(options.device),
                options.threads,
            )
            memory = measure(job)
            if timing.failure or memory.failure:
                print(f"{entry.name}, depth {depth}: {timing.failure or memory.failure}")
                continue
            measured = {"median_s": timing.quantile(0.5), "peak_mib": memory.added / (1 << 20)}
            found[entry.competitor].append({"depth": depth, "competitor": entry.competitor, **measured})
    rows = [
        {**row, "batch": options.batch, "size": options.size, "dtype": options.dtype, **slopes(before, row)}
        for series in found.values()
        for before, row in zip([None, *series], series)
    ]
    title = (
        f"DenseNet-BC (k = 12), training step, {options.batch} images of {options.size}x{options.size}, {options.dtype}"
    )
    header = ("implementation", "depth", "peak MiB", "MiB a layer", "ms", "ms a layer")
    cells = [
        (
            COMPETITORS[row["competitor"]].label,
            row["depth"],
            f"{row['peak_mib']:.0f}",
            "" if row["mib_per_layer"] is None else f"{row['mib_per_layer']:.1f}",
            f"{1e3 * row['median_s']:.0f}",
            "" if row["ms_per_layer"] is None else f"{row['ms_per_layer']:.1f}",
        )
        for row in rows
    ]
    figure.write(title, rows, table(header, cells))
    panels = {
        "peak memory of a step (GiB)": lines_of(rows, lambda r: r["peak_mib"] / 1024, "mib_per_layer", "MiB"),
        "time of a step (s)": lines_of(rows, lambda r: r["median_s"], "ms_per_layer", "ms"),
    }
    curves(figure.path("png"), f"{title}\n{figure.device}", "depth L (layers)", panels)


def expected_bytes(series: list[dict[str, Any]], depth: int) -> float:
    """At most: by the depth before it, if memory grew with the square of the depth."""
    if not series:
        return 0.0
    return series[-1]["peak_mib"] * (1 << 20) * (depth / series[-1]["depth"]) ** 2


def slopes(before: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, float | None]:
    """What each layer added since the depth before."""
    if before is None:
        return {"mib_per_layer": None, "ms_per_layer": None}
    layers = row["depth"] - before["depth"]
    return {
        "mib_per_layer": (row["peak_mib"] - before["peak_mib"]) / layers,
        "ms_per_layer": 1e3 * (row["median_s"] - before["median_s"]) / layers,
    }


def lines_of(rows: list[dict[str, Any]], value: Any, slope: str, unit: str) -> list[Line]:
    """A curve a competitor, its last slope in its label."""
    lines = []
    for name in WHO:
        own = [row for row in rows if row["competitor"] == name]
        if own:
            last = own[-1][slope]
            label = COMPETITORS[name].label.replace(" ", "\n") + (
                "" if last is None else f"\n{last:.3g} {unit} a layer"
            )
            lines.append(Line(label, [r["depth"] for r in own], [value(r) for r in own], style(name)))
    return lines


if __name__ == "__main__":
    main()
