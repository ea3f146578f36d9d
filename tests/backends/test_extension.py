"""The compiled library: what it needs, each of its instruction sets, and life without it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densenet_fast import backends
from densenet_fast.backends import aten, cpu, extension
from densenet_fast.backends.affine import empty_statistics

INSTRUCTION_SETS = {
    "default": "",
    "avx2": "avx2",
    "avx512": "avx512f",
    "avx512_bf16": "avx512_bf16",
    "amx_bf16": "amx_bf16",
}
"""And the flag by which /proc/cpuinfo shows each."""
MACROS = {
    "STABLE_TORCH_LIBRARY_FRAGMENT",
    "STABLE_TORCH_LIBRARY_IMPL",
    "STD_TORCH_CHECK",
    "TORCH_BOX",
    "TORCH_ERROR_CODE_CHECK",
}
"""That the headers of torch 2.11 define: TORCH_TARGET_VERSION hides newer functions, but no newer macros."""


def run(code_or_arguments, **environment):
    root = str(Path(backends.__file__).parents[2])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *code_or_arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        cwd=root,
    )


@pytest.mark.library
def test_library_is_built():
    assert extension.unavailable() is None
    assert cpu.describe().removeprefix("C++, ") in INSTRUCTION_SETS


@pytest.mark.library
def test_library_needs_no_cpp_symbol_of_torch_and_no_python():
    symbols = subprocess.run(["nm", "-D", "--undefined-only", extension.LIBRARY], capture_output=True, text=True)
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if name.startswith(("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "Py", "_Py"))]


def test_sources_use_no_macro_that_the_oldest_torch_lacks():
    sources = [path.read_text() for path in (Path(backends.__file__).parents[2] / "csrc").rglob("*.[ch]*")]
    used = {name for text in sources for name in re.findall(r"\b[A-Z_]*TORCH_[A-Z_]+\b", text)}
    assert "STD_TORCH_CHECK" in used and used <= MACROS


@pytest.mark.library
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_kernels_of_every_instruction_set(instruction_set):
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if INSTRUCTION_SETS[instruction_set] not in flags.split() + [""]:
        pytest.skip(f"this processor has no {instruction_set}")
    if cpu.describe() == f"C++, {instruction_set}":
        pytest.skip(f"every test of the kernels runs with {instruction_set} already")
    files = [f"tests/backends/test_{name}.py" for name in ("kernels", "pool_kernels", "accuracy")]
    tests = run(
        ["-m", "pytest", "-p", "no:cacheprovider", *files, "-k", "cpu- and not float64"],
        DENSENET_FAST_CPU=instruction_set,
        PYTEST_ADDOPTS="",
    )
    assert tests.returncode == 0 and " passed" in tests.stdout, tests.stdout[-3000:]
    name = run(
        ["-c", "from densenet_fast.backends import cpu; cpu.unavailable(); print(cpu.describe())"],
        DENSENET_FAST_CPU=instruction_set,
    )
    assert name.stdout.strip() == f"C++, {instruction_set}"


@pytest.mark.library
def test_unknown_instruction_set_is_refused():
    code = "from densenet_fast.backends import cpu; print(cpu.unavailable() or cpu.describe())"
    result = run(["-c", code], DENSENET_FAST_CPU="mmx")
    assert result.returncode != 0
    assert "DENSENET_FAST_CPU: expected default, avx2, avx512, avx512_bf16 or amx_bf16" in result.stderr


@pytest.mark.library
def test_wrong_arguments_raise():
    assert cpu.unavailable() is None
    x, vector, weight = torch.randn(4, 3), torch.randn(3), torch.randn(2, 3)
    affine, nothing = [vector] * 3, [None, None, None, 0.0, None, None, None]
    kernels = torch.ops.densenet_fast
    with pytest.raises(RuntimeError, match="expected 3 contiguous float32 values"):
        kernels.cpu_bn_relu(x, torch.randn(2), vector, vector)
    with pytest.raises(RuntimeError, match="weight: expected 3 columns, got 4"):
        kernels.cpu_bn_relu_conv1x1(x, *affine, torch.randn(2, 4), None, torch.empty(4, 2), *nothing)
    with pytest.raises(RuntimeError, match="expected float32 or bfloat16"):
        kernels.cpu_statistics(x.double(), vector, vector, vector, 1e-5)
    with pytest.raises(RuntimeError, match="adjacent columns"):
        kernels.cpu_statistics(torch.randn(3, 4).t(), vector, vector, vector, 1e-5)
    kept = torch.ones(4, 3, dtype=torch.bool)
    masks = {"bool": kept.float(), "x's shape": kept[:, :2], "adjacent columns": kept.t().contiguous().t()}
    for words, mask in masks.items():
        with pytest.raises(RuntimeError, match=f"mask: expected {words}"):
            kernels.cpu_dropout(x, mask, 2.0)
    with pytest.raises(RuntimeError, match=r"out: expected \[M, B\]"):
        kernels.cpu_bn_relu_conv1x1(x, *affine, weight, None, torch.empty(4, 3), *nothing)
    with pytest.raises(RuntimeError, match="out_mean: expected with out_var and out_rstd"):
        kernels.cpu_bn_relu_conv1x1(x, *affine, weight, None, torch.empty(4, 2), vector[:2], *nothing[1:])
    for partly in ([vector[:2], None, None, 0.0], [None, None, vector[:2], 0.0]):
        with pytest.raises(RuntimeError, match="out_mean: expected with out_var and out_rstd"):
            kernels.cpu_bn_relu_pool_conv1x1(x, *affine, weight, None, [1, 2, 2], *partly)
    with pytest.raises(RuntimeError, match="var: expected 3 contiguous float32 values"):
        kernels.cpu_bn_relu_maxpool(x, *affine, [1, 2, 2], vector, vector[:2], vector, 0.0)
    with pytest.raises(RuntimeError, match="mean: expected with scale and shift"):
        kernels.cpu_bn_relu_conv1x1(x, *affine, weight, None, torch.empty(4, 2), *nothing[:-1], vector[:2])
    with pytest.raises(RuntimeError, match=r"weight: expected \[k, B, 3, ...\] .*, contiguous or channels last"):
        kernels.cpu_bn_relu_conv3x3(x, *affine, torch.randn(2, 3, 3, 3).mT, None, [1, 2, 2], torch.empty(4, 2))
    with pytest.raises(RuntimeError, match="weight: expected 3 input channels, got 4"):
        kernels.cpu_bn_relu_conv3x3(x, *affine, torch.randn(2, 4, 3, 3), None, [1, 2, 2], torch.empty(4, 2))
    for grid, message in (
        ([2, 2, 2], "grid: expected the product 4, got 8"),
        ([4], "grid: expected one to three spatial sizes"),
        ([2, 2], "weight: expected 1 spatial dimensions, as the grid has, got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.cpu_bn_relu_conv3x3(x, *affine, torch.randn(2, 3, 3, 3), None, grid, torch.empty(4, 2))
    with pytest.raises(RuntimeError, match="dtype unlike"):
        kernels.cpu_bn_relu_conv1x1(x, *affine, weight.double(), None, torch.empty(4, 2), *nothing)
    grad, argmax = torch.randn(1, 3), torch.zeros(1, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="grid: expected the product 4, got 6"):
        kernels.cpu_bn_relu_maxpool(x, *affine, [1, 2, 3], *nothing[:4])
    with pytest.raises(RuntimeError, match="grid: expected one to three spatial sizes"):
        kernels.cpu_bn_relu_maxpool(x, *affine, [4], *nothing[:4])
    with pytest.raises(RuntimeError, match="grad: expected the shape of the maxima"):
        kernels.cpu_bn_relu_maxpool_backward(x, argmax, x, *affine, [1, 2, 2])
    for wrong in (argmax.long(), argmax[:, :2], argmax.expand(2, 3), argmax.repeat(1, 2)[:, ::2]):
        with pytest.raises(RuntimeError, match="argmax: expected uint8 of the shape of the maxima"):
            kernels.cpu_bn_relu_maxpool_backward(grad, wrong, x, *affine, [1, 2, 2])
    with pytest.raises(RuntimeError, match="images: expected a divisor of 4, got 3"):
        kernels.cpu_bn_relu_global_avgpool(x, *affine, 3)
    with pytest.raises(RuntimeError, match="images: expected a divisor of 4, got 3"):
        kernels.cpu_bn_relu_global_avgpool_backward(torch.randn(3, 3), x, *affine)


@pytest.mark.library
@pytest.mark.parametrize("rows", [1, 15, 16, 33, 100, 4099])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(rows, threads):
    """Any division of the rows into chunks and tiles covers each row once."""
    x, grad, weight = torch.randn(rows, 37), torch.randn(rows, 24), torch.randn(24, 37) / 6
    affine = backends.affine.Affine(torch.randn(37), torch.randn(37), torch.randn(37))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for backend in (cpu, cpu, aten):
            grad_x = torch.zeros_like(x)
            z = torch.empty(rows, 24)
            statistics, own = empty_statistics(z, 24, 1e-5), empty_statistics(x, 37, 1e-5)
            backend.bn_relu_conv1x1(x, affine, weight, None, z, statistics)
            backend.channel_statistics(x, own)
            need = dict(need_weight=True, need_sums=True)
            dw, sums = backend.bn_relu_conv1x1_backward(grad, x, affine, weight, grad_x, **need)
            results.append([z, *statistics[:3], grad_x, dw, *sums, *own[:3]])
    finally:
        torch.set_num_threads(before)
    for got, again, expected in zip(*results):
        assert got.equal(again)
        assert (got - expected).norm() <= 1e-5 * expected.norm() + 1e-5


@pytest.mark.library
@pytest.mark.parametrize("grid", [(1, 3, 5), (2, 40, 7), (7, 23, 40), (300, 9)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_pooling_with_any_number_of_threads(grid, threads):
    """Any division of the lines and images into chunks and tiles covers each pixel once."""
    x, weight = torch.randn(torch.Size(grid).numel(), 37), torch.randn(24, 37) / 6
    affine = backends.affine.Affine(torch.randn(37), torch.randn(37), torch.randn(37))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        results = []
        for backend in (cpu, cpu, aten):
            own, projected = empty_statistics(x, 37, 1e-5), empty_statistics(x, 24, 1e-5)
            out, argmax = backend.bn_relu_maxpool(x, affine, grid, own)
            scaled, sums = backend.bn_relu_maxpool_backward(out, argmax, x, affine, grid)
            mean = backend.bn_relu_global_avgpool(x, affine, grid)
            spread, mean_sums = backend.bn_relu_global_avgpool_backward(mean, x, affine, grid)
            pooled = backend.bn_relu_pool_conv1x1(x, affine, weight, None, grid, projected)
            results.append([out, argmax.float(), *own[:3], scaled, *sums, mean, spread, *mean_sums])
            results[-1] += [pooled, *projected[:3]]
    finally:
        torch.set_num_threads(before)
    for got, again, expected in zip(*results):
        assert got.equal(again)
        assert (got - expected).norm() <= 1e-5 * expected.norm() + 1e-5


def test_without_the_library_aten_serves_and_says_so_once(monkeypatch, recwarn):
    monkeypatch.setattr(extension, "unavailable", lambda: "not installed")
    backends._warn.cache_clear()
    for _ in range(3):
        assert backends.select(torch.device("cpu"), torch.float32) is aten
    assert [str(w.message) for w in recwarn] == ["densenet_fast: slower without its cpu backend: not installed"]
    assert backends.select(torch.device("cpu"), torch.float64) is aten
    backends._warn.cache_clear()


def test_a_missing_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "missing.so")
    assert "not installed" in extension.unavailable.__wrapped__()
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "broken.so")
    assert "do not load" in extension.unavailable.__wrapped__()
