"""The numbers of each epoch and the table of them, metrics.csv."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from densenet_fast.training.files import atomic_file

__all__ = ["COLUMNS", "METRICS", "epoch_line", "write_csv"]

METRICS = "metrics.csv"
COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "lr",
    "seconds_per_step",
    "images_per_second",
)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Replaces the table at ``path`` by these rows."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def epoch_line(row: Mapping[str, float], epochs: int) -> str:
    """One line of a run's report."""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"
        f"  train loss {row['train_loss']:.4f}  accuracy {100 * row['train_accuracy']:6.2f} %"
        f"  |  test loss {row['test_loss']:.4f}  accuracy {100 * row['test_accuracy']:6.2f} %"
        f"  |  lr {row['lr']:g}  {row['seconds_per_step']:.4f} s/step  {row['images_per_second']:.0f} images/s"
    )
