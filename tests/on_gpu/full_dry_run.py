"""The long command without a GPU, every line of it: interpreted, emulated, stood in for. ``make emulate`` runs this
file."""

import json

import pytest

from on_gpu import full
from on_gpu.checks import LEFT_OUT, PASSED
from on_gpu.test_dry_runs import dry_run

pytest.importorskip("triton", reason="Triton is not installed")


def test_full(tmp_path):
    page = dry_run(tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {step["state"] for step in results["steps"]} <= {PASSED, LEFT_OUT}
    assert all(results[name] for name in full.TABLES)
    for title in ("TRAINING", "INFERENCE", "EVERY KERNEL", "WHERE THE TIME GOES", "TUNING", "STEPS", "VERSIONS"):
        assert f"== {title}" in page
