"""``make gpu``: the Triton backend on a GPU, its results and then its times, step by step, and one table at the end.

python tests/gpu.py             every step on the GPU
python tests/gpu.py --dry-run   the same steps without one: kernels in Triton's interpreter, times left out
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"]
BENCH = [sys.executable, "-m", "densenet_fast", "bench"]
TRITON = "tests/backends/triton"


class Step(NamedTuple):
    """A command; ``dry`` is what takes its place without a GPU, None where there is nothing to run."""

    name: str
    command: list[str]
    dry: list[str] | None


def steps() -> list[Step]:
    """All of them, in order."""
    info = [sys.executable, "-m", "densenet_fast", "info"]
    results = [*PYTEST, f"{TRITON}/on_device.py"]
    kernels = [*PYTEST, "tests/backends/test_kernels.py", "-k"]
    ops = [*PYTEST, "tests/ops", "-k"]
    tuner = [sys.executable, "-m", "densenet_fast.backends.triton.tune"]
    few = "triton- and float32 and not 33 and not 16"
    few_ops = "opcheck_bn_relu_conv1x1 or ten_thousand and float32 and True"
    return [
        Step("what runs where", info, info),
        Step("results, reproducibility, graphs", results, results),
        Step("every access of the kernels", [], [*PYTEST, f"{TRITON}/in_interpreter.py"]),
        Step("every kernel against float64", [*kernels, "triton-"], [*kernels, few]),
        Step("the ops", [*ops, "not bad_input"], [*ops, few_ops]),
        Step("the table's rows, measured", tuner, [*tuner, "--dry-run"]),
        Step("training, bfloat16", [*BENCH, "--dtype", "bf16", "--batch", "64"], [*BENCH, "--help"]),
        Step("inference, bfloat16", [*BENCH, "--dtype", "bf16", "--batch", "64", "--infer"], [*BENCH, "--help"]),
    ]


def main() -> int:
    """Runs the steps and returns 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: in Triton's interpreter")
    dry = parser.parse_args().dry_run
    if not dry and not torch.cuda.is_available():
        print("no CUDA device; --dry-run walks the steps in Triton's interpreter", file=sys.stderr)
        return 1
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if dry:
        environment["TRITON_INTERPRET"] = "1"
    else:
        environment |= {"DENSENET_FAST_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    rows, passed = [], True
    for step in steps():
        command = step.dry if dry else step.command
        if not command:
            continue
        print(f"\n== {step.name}: {' '.join(command)}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        passed = passed and code == 0
        rows.append(f"{step.name:40} {'passed' if code == 0 else 'FAILED'} {time.perf_counter() - start:7.1f} s")
    print("\n" + "\n".join(rows))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
