"""Both commands without a GPU, every line of them: interpreted, emulated, stood in for."""

import json
import subprocess
import sys

import pytest

from on_gpu import full
from on_gpu.checks import LEFT_OUT, PASSED, Journal
from on_gpu.page import LIMIT
from on_gpu.runner import ROOT

pytest.importorskip("triton", reason="Triton is not installed")

FILES = 8


def dry_run(out, *flags):
    """The page, of a run in which nothing failed."""
    command = [sys.executable, "tests/gpu.py", *flags, "--dry-run", "--seconds", "900", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    page = (out / "page.txt").read_text()
    assert result.stdout.endswith(page) and len(page) <= LIMIT and len(list(out.iterdir())) <= FILES
    return page


def test_smoke(tmp_path):
    page = dry_run(tmp_path, "--smoke")
    records = [record for record in Journal(tmp_path / "smoke.jsonl").read() if "state" in record]
    assert {record["state"] for record in records} <= {PASSED, LEFT_OUT}
    groups = {record["group"] for record in records}
    assert groups == {
        "build",
        "warm-up",
        "Triton",
        "machine",
        "CUDA C++",
        "plans",
        "network",
        "speed",
        "kernels",
        "choices",
        "machine code",
    }
    for title in ("A TRAINING STEP", "GPU TIME", "OPEN CHOICES", "PLANS", "LARGEST ERRORS", "VERSIONS"):
        assert f"== {title}" in page


def test_full(tmp_path):
    page = dry_run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {step["state"] for step in results["steps"]} <= {PASSED, LEFT_OUT}
    assert all(results[name] for name in full.TABLES)
    for title in ("TRAINING", "INFERENCE", "EVERY KERNEL", "WHERE THE TIME GOES", "TUNING", "STEPS", "VERSIONS"):
        assert f"== {title}" in page
