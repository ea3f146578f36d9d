"""The compiled library, as far as it shows without a GPU: every architecture, no spill, no stack, loads anywhere."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from backends.cuda import emulation
from densenet_fast.backends import aten, cuda, cuda_kernels, extension

KERNELS = {
    # kernels, and how many: four dtypes in three widths, float64 in two, in one or two variants; or four dtypes, or two
    # accumulation types, or one for all
    "append_kernel": 22,
    "combine_statistics_kernel": 2,
    "finalise_kernel": 11,
    "combine_sums_kernel": 4,
    "bn_relu_maxpool_kernel": 22,
    "bn_relu_pool_backward_kernel": 22,
    "bn_relu_global_avgpool_kernel": 11,
    "prepare_kernel": 1,
    "update_running_kernel": 2,
}

pytestmark = pytest.mark.skipif(
    not cuda_kernels._built(), reason="the library was built without CUDA: nvcc was not found, or DENSENET_FAST_CUDA=0"
)


def cuobjdump():
    """NVIDIA's tool, from the toolkit or from the triton package."""
    nvcc = emulation.find_nvcc()
    beside = [Path(nvcc).resolve().parent / "cuobjdump"] if nvcc else []
    try:
        import triton

        beside.append(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    except ImportError:
        pass
    return next((str(path) for path in beside if path.exists()), shutil.which("cuobjdump"))


@pytest.fixture(scope="module")
def usage():
    """(architecture, kernel, {resource: amount}) of every kernel in the library."""
    if cuobjdump() is None:
        pytest.skip("cuobjdump was not found (it is in the CUDA toolkit and in the triton package)")
    text = subprocess.run(
        [cuobjdump(), "-res-usage", extension.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    found, architecture = [], None
    for line in text.splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found.append((architecture, kernel, {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}))
    return found


def test_every_kernel_of_every_architecture(usage):
    architectures = {architecture for architecture, _, _ in usage}
    assert architectures
    for architecture in architectures:
        for kernel, count in KERNELS.items():
            assert sum(a == architecture and f"{len(kernel)}{kernel}" in k for a, k, _ in usage) == count, architecture
    assert len(usage) == len(architectures) * sum(KERNELS.values())


def test_no_kernel_spills_or_has_a_stack(usage):
    assert not [item for item in usage if item[2]["STACK"] or item[2]["LOCAL"]]
    assert max(item[2]["REG"] for item in usage) <= 128


def test_architectures_are_those_that_nvcc_knows(usage):
    nvcc = emulation.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    expected = {a for a in ("75", "80", "86", "89", "90", "100", "120") if f"compute_{a}\n" in known}
    if {a for a, _, _ in usage} != expected:
        pytest.skip("built for the architectures of TORCH_CUDA_ARCH_LIST")
    listed = subprocess.run([cuobjdump(), "--list-ptx", extension.LIBRARY], capture_output=True, text=True, check=True)
    newest = max(expected, key=int)
    assert set(re.findall(r"sm_(\d+)", listed.stdout)) == {newest}


def test_the_library_needs_nothing_of_cuda_and_shows_none_of_its_runtime():
    symbols = subprocess.run(["nm", "-D", extension.LIBRARY], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1].split("@")[0] for line in symbols.splitlines()]
    assert not [name for name in names if re.match(r"_*cu(da)?[A-Z]|_ZN\w*4cuda", name)]
    needed = subprocess.run(["readelf", "-d", extension.LIBRARY], capture_output=True, text=True, check=True).stdout
    assert "NEEDED" in needed and not re.search(r"NEEDED.*(cuda|nvrtc)", needed)


def test_without_a_gpu_another_backend_serves_and_it_is_said_why():
    assert cuda.unavailable() == ("no CUDA device" if not torch.cuda.is_available() else None)
    assert not cuda.supports(torch.device("cpu"), torch.float32)
    with pytest.raises(RuntimeError, match="bn_relu_global_avgpool: x: expected tensors on a GPU"):
        torch.ops.densenet_fast.cuda_bn_relu_global_avgpool(torch.ones(4, 3), *torch.ones(3, 3), None, 1, 0)


def test_a_library_without_cuda_is_explained(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "_built", lambda: False)
    assert "built without CUDA" in cuda_kernels.unavailable.__wrapped__()


def test_the_table_is_whole():
    public = {n for n, f in vars(aten).items() if callable(f) and f.__module__ == aten.__name__ and n[0] != "_"}
    assert public - set(cuda.__all__) == set()
