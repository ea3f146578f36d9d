"""Every kernel in CUDA C++, run on the CPU thread by thread: results, barriers, and independence of the threads' order.

No GPU is needed; the headers of nvcc are."""

import os
import subprocess
import sys

import pytest

from backends.cuda import emulation

pytestmark = pytest.mark.skipif(emulation.find_nvcc() is None, reason="nvcc was not found")

SUITES = ["tests/backends/test_kernels.py", "tests/backends/test_pool_kernels.py"]
OWN = "statistics or append or finalise or pool_backward or maxpool or avgpool or maximum or nan"
"""The names of tests of kernels in CUDA C++, among those of all kernels."""


def run(arguments, order="forward"):
    environment = {**os.environ, **emulation.environment(emulation.build(), order), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    tests = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=emulation.ROOT)
    assert tests.returncode == 0 and " passed" in tests.stdout, tests.stdout[-3000:] + tests.stderr[-3000:]


def test_every_kernel():
    run(["tests/backends/cuda/on_device.py"])


def test_every_kernel_with_threads_in_reverse_order():
    run(["tests/backends/cuda/on_device.py", "-k", "bfloat16"], order="reverse")


def test_the_suite_of_all_backends():
    run([*SUITES, "-k", f"cuda- and ({OWN}) and not conv1x1 and not conv3x3 and not float16"])


BROKEN = """
#include <cuda_fp16.h>
#include "emulator.h"
#include <cstdio>
#include <cstring>
using namespace densenet_fast::cuda;
struct Params { float* out; int fault; };
void kernel(const Params p) {
  float* memory = static_cast<float*>(shared_memory());
  if (p.fault != 1) memory[threadIdx.x] = threadIdx.x;
  if (p.fault == 2 && threadIdx.x > 3) return;
  if (p.fault != 3) __syncthreads();
  p.out[threadIdx.x] = memory[(threadIdx.x + 1) % 32];
}
int main() {
  for (int fault = 0; fault < 4; ++fault) {
    float out[32] = {};
    const char* error = launch<Params>(kernel, dim3(1), dim3(32), 32 * sizeof(float), nullptr, Params{out, fault});
    std::printf("%s %g %g\\n", error ? "error" : "ran", out[5], out[31]);
  }
}
"""


def test_the_emulation_finds_what_it_is_for(tmp_path):
    """Memory nobody wrote is NaN, a barrier that some threads miss an error, and without one the order shows."""
    (tmp_path / "broken.cpp").write_text(BROKEN)
    program = tmp_path / "broken"
    include = ["-I", os.path.dirname(emulation.__file__)]
    command = [emulation.find_nvcc(), "-x", "c++", "-std=c++20", *include, tmp_path / "broken.cpp", "-o", program]
    subprocess.run(command, check=True)
    outputs = {}
    for order in ("forward", "reverse"):
        environment = {**os.environ, "DENSENET_FAST_EMULATED_ORDER": order}
        outputs[order] = subprocess.run([program], env=environment, capture_output=True, text=True).stdout.splitlines()
    for right, unwritten, missed, racing in outputs.values():
        assert right == "ran 6 0" and "nan" in unwritten and missed.startswith("error")
        assert racing != right
    assert outputs["forward"][3] != outputs["reverse"][3]
