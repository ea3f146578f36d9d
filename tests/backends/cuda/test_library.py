"""The compiled library, as far as it shows without a GPU: every architecture, no spill, no stack, loads anywhere."""

import math
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
import torch

from backends.cuda import emulation
from densenet_fast.backends import cuda, cuda_bn_relu_conv3x3, cuda_kernels, extension
from densenet_fast.backends.affine import Affine, Statistics
from densenet_fast.backends.recording import Recording

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
    # two dtypes, three widths of the result, tiles of two sizes; two sizes; three widths
    "bn_relu_conv3x3_kernel": 12,
    "bn_relu_conv3x3_grad_input_kernel": 4,
    "bn_relu_conv3x3_grad_weight_kernel": 6,
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
    """But those by tensor cores: of 8.0, which 8.6 and 8.9 run too, and the first of every later one."""
    architectures = {architecture for architecture, _, _ in usage}
    assert architectures
    expected = 0
    for architecture in architectures:
        for kernel, count in KERNELS.items():
            found = sum(a == architecture and f"{len(kernel)}{kernel}" in k for a, k, _ in usage)
            left_out = "conv3x3" in kernel and architecture in ("75", "86", "89")
            assert found == (0 if left_out else count), (architecture, kernel)
            expected += found
    unnamed = {k for _, k, _ in usage if not any(f"{len(kernel)}{kernel}" in k for kernel in KERNELS)}
    assert len(usage) == expected and not unnamed, unnamed


def test_no_kernel_spills_or_has_a_stack(usage):
    assert not [item for item in usage if item[2]["STACK"] or item[2]["LOCAL"]]
    assert max(item[2]["REG"] for item in usage if "conv3x3" not in item[1]) <= 128


REGISTERS = 1 << 16
SHARED = {80: 164 << 10, 86: 100 << 10, 90: 228 << 10}
"""Of a multiprocessor. A block takes one KiB of shared memory more than it asks for."""
LAYERS = {  # grid, B, k; of each 3x3 kernel how many blocks fit, by architecture
    "DenseNet-121": (((128, 56, 56), 128, 32), {80: (3, 2, 2), 86: (2, 1, 1), 90: (3, 3, 2)}),
    "DenseNet-161": (((64, 56, 56), 192, 48), {80: (2, 1, 1), 86: (1, 1, 1), 90: (2, 2, 1)}),
    "DenseNet-BC-100": (((64, 32, 32), 48, 12), {80: (4, 3, 2), 86: (2, 2, 1), 90: (4, 3, 2)}),
}
INSTANCES = {32: ("Li4ELi4ELi4E", "Li2E", "Li2ELi4E"), 48: ("Li8ELi2ELi6E", "Li2E", "Li1ELi6E")}
INSTANCES[12] = ("Li4ELi4ELi2E", "Li2E", "Li2ELi2E")
"""Of the 3x3 kernels, by k, how their template parameters are written: warps, tiles of 16 pixels and of 8 outputs."""


@pytest.mark.parametrize("network", LAYERS)
def test_how_many_blocks_of_the_3x3_kernels_fit_a_multiprocessor(usage, network):
    """By their registers and shared memory; the weight's gradient of DenseNet-161 has twelve warps a block, not six."""
    (grid, channels, outputs), expected = LAYERS[network]
    rows = math.prod(grid)
    if set(map(str, expected)) - {architecture for architecture, _, _ in usage}:
        pytest.skip("built for the architectures of TORCH_CUDA_ARCH_LIST")

    def body(z, new, grad, scaled, *vectors):
        affine, w2 = Affine(*vectors[:3]), vectors[3]
        statistics = Statistics(*(torch.empty_like(new[0], dtype=torch.float32) for _ in range(3)), 1e-5)
        cuda_bn_relu_conv3x3.bn_relu_conv3x3(z, affine, w2, None, grid, new, statistics=statistics, processors=132)
        cuda_bn_relu_conv3x3.grad_input(grad, z, affine, w2, grid, scaled, 132)
        cuda_bn_relu_conv3x3.grad_weight(grad, z, affine, grid, None, None, 132)
        return torch.empty_like(z)

    z, y = (torch.empty(rows, n, dtype=torch.bfloat16) for n in (channels, outputs))
    vectors = (*torch.empty(3, channels).unbind(), torch.empty(outputs, 3, 3, channels, dtype=torch.bfloat16))
    steps = Recording(body, [z, y, y.clone(), z.clone(), *vectors], torch.device("cpu")).steps
    launches = [step for step in steps if step.shared > 16 << 10]
    for architecture, blocks in expected.items():
        for launch, count, instance in zip(launches, blocks, INSTANCES[outputs], strict=True):
            threads = math.prod(launch.block)
            kernels = [
                found["REG"]
                for a, name, found in usage
                if a == f"{architecture // 10}0"
                and f"{launch.name.removeprefix('cuda_')}_kernelI13__nv_bfloat16{instance}" in name
            ]
            by_registers = REGISTERS // (threads * -(-max(kernels) // 8) * 8)
            by_shared = SHARED[architecture] // (launch.shared + 1024)
            assert min(by_registers, by_shared) >= count, (architecture, launch.name, by_registers, by_shared)


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_3x3_kernels_are_made_of_tensor_cores_instructions(usage, architecture):
    """Products, loads of matrices and asynchronous copies of 16 bytes; no registers in local memory."""
    if str(architecture) not in {a for a, _, _ in usage}:
        pytest.skip("built for the architectures of TORCH_CUDA_ARCH_LIST")
    command = [cuobjdump(), "-sass", "-arch", f"sm_{architecture}", extension.LIBRARY]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = [code for code in text.split("Function : ")[1:] if "conv3x3" in code.split("\n", 1)[0]]
    assert len(kernels) == 22
    for code in kernels:
        instructions = re.findall(r"\b(HMMA\.16816\.F32|LDSM\.16\.MT?88\.4|LDGSTS\S*\.128|LDL|STL)\b", code)
        names = {instruction.split(".")[0] for instruction in instructions}
        assert names == {"HMMA", "LDSM", "LDGSTS"}, (code.split("\n", 1)[0], names)


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


ARCHITECTURES = {
    # of TORCH_CUDA_ARCH_LIST, and of the tensor cores' kernels: none that a lesser one of the same major serves
    "7.5;8.0;8.6;8.9;9.0+PTX": ["sm_80", "sm_90", "compute_90"],
    "8.6;8.0;9.0": ["sm_80", "sm_90"],
    "7.5;8.9;9.0a": ["sm_89", "sm_90a"],
    "8.6": ["sm_86"],
    "7.5": ["sm_75"],
}


@pytest.mark.parametrize("asked", ARCHITECTURES)
def test_architectures_of_the_tensor_cores_kernels(asked, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    monkeypatch.setattr(setuptools, "setup", lambda **metadata: None)
    gpu_code = runpy.run_path(str(emulation.ROOT / "setup.py"))["gpu_code"]
    assert re.findall(r",code=(\w+)", gpu_code("nvcc", True)) == ARCHITECTURES[asked]
    assert len(re.findall(r",code=sm_", gpu_code("nvcc", False))) == len(asked.split(";"))


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
