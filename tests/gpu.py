"""``make gpu``: everything there is to learn on a GPU, step by step, in one folder, and one table at the end.

python3 tests/gpu.py             builds in place, tests, then measures: at most 9 minutes
python3 tests/gpu.py --dry-run   the same steps without a GPU: tests in Triton's interpreter and with the kernels
                                 in CUDA C++ emulated, benchmarks on the CPU

Needs this checkout, python3 with torch, and for the tests pytest; what is not there is named and left out. The log of
each step, the tables, CSV files and pictures, and the GPU, driver and versions go to ``--out``.
"""

import argparse
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

from backends.cuda import emulation

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"]
TRITON = "tests/backends/triton"
CUDA = "tests/backends/cuda"


class Step(NamedTuple):
    """A command that may take ``seconds``; ``dry`` is what takes its place without a GPU, None where there is nothing
    to run, and ``emulated`` whether that runs on the emulated kernels in CUDA C++; without the module ``needs`` it is
    left out."""

    name: str
    command: list[str]
    dry: list[str] | None
    seconds: float
    needs: str = "torch"
    emulated: bool = False


def steps(out: Path) -> list[Step]:
    """All of them, in order of their worth: what the minutes do not reach comes last."""
    info = [sys.executable, "-m", "densenet_fast", "info"]
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    results = [*PYTEST, f"{TRITON}/on_device.py"]
    kernels = [*PYTEST, "tests/backends/test_kernels.py", "-k"]
    ops = [*PYTEST, "tests/ops", "-k"]
    tuner = [sys.executable, "-m", "densenet_fast.backends.triton.tune"]
    few = "triton- and float32 and not 33 and not 16"
    few_ops = "opcheck_bn_relu_conv1x1 or ten_thousand and float32 and True"
    return [
        Step("the extension, built in place", build, None, 150, "setuptools"),
        Step("what runs where", info, info, 60),
        Step("results, reproducibility, graphs", results, results, 90, "pytest"),
        Step("every access of the kernels", [], [*PYTEST, f"{TRITON}/in_interpreter.py"], 240, "pytest"),
        Step("every kernel against float64", [*kernels, "triton-"], [*kernels, few], 90, "pytest"),
        *cuda_kernels(),
        *benchmarks(out),
        Step("the ops", [*ops, "not bad_input"], [*ops, few_ops], 120, "pytest"),
        Step("the table's rows, measured", tuner, [*tuner, "--dry-run"], 300),
        *cuda_sanitizers(),
    ]


def cuda_kernels() -> list[Step]:
    """The kernels in CUDA C++: their results, and the bandwidth that each reaches against a device copy."""
    own = [*PYTEST, f"{CUDA}/on_device.py"]
    all_backends = [*PYTEST, "tests/backends/test_kernels.py", "tests/backends/test_pool_kernels.py", "-k"]
    few = "cuda- and pool and float32 and not conv1x1 and not 33 and not 50"
    bandwidth = [sys.executable, "benchmarks/kernel_bandwidth.py"]
    return [
        Step("CUDA C++: results, reproducibility, graphs", own, own, 90, "pytest", emulated=True),
        Step(
            "CUDA C++: every kernel against float64", [*all_backends, "cuda-"], [*all_backends, few], 90, "pytest", True
        ),
        Step("CUDA C++: bandwidth, bfloat16", bandwidth, [*bandwidth, "--dry-run"], 60, emulated=True),
    ]


def cuda_sanitizers() -> list[Step]:
    """Small tests of the kernels in CUDA C++ under compute-sanitizer, where they take a hundred times as long."""
    tools = {
        "memcheck": ["--leak-check", "no"],
        "racecheck": ["--racecheck-report", "all"],
        "initcheck": [],
        "synccheck": [],
    }
    small = "bfloat16 and not runs and not many_rows and not 40 and not 288 and not 300"
    tests = [*PYTEST, f"{CUDA}/on_device.py", "-k", small]
    # Every tensor an allocation of its own, with bounds
    uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "1"]
    return [
        Step(
            f"CUDA C++: compute-sanitizer {tool}",
            [*uncached, "--tool", tool, *flags, *tests],
            [*tests, "--collect-only", "-q"] if tool == "memcheck" else None,
            300,
            "pytest",
            emulated=True,
        )
        for tool, flags in tools.items()
    ]


