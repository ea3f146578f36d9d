"""What the tests of the training command share."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import densenet_fast
from densenet_fast.__main__ import main

TINY = "--growth-rate 2 --block-config 1,2 --num-init-features 4 --batch-size 16 --max-steps 3 --threads 1".split()
DIGITS = ["--data", "digits", *TINY]
PATH = os.pathsep.join(filter(None, (str(Path(densenet_fast.__file__).parents[1]), os.environ.get("PYTHONPATH"))))


def train(*arguments: object) -> int:
    """Runs the command in this process."""
    return main(["train", *map(str, arguments)])


def command(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs ``python ARGUMENTS`` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def checkpoint(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "checkpoint.pt", weights_only=True)


def table(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))


def differences(a: Any, b: Any, name: str = "state") -> list[str]:
    """The names of all leaves of two nested states that are not bitwise equal."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{name}: {a.keys() ^ b.keys()}"]
        return [found for key in a for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{name}: {len(a)} and {len(b)} items"]
        return [found for i, (x, y) in enumerate(zip(a, b)) for found in differences(x, y, f"{name}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    else:
        same = a == b
    return [] if same else [name]
