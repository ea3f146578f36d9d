"""The rows of a benchmark and their ratios; the files that they go to, CSV and Markdown."""

import csv
from collections.abc import Sequence
from pathlib import Path

from densenet_fast.benchmarking.competitors import COMPETITORS
from densenet_fast.benchmarking.conditions import sentence
from densenet_fast.benchmarking.memory import Memory
from densenet_fast.benchmarking.times import Timing
from densenet_fast.memory import MIB
from densenet_fast.table import number, table

__all__ = ["best_rows", "bench_rows", "bench_table", "milliseconds", "write_csv", "write_page"]

Row = dict[str, object]


def bench_rows(
    timings: Sequence[Timing], memories: Sequence[Memory | None], setting: Row, baseline: str, conditions: Row
) -> list[Row]:
    """A row for each entry and batch: its figures, their ratios to the baseline's best layout, its conditions. On a GPU
    it also has the time until a step is enqueued.

    Args:
        timings: of every entry and batch.
        memories: theirs; None where it was not measured.
        setting: columns that all rows share (the network, the mode, ...).
        baseline: the competitor whose figures are 1.
        conditions: device, versions, commit, date.
    """
    rows: list[Row] = []
    on_gpu = any(timing.enqueued for timing in timings)
    for timing, memory in zip(timings, memories, strict=True):
        measured = bool(timing.seconds) and not timing.failure
        median = timing.quantile(0.5) if measured else None
        known = memory is not None and not memory.failure
        rows.append(
            {
                **setting,
                "batch": timing.batch,
                "competitor": timing.entry.competitor,
                "layout": timing.entry.layout,
                "median_s": median,
                "p20_s": timing.quantile(0.2) if measured else None,
                "p80_s": timing.quantile(0.8) if measured else None,
                **({"enqueue_s": timing.enqueue_seconds if measured else None} if on_gpu else {}),
                "repeats": len(timing.seconds),
                "images_per_s": timing.batch / median if measured else None,
                "speed_ratio": None,
                "peak_mib": memory.added / MIB if known else None,
                "reserved_mib": memory.reserved / MIB if known else None,
                "memory_ratio": None,
                "failure": timing.failure or (memory.failure if memory else ""),
                **conditions,
            }
        )
    same_batch = setting["batches"] != "max"
    for row in rows:
        peers = [r for r in rows if r["competitor"] == baseline and (r["batch"] == row["batch"] or not same_batch)]
        speeds = [r["images_per_s"] for r in peers if r["images_per_s"]]
        peaks = [r["peak_mib"] for r in peers if r["peak_mib"]]
        if speeds and row["images_per_s"]:
            row["speed_ratio"] = row["images_per_s"] / max(speeds)
        if peaks and row["peak_mib"] is not None:
            row["memory_ratio"] = row["peak_mib"] / min(peaks)
    return rows


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """A row for each competitor and batch: of its faster layout, with the memory of the layout that needs less."""
    groups: dict[tuple[object, object], list[Row]] = {}
    for row in rows:
        group = row["competitor"] if row.get("batches") == "max" else row["batch"]
        groups.setdefault((group, row["competitor"]), []).append(row)
    best = []
    for group in groups.values():
        fastest = dict(max(group, key=lambda r: r["images_per_s"] or 0))
        known = [r for r in group if r["peak_mib"] is not None]
        if known:
            least = min(known, key=lambda r: r["peak_mib"])
            fastest |= {key: least[key] for key in ("peak_mib", "reserved_mib", "memory_ratio")}
        best.append(fastest)
    return best


def bench_table(rows: Sequence[Row], baseline: str) -> str:
    """The rows for a reader."""
    on_gpu = any("enqueue_s" in row for row in rows)
    header = ["implementation", "layout", "batch", "ms", "20 - 80 %"]
    header += [*(["ms to enqueue"] if on_gpu else []), "images/s"]
    header += [f"speed, {baseline} 1", "peak MiB", f"memory, {baseline} 1"]
    cells = []
    for row in rows:
        times = [row["median_s"], row["p20_s"], row["p80_s"]]
        median, low, high = (number(milliseconds(t), 1) for t in times)
        cells.append(
            (
                COMPETITORS[row["competitor"]].label,
                row["layout"],
                row["batch"],
                row["failure"] if row["median_s"] is None else median,
                f"{low} - {high}",
                *([number(milliseconds(row["enqueue_s"]), 1)] if on_gpu else []),
                number(row["images_per_s"], 1),
                number(row["speed_ratio"], 2, "x"),
                number(row["peak_mib"], 0),
                number(row["memory_ratio"], 2),
            )
        )
    return table(header, cells)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Writes columns in the order of the first row. A missing value is empty."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def write_page(path: Path, heading: str, command: str, conditions: dict[str, str], body: str) -> None:
    """Writes ``body`` in Markdown under its heading, the command that made it and the conditions that it was made
    in."""
    path.write_text(f"# {heading}\n\n`{command}`\n\n{sentence(conditions)}\n\n{body}\n")


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
