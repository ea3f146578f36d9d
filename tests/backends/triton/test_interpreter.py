"""The Triton kernels on CPUs, in Triton's interpreter, and what the backend says of itself.

The interpreter has to be chosen before Triton is imported. So the kernels run in processes of their own.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densenet_fast import backends
from densenet_fast.backends import aten, cuda, cuda_kernels, extension, nvidia, triton
from densenet_fast.backends.triton import tune

ROOT = Path(backends.__file__).parents[2]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "", **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


TESTS = {
    "every kernel": ["tests/backends/triton/on_device.py"],
    "every access": ["tests/backends/triton/in_interpreter.py"],
    "the suite of all backends": [
        "tests/backends/test_kernels.py",
        "-k",
        "triton- and float32 and not 33 and not 16",
    ],
    "the ops": ["tests/ops", "-k", "opcheck_bn_relu_conv1x1 and bias or ten_thousand and float32 and True"],
}


@pytest.mark.parametrize("tests", TESTS.values(), ids=TESTS)
def test_in_the_interpreter(tests):
    result = run("-m", "pytest", "-p", "no:cacheprovider", *tests, TRITON_INTERPRET="1")
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-6000:] + result.stderr[-3000:]


def test_the_tuner_plans_without_a_gpu_and_else_wants_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        assert tune.main(["--dry-run"]) == 0 and '"bn_relu_conv1x1": {(90,' in capsys.readouterr().out
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert tune.main([]) == 1 and "no CUDA device; --dry-run" in capsys.readouterr().err


def test_triton_is_not_imported_with_the_package():
    code = "import sys; from densenet_fast.backends import triton as b; b.unavailable(); print('triton' in sys.modules)"
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
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in triton.unavailable()


@pytest.mark.parametrize("with_cuda", [True, False])
def test_each_device_is_served_by_what_it_can_run(monkeypatch, asked_anew, with_cuda):
    """Where the library holds no kernels in CUDA C++, Triton's serve, and a warning says what is missing."""
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
