"""The same training with our implementation and with the stock one, side by side."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from densenet_fast.memory import MIB
from densenet_fast.table import table
from densenet_fast.training.data import load_data
from densenet_fast.training.distributed import launched_processes
from densenet_fast.training.files import atomic_file, write_csv
from densenet_fast.training.plots import plot_comparison
from densenet_fast.training.run import METRICS, SUMMARY, check_data, check_packages, initial_model, new_directory
from densenet_fast.training.settings import Settings, UsageError

__all__ = ["compare"]

COLUMNS = (
    "implementation",
    "test_accuracy",
    "test_loss",
    "seconds_per_step",
    "peak_memory_bytes",
    "added_memory_bytes",
)
HEADINGS = ("implementation", "test accuracy", "test loss", "seconds per step", "peak memory", "added by training")


def compare(settings: Settings, arguments: Sequence[str]) -> int:
    """Trains both implementations, one after the other, each in a fresh process, and prints a table.

    Args:
        settings: of our run.
        arguments: the command line they were made from; both runs repeat it.

    Returns:
        The exit code: 0, or that of the run that failed.
    """
    if launched_processes() > 1:
        raise UsageError("--compare: expected one process, got torchrun with several")
    check_packages()
    directory = new_directory(settings)
    data = load_data(settings)
    check_data(settings, data, 1)
    model = initial_model(settings, data)
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / "initial.pt"
    with atomic_file(weights) as file:
        torch.save(model.state_dict(), file)

    runs = {"reference": [settings.reference_model, "--no-memory-efficient"], "densenet_fast": [settings.model]}
    for name, model_arguments in runs.items():
        own = ["--compare", "none", "--initial-weights", str(weights), "--out", str(directory / name), "--model"]
        command = [sys.executable, "-m", "densenet_fast", "train", *arguments, *own, *model_arguments]
        code = subprocess.run(command).returncode
        if code:
            print(f"the run of {name} failed with exit code {code}", file=sys.stderr)
            return code

    summaries = [json.loads((directory / name / SUMMARY).read_text()) for name in runs]
    rows = [{column: summary[column] for column in COLUMNS} for summary in summaries]
    write_csv(directory / "comparison.csv", COLUMNS, rows)
    title = f"{settings.data}: the same weights and batches, stock PyTorch and densenet_fast"
    plot_comparison(directory / "comparison.png", title, {name: _epochs(directory / name) for name in runs})
    print(f"\n{directory / 'comparison.png'} shows the curves.\n\n{_table(rows)}")
    return 0


def _epochs(directory: Path) -> list[dict[str, float]]:
    with open(directory / METRICS, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _table(rows: Sequence[dict[str, Any]]) -> str:
    stock, ours = rows
    cells = []
    for row in rows:
        accuracy = f"{100 * row['test_accuracy']:.2f} %"
        memory = [f"{row[column] / MIB:.1f} MiB" for column in COLUMNS[4:]]
        seconds = f"{row['seconds_per_step']:.4f}"
        cells.append([row["implementation"], accuracy, f"{row['test_loss']:.4f}", seconds, *memory])
    ratios = [f"{stock[column] / ours[column]:.2f}x" if ours[column] else "" for column in COLUMNS[3:]]
    return table(HEADINGS, [*cells, ["reference / densenet_fast", "", "", *ratios]])
