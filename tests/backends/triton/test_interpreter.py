"""The Triton kernels on CPUs: in Triton's interpreter, which has to be chosen before Triton is imported, so in
processes of their own; and what the backend says of itself."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
import torch

from densenet_fast import backends
from densenet_fast.backends import aten, cuda, cuda_kernels, extension, nvidia, triton

ROOT = Path(backends.__file__).parents[2]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_every_step_of_the_gpu_command_in_the_interpreter(tmp_path):
    """Every kernel, a network's training step, the ops, traffic, launches, and the tuner's plans."""
    result = run("tests/gpu.py", "--dry-run", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    assert "FAILED" not in result.stdout and result.stdout.count(" passed") >= 8
    summary, log = ((tmp_path / f"{name}.txt").read_text() for name in ("summary", "log"))
    assert summary.count("  passed") >= 8 and log.count("\n== ") >= 8 and "kernel" in log


FAILING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session="leaves" in sys.argv)
print("child", child.pid, flush=True)
time.sleep(60 if "late" in sys.argv else 0)
sys.exit("fails" in sys.argv)
"""


@pytest.mark.parametrize(
    "how, state", [("", "passed"), ("fails", "FAILED"), ("late", "TIMED OUT"), ("late leaves", "TIMED OUT")]
)
def test_a_step_of_the_gpu_command_ends_in_time(tmp_path, how, state):
    """Whatever a child of it does that holds its output; what it printed is kept."""
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    start = time.perf_counter()
    assert gpu.run([sys.executable, "-c", FAILING, *how.split()], dict(os.environ), log, 10) == state
    assert time.perf_counter() - start < 40
    before, child = log.read_text().splitlines()
    assert before == "before" and child.startswith("child ")
    if "leaves" in how:
        os.kill(int(child.split()[1]), signal.SIGKILL)


def test_the_gpu_command_wants_a_gpu():
    result = run("tests/gpu.py", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1 and "no CUDA device; --dry-run" in result.stderr
    result = run("-m", "densenet_fast.backends.triton.tune", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1 and "no CUDA device; --dry-run" in result.stderr


def test_triton_is_not_imported_with_the_package():
    code = "import sys, densenet_fast.backends.triton as b; b.unavailable(); print('triton' in sys.modules)"
    assert run("-c", code, TRITON_INTERPRET="1").stdout.strip() == "False"


def test_info_tells_of_the_interpreter():
    output = run("-m", "densenet_fast", "info", TRITON_INTERPRET="1").stdout
    assert "interpreted" in output and re.search(r"float32, float16 +\| triton", output)


@pytest.fixture
def asked_anew():
    """Forgets what was found out about the machine, before and after."""
    functions = (triton.unavailable, cuda_kernels.unavailable, nvidia.obstacle)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


def gpus(monkeypatch, *capabilities):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])


def test_reasons(monkeypatch, asked_anew):
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    gpus(monkeypatch)
    assert triton.unavailable() == "no CUDA device"
    triton.unavailable.cache_clear()
    gpus(monkeypatch, (7, 5), (7, 0))
    assert "cuda:0 has compute capability 7.5, below 8.0; cuda:1" in triton.unavailable()
    triton.unavailable.cache_clear()
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in triton.unavailable()


@pytest.mark.parametrize("with_cuda", [True, False])
def test_each_device_is_served_by_what_it_can_run(monkeypatch, asked_anew, with_cuda):
    """Where the library holds no kernels in CUDA C++, Triton's serve, and it is said what is missing."""
    warnings = set()
    monkeypatch.setattr(backends, "_warn", warnings.add)
    monkeypatch.setattr(extension, "unavailable", lambda: None)
    monkeypatch.setattr(cuda_kernels, "_built", lambda: with_cuda)
    monkeypatch.setattr(cuda_kernels, "emulated", lambda: False)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    gpus(monkeypatch, (9, 0), (7, 0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert backends.select(torch.device("cuda"), dtype) is (cuda if with_cuda else triton)
        assert backends.select(torch.device("cuda:1"), dtype) is aten
    assert backends.select(torch.device("cuda:0"), torch.float64) is (cuda if with_cuda else aten)
    assert bool(warnings) != with_cuda and all("cuda backend" in w and "without CUDA" in w for w in warnings)
    assert "cuda:1 has compute capability 7.0" in triton.describe()


def test_unknown_attributes_raise():
    with pytest.raises(AttributeError, match="no attribute 'bn_relu'"):
        triton.bn_relu  # noqa: B018
