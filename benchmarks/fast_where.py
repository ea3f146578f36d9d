"""The pages' tables of what is fast where, from the committed results: ``python benchmarks/fast_where.py``.

Writes what stands between the marks of README.md (some figures) and docs/what-is-fast-where.md (all of them).
"""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from densenet_fast.benchmarking.results import best_rows
from densenet_fast.table import number, table
from figures import RESULTS, ROOT, rewritten

MARK = "table of results"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MODES = {"train": "training step", "infer": "inference"}
ENGINES = {
    "torchvision": "torchvision",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
    "ours": "densenet_fast",
}
SHOWN = (("nvidia_h200", "bf16", 256), ("cpu_intel_r_xeon_r_processor_avx512", "fp32", 16))
"""Folder, dtype and batch of the times in README.md."""
IN_A_BUDGET = ("cpu_amd_epyc_avx512", ("densenet121", "densenet264"))
"""Folder and networks of the largest batches there."""

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a CSV, numbers as such, what is missing as None."""
    with open(path) as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def value(text: str) -> str | float | None:
    try:
        return float(text)
    except ValueError:
        return text or None


def command(path: Path) -> str:
    """That which made the results beside ``path``, without the folder that they were written to."""
    line = path.with_suffix(".md").read_text().splitlines()[2]
    return re.sub(r" --out [^\s`]+", "", line)


def measured(path: Path) -> dict[float, dict[str, Row]]:
    """The row of the faster layout, by batch and implementation."""
    rows: dict[float, dict[str, Row]] = {}
    for row in best_rows(read(path)):
        rows.setdefault(row["batch"], {})[row["competitor"]] = row
    return rows


def ratios(row: Row) -> tuple[str, str]:
    """Speed and memory, stock's 1."""
    return number(row.get("speed_ratio"), 2, "x"), number(row.get("memory_ratio"), 2)


def everything(results: Path) -> str:
    """Every measured device, dtype and mode."""
    header = ("device", "dtype", "mode", "backend", "speed", "memory", "`memory_efficient=True`", "date", "command")
    lines = []
    for path in sorted(results.glob("*/densenet121_*_*.csv")):
        if match := re.fullmatch(r"densenet121_(train|infer)_(\w+32|\w+16)", path.stem):
            for batch, rows in measured(path).items():
                ours, again = rows["ours"], rows.get("ours-me", {})
                mode = f"{MODES[match[1]]}, {batch:.0f} image{'s' * (batch > 1)}"
                where = (ours["device"], DTYPES[match[2]], mode, f"`{ours['backend']}`")
                made = (", ".join(ratios(again)), ours["date"], command(path))
                lines.append((*where, *ratios(ours), *made))
    for path in sorted(results.glob("*/volumes.csv")):
        for row in read(path):
            mode = "training step, {batch:.0f} volumes of {size:.0f}x{size:.0f}x{size:.0f}".format(**row)
            where = (row["device"], DTYPES[row["dtype"]], mode, f"`{row['backend']}`")
            lines.append((*where, *ratios(row), "-", row["date"], command(path)))
    return f"{table(header, lines)}\n\n{engines(results)}"


def engines(results: Path) -> str:
    """Inference on CPUs beside other engines, where they were measured."""
    header = ("inference, milliseconds", "dtype", "images", *ENGINES.values())
    lines = []
    for path in sorted(results.glob("*/densenet121_infer_*.csv")):
        for batch, rows in measured(path).items():
            if rows.keys() & {"openvino", "onnxruntime"}:
                times = [rows[name]["median_s"] if name in rows else None for name in ENGINES]
                cells = [number(None if time is None else 1e3 * time, 1) for time in times]
                lines.append((rows["ours"]["device"], DTYPES[rows["ours"]["dtype"]], f"{batch:.0f}", *cells))
    return table(header, lines)


def some(results: Path) -> str:
    """A few rows for somebody in a hurry."""
    header = ("DenseNet-121, 224x224", "on", "torchvision", "densenet_fast", "`memory_efficient=True`", "command")
    lines = []
    for mode in MODES:
        for folder, dtype, batch in SHOWN:
            path = results / folder / f"densenet121_{mode}_{dtype}.csv"
            rows = measured(path)[batch]
            flags = f"{' --infer' * (mode == 'infer')}{' --dtype bf16' * (dtype == 'bf16')} --batch {batch}"
            cells = [
                time_and_memory(rows[name]) if name in rows else "-" for name in ("torchvision", "ours", "ours-me")
            ]
            what = f"{MODES[mode]}, {batch} images, {DTYPES[dtype]}"
            link = f"[`python -m densenet_fast bench{flags}`]({page(path, results)})"
            lines.append((what, rows["ours"]["device"], *cells, link))
    return table(header, [*lines, *largest(results)])


def time_and_memory(row: Row) -> str:
    """In brackets what they are of torchvision's."""
    speed, memory = ratios(row)
    stock = row["competitor"] == "torchvision"
    time = f"{1e3 * row['median_s']:.4g} ms" + ("" if stock else f" (**{speed}**)")
    if row["peak_mib"] is None:
        return time
    return f"{time}, {row['peak_mib']:.0f} MiB" + ("" if stock else f" (**{memory}**)")


def largest(results: Path) -> list[tuple[str, ...]]:
    """The largest batches that fit a budget."""
    folder, networks = IN_A_BUDGET
    path = results / folder / "largest_batch.csv"
    found = {(row["network"], row["competitor"]): row for row in read(path)}
    lines = []
    for network in networks:
        stock, *ours = (found[network, name] for name in ("torchvision", "ours", "ours-me"))
        cells = [f"{row['batch']:.0f} images (**{row['batch'] / stock['batch']:.1f}x**)" for row in ours]
        what = f"largest batch within {stock['budget_gib']:g} GiB, training, {network}, {DTYPES[stock['dtype']]}"
        link = f"[`python benchmarks/largest_batch.py --budget {stock['budget_gib']:g}`]({page(path, results)})"
        lines.append((what, stock["device"], f"{stock['batch']:.0f} images", *cells, link))
    return lines


def page(path: Path, results: Path) -> str:
    """The address of the results that are read beside ``path``, from README.md."""
    return f"benchmarks/results/{path.with_suffix('.md').relative_to(results)}"


PAGES: dict[str, Callable[[Path], str]] = {"README.md": some, "docs/what-is-fast-where.md": everything}


def main() -> None:
    """Writes the pages."""
    for name, render in PAGES.items():
        path = ROOT / name
        path.write_text(rewritten(path.read_text(), render(RESULTS), MARK))


if __name__ == "__main__":
    main()
