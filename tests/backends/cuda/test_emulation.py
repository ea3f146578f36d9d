"""Every kernel in CUDA C++, run on the CPU thread by thread: results, barriers, and independence of the threads' order.

No GPU is needed; the headers of nvcc are."""

import functools
import os
import subprocess
import sys

import pytest

from backends.cuda import emulation
from densenet_fast.backends import cuda_kernels
from densenet_fast.backends.contract import FUNCTIONS

pytestmark = pytest.mark.skipif(emulation.find_nvcc() is None, reason="nvcc was not found")

OF_GPUS = [f"tests/backends/cuda/{name}on_device.py" for name in ("", "vectors_", "running_")]
CONVOLUTION = "tests/backends/cuda/conv3x3_on_device.py"
SUITES = ["tests/backends/test_kernels.py", "tests/backends/test_pool_kernels.py"]
OWN = " or ".join([*filter(functools.partial(hasattr, cuda_kernels), FUNCTIONS), "maximum", "nan"])
"""The names of tests of kernels in CUDA C++, among those of all kernels."""


def run(arguments, order="forward"):
    environment = {**os.environ, **emulation.environment(emulation.build(), order), "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    tests = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=emulation.ROOT)
    assert tests.returncode == 0 and " passed" in tests.stdout, tests.stdout[-3000:] + tests.stderr[-3000:]


def test_every_kernel():
    run(OF_GPUS)


def test_the_3x3_kernels():
    """In one dtype; in both, and with threads in reverse order, in ``every_order.py``."""
    run([CONVOLUTION, "-k", "not torch.float16"])


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


def compiled(program, folder):
    """The executable made of the text of a C++ program over ``emulator.h``."""
    source, executable = folder / "program.cpp", folder / "program"
    source.write_text(program)
    command = [emulation.find_nvcc(), "-x", "c++", "-std=c++20", *emulation.INCLUDE, source, "-o", executable]
    subprocess.run(command, check=True)
    return executable


def test_the_emulation_finds_what_it_is_for(tmp_path):
    """Memory nobody wrote is NaN, a barrier that some threads miss an error, and without one the order shows."""
    program = compiled(BROKEN, tmp_path)
    outputs = {}
    for order in ("forward", "reverse"):
        environment = {**os.environ, "DENSENET_FAST_EMULATED_ORDER": order}
        outputs[order] = subprocess.run([program], env=environment, capture_output=True, text=True).stdout.splitlines()
    for right, unwritten, missed, racing in outputs.values():
        assert right == "ran 6 0" and "nan" in unwritten and missed.startswith("error")
        assert racing != right
    assert outputs["forward"][3] != outputs["reverse"][3]


RECORDED = """
#include "emulator.h"
#include <cstdio>
#include <thread>
using namespace densenet_fast::cuda;
struct Params { float* out; float value; };
struct Other { double *out, values[5]; };
void fill(const Params p) {
  float* memory = static_cast<float*>(shared_memory());
  memory[threadIdx.x] = p.value;
  __syncthreads();
  p.out[4 * blockIdx.x + threadIdx.x] = memory[3 - threadIdx.x] + threadIdx.x;
}
void copy(const Other p) { p.out[threadIdx.x] = p.values[threadIdx.x]; }
int main() {
  float out[8] = {}, again[8] = {};
  double doubles[5] = {};
  Params params{out, 10};
  const Other other{doubles, {1, 2, 3, 4, 5}};
  std::vector<Recorded> launches;
  recorder = &launches;
  launch<Params>(fill, dim3(2), dim3(4), 4 * sizeof(float), nullptr, params);
  launch<Other>(copy, dim3(1), dim3(5), 0, nullptr, other);
  std::thread([&] { launch<Params>(fill, dim3(1), dim3(4), 4 * sizeof(float), nullptr, {again, 20}); }).join();
  recorder = nullptr;
  std::printf("%zu %g %g %g\\n", launches.size(), out[7], doubles[4], again[3]);
  const Recorded& r = launches[0];
  std::printf("%d %u %u %u %u %zu %zu\\n", r.function == reinterpret_cast<void*>(fill), r.grid[0], r.grid[1],
              r.block[0], r.block[1], r.shared, r.parameters.size());
  params.value = 0;
  for (const Recorded& each : launches)
    if (run_grid(each.function, each.grid, each.block, each.shared, each.parameters.data()) != nullptr) return 1;
  std::printf("%g %g %g\\n", out[0], out[7], doubles[4]);
  params = {again, 30};
  run_grid(r.function, r.grid, r.block, r.shared, &params);
  std::printf("%g %g\\n", again[7], out[7]);
}
"""


def test_a_recorded_launch_is_not_made_until_it_is_run(tmp_path):
    """Nor are other threads' launches recorded; it runs on the parameters as they were, or on others."""
    output = subprocess.run([compiled(RECORDED, tmp_path)], capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == ["2 0 0 23", "1 2 1 4 1 16 16", "10 13 5", "33 13"]
