"""The short command without a GPU, every line of it: interpreted, emulated, stood in for. The long one is in
``full_dry_run.py``."""

import subprocess
import sys

import pytest

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
        "3x3 in CUDA C++",
        "plans",
        "network",
        "speed",
        "kernels",
        "choices",
        "machine code",
    }
    for title in ("A TRAINING STEP", "GPU TIME", "OPEN CHOICES", "PLANS", "LARGEST ERRORS", "VERSIONS"):
        assert f"== {title}" in page
