"""The pages' tables of GPUs, from the results that ``python3 tests/gpu.py`` left: ``python benchmarks/gpu_tables.py``.

A GPU's ``results.json`` is committed as ``benchmarks/results/<GPU>/results.json``. This script writes what stands
between the marks of docs/what-is-fast-where.md and docs/versions.md.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from densenet_fast.table import number, table
from figures import RESULTS, ROOT, rewritten

MARK = "gpu table"
NONE = "The kernels for GPUs have not run on one yet."
HEADER = ("", "batch", "torchvision", "densenet_fast", "speed", "memory", "`memory_efficient=True`", "torch.compile")
KINDS = {"training": "training step", "inference": "inference"}

Results = dict[str, Any]


def load(folder: Path = RESULTS) -> list[Results]:
    """Those of every GPU."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))]


def where(results: Results) -> str:
    """The GPU and the versions of a run."""
    found = results["conditions"]
    return (
        f"{found['device']}, driver {found['driver']}, torch {found['torch']}, Triton {found['triton']}, "
        f"commit {found['commit']}, {found['date']}"
    )


def speeds(all_results: Sequence[Results]) -> str:
    """DenseNet-121's times beside torchvision's, a table a GPU."""
    parts = []
    for results in all_results:
        rows = [line(results, kind, batch) for kind in KINDS for batch in batches(results[kind])]
        title = "DenseNet-121, 224x224, bfloat16 autocast, channels_last; speed and memory, torchvision = 1"
        parts.append(f"{title} ({where(results)}):\n\n{table(HEADER, rows)}")
    return "\n\n".join(parts) or NONE


def batches(rows: Sequence[Results]) -> list[float]:
    return sorted({row["batch"] for row in rows})


def line(results: Results, kind: str, batch: float) -> tuple[str, ...]:
    """The figures of a batch: a dash for what was not measured, the reason for what failed."""
    rows = {row["competitor"]: row for row in results[kind] if row["batch"] == batch}
    compiled = [r for r in results["compiled"] if r["competitor"] == "compile" and r["batch"] == batch]
    stock, ours, again = (rows.get(name, {}) for name in ("torchvision", "ours", "ours-me"))
    return (
        KINDS[kind],
        f"{batch:.0f}",
        milliseconds(stock),
        milliseconds(ours),
        ratio(ours, "speed_ratio", "x"),
        ratio(ours, "memory_ratio"),
        f"{ratio(again, 'speed_ratio', 'x')}, {ratio(again, 'memory_ratio')}",
        ratio(compiled[0] if compiled and kind == "training" else {}, "speed_ratio", "x"),
    )


def milliseconds(row: Results) -> str:
    if row.get("failure"):
        return row["failure"]
    return f"{1e3 * row['median_s']:.1f} ms" if row.get("median_s") else "-"


def ratio(row: Results, name: str, unit: str = "") -> str:
    return number(row.get(name) or None, 2, unit)


def tests(all_results: Sequence[Results]) -> str:
    """What has run on each GPU."""
    lines = []
    for results in all_results:
        counts: dict[str, int] = {}
        for step in results["steps"]:
            for kind, count in step.get("tests", {}).items():
                counts[kind] = counts.get(kind, 0) + count
        counted = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"
        lines.append(f"- {where(results)}: tests {counted}")
    return "\n".join(lines) or NONE


PAGES: dict[str, Callable[[Sequence[Results]], str]] = {"docs/what-is-fast-where.md": speeds, "docs/versions.md": tests}


def main() -> None:
    """Writes the pages."""
    results = load()
    for name, render in PAGES.items():
        path = ROOT / name
        path.write_text(rewritten(path.read_text(), render(results), MARK))


if __name__ == "__main__":
    main()
