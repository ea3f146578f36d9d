"""``make gpu``: the backends for GPUs on one, results and then times, step by step, and one table at the end.

python tests/gpu.py             every step on the GPU
python tests/gpu.py --dry-run   the same without one: Triton's kernels interpreted, those in CUDA C++ emulated, times
                                left out
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from backends.cuda import emulation

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"]
BENCH = [sys.executable, "-m", "densenet_fast", "bench"]
TRITON = "tests/backends/triton"
CUDA = "tests/backends/cuda"
SANITIZERS = {
    "memcheck": "--leak-check no",
    "racecheck": "--racecheck-report all",
    "initcheck": "",
    "synccheck": "",
}
"""compute-sanitizer's tools, and their flags."""
SANITIZED = "not runs and not graph and not 31_elements and not many_rows and not 40 and not 9)-"
"""The tests to run under them: small ones, for they take a hundred times as long."""


class Step(NamedTuple):
    """A command; ``dry`` is what takes its place without a GPU, None where there is nothing to run, and ``emulated``
    whether that runs on the emulated kernels in CUDA C++."""

    name: str
    command: list[str]
    dry: list[str] | None
    emulated: bool = False


def steps() -> list[Step]:
    """All of them, in order."""
    info = [sys.executable, "-m", "densenet_fast", "info"]
    results = [*PYTEST, f"{TRITON}/on_device.py"]
    kernels = [*PYTEST, "tests/backends/test_kernels.py", "-k"]
    ops = [*PYTEST, "tests/ops", "-k"]
    tuner = [sys.executable, "-m", "densenet_fast.backends.triton.tune"]
    pooling = [*PYTEST, "tests/backends/test_pool_kernels.py", "-k"]
    own = [*PYTEST, f"{CUDA}/on_device.py"]
    bandwidth = [sys.executable, "benchmarks/kernel_bandwidth.py"]
    few = "triton- and float32 and not 33 and not 16"
    few_pooling = "cuda- and float32 and not 33 and not 50"
    few_ops = "opcheck_bn_relu_conv1x1 or ten_thousand and float32 and True"
    return [
        Step("what runs where", info, info),
        Step("CUDA C++: results, reproducibility, graphs", own, own, emulated=True),
        *(
            Step(
                f"CUDA C++: compute-sanitizer {tool}",
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *flags.split(), *own, "-k", SANITIZED],
                [*own, "--collect-only", "-q", "-k", SANITIZED] if tool == "memcheck" else None,
                emulated=True,
            )
            for tool, flags in SANITIZERS.items()
        ),
        Step("CUDA C++: every kernel against float64", [*kernels, "cuda-"], None),
        Step(
            "the stem and the head against float64",
            [*pooling, "cuda- or aten-"],
            [*pooling, few_pooling],
            emulated=True,
        ),
        Step("CUDA C++: bandwidth, bfloat16", bandwidth, [*bandwidth, "--dry-run"], emulated=True),
        Step("CUDA C++: bandwidth, float32", [*bandwidth, "--dtype", "fp32"], None),
        Step("Triton: results, reproducibility, graphs", results, results),
        Step("Triton: every access of the kernels", [], [*PYTEST, f"{TRITON}/in_interpreter.py"]),
        Step("Triton: every kernel against float64", [*kernels, "triton-"], [*kernels, few]),
        Step("the ops", [*ops, "not bad_input"], [*ops, few_ops]),
        Step("the table's rows, measured", tuner, [*tuner, "--dry-run"]),
        Step("training, bfloat16", [*BENCH, "--dtype", "bf16", "--batch", "64"], [*BENCH, "--help"]),
        Step("inference, bfloat16", [*BENCH, "--dtype", "bf16", "--batch", "64", "--infer"], [*BENCH, "--help"]),
    ]


def main() -> int:
    """Runs the steps and returns 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: interpreted and emulated")
    dry = parser.parse_args().dry_run
    if not dry and not torch.cuda.is_available():
        print("no CUDA device; --dry-run walks the steps without one", file=sys.stderr)
        return 1
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    nvcc = emulation.find_nvcc()
    if dry:
        environment["TRITON_INTERPRET"] = "1"
    else:
        environment |= {"DENSENET_FAST_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    rows, passed = [], True
    for step in steps():
        command = step.dry if dry else step.command
        if not command:
            continue
        if dry and step.emulated and nvcc is None:
            rows.append(f"{step.name:46} left out: nvcc was not found")
            continue
        own = emulation.environment(emulation.build()) if dry and step.emulated else {}
        if command[0] == "compute-sanitizer":
            own["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor an allocation of its own, with bounds
        print(f"\n== {step.name}: {' '.join(command)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, env=environment | own).returncode
        passed = passed and code == 0
        rows.append(f"{step.name:46} {'passed' if code == 0 else 'FAILED'} {time.perf_counter() - start:7.1f} s")
    print("\n" + "\n".join(rows))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