def benchmarks(out: Path) -> list[Step]:
    """The table of DenseNet-121 and -201, where the time goes, and who is compiled."""
    bench = [sys.executable, "-m", "densenet_fast", "bench", "--out", str(out)]
    dry = [
        "env",
        "-u",
        "TRITON_INTERPRET",
        *bench,
        "--device",
        "cpu",
        "--model",
        "densenet_bc10",
        "--batch",
        "2",
        "--dtype",
        "fp32",
        "--repeats",
        "1",
    ]
    alone = [*dry, "--against", "reference", "--memory", "none"]
    table = ["--dtype", "bf16", "--batch", "32,128,256", "--minutes", "1.3", "--memory", "faster"]
    table += ["--against", "torchvision,torchvision-me"]
    found = []
    for model in ("densenet121", "densenet201"):
        for mode in ("--train", "--infer"):
            what = f"{model}, {'training' if mode == '--train' else 'inference'}, bfloat16"
            found.append(Step(what, [*bench, "--model", model, mode, *table], [*alone, mode], 110))
        if model == "densenet121":
            one = ["--dtype", "bf16", "--batch", "128", "--repeats", "10"]
            found.append(Step("every kernel beside its floor", [*bench, *one, "--floor"], [*dry, "--floor"], 60))
            found.append(Step("where the time goes", [*bench, *one, "--profile"], [*dry, "--profile"], 40))
    rivals = ["--against", "reference,torchvision,timm,compile,ours-compile", "--memory", "none"]
    rivals += ["--compile-limit", "45", "--minutes", "0.8"]
    compiled = [*bench[:-1], str(out / "compiled"), "--dtype", "bf16", "--batch", "128", *rivals]
    return [*found, Step("densenet121, training, every rival", compiled, [*bench, "--help"], 150)]


def run(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> str:
    """Runs a command, its output on the screen and in ``log``; how it ended."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    timer.start()
    with open(log, "wb") as file:
        for chunk in iter(lambda: process.stdout.read1(1 << 16), b""):
            file.write(chunk)
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
    code = process.wait()
    timer.cancel()
    return "TIMED OUT" if late.is_set() else "passed" if code == 0 else "FAILED"


def conditions(device: str) -> str:
    """GPU, driver and versions, as the benchmarks write them."""
    sys.path.insert(0, str(ROOT))
    from densenet_fast.benchmarking.conditions import conditions, sentence

    return sentence(conditions(torch.device(device)))


def main() -> int:
    """Runs the steps and returns 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: interpreted and emulated")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder of the results (runs/gpu)")
    parser.add_argument("--minutes", type=float, help="for all steps together (9; dry: none)")
    parser.add_argument("--only", default="", metavar="WORD", help="the steps whose name has WORD")
    options = parser.parse_args()
    dry, out = options.dry_run, options.out.resolve()
    if not dry and not torch.cuda.is_available():
        print("no CUDA device; --dry-run walks the steps in Triton's interpreter", file=sys.stderr)
        return 1
    minutes = options.minutes or (9 if not dry else float("inf"))
    end = time.perf_counter() + 60 * minutes
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if dry:
        environment["TRITON_INTERPRET"] = "1"
    else:
        environment |= {"DENSENET_FAST_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    rows, passed = [], True
    for i, step in enumerate(steps(out)):
        command = step.dry if dry else step.command
        if not command or options.only not in step.name:
            continue
        print(f"\n== {step.name}: {' '.join(command)}", flush=True)
        start = time.perf_counter()
        limit = min(float("inf") if dry else step.seconds, end - start)
        emulate = dry and step.emulated
        if importlib.util.find_spec(step.needs) is None:
            state = f"LEFT OUT: {step.needs} is not installed"
        elif emulate and emulation.find_nvcc() is None:
            state = "LEFT OUT: nvcc was not found"
        elif limit <= 0:
            state = "LEFT OUT: the time is up"
        else:
            log = out / f"{i:02}_{re.sub('[^a-z0-9]+', '_', step.name.lower())}.log"
            own = emulation.environment(emulation.build()) if emulate else {}
            state = run(command, environment | own, log, min(limit, threading.TIMEOUT_MAX))
        passed = passed and (state == "passed" or dry and state.startswith("LEFT OUT"))
        rows.append(f"{step.name:44} {time.perf_counter() - start:7.1f} s  {state}")
    summary = "\n".join([conditions("cpu" if dry else "cuda"), "", *rows])
    (out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\n\nin {out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
