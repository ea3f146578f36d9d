"""``make gpu``: everything there is to learn on a GPU, step by step, in one folder, and one table at the end.

python3 tests/gpu.py             builds in place, tests, then measures: at most 9 minutes
python3 tests/gpu.py --dry-run   the same steps without a GPU: tests in Triton's interpreter and with the kernels
                                 in CUDA C++ emulated, benchmarks on the CPU

Needs this checkout, python3 with torch, and for the tests pytest, which pytest-xdist speeds up: most of their time is
Triton's compiler's. What is not there is named and left out. To ``--out`` go ``log.txt``, what the steps print,
``summary.txt``, how each ended, and the tables, CSV files and pictures, each as soon as it is there.
"""

import argparse
import contextlib
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
WORKERS = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
TRITON = "tests/backends/triton"
CUDA = "tests/backends/cuda"


class Step(NamedTuple):
    """A command that may take ``seconds``; ``dry`` is what takes its place without a GPU, None where there is nothing
    to run, and ``emulated`` whether that runs on the emulated kernels in CUDA C++; without the module ``needs`` or, on
    a GPU, the ``program`` it is left out."""

    name: str
    command: list[str]
    dry: list[str] | None
    seconds: float
    needs: str = "torch"
    emulated: bool = False
    program: str = sys.executable


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
    measured, more = benchmarks(out)
    return [
        Step("the extension, built in place", build, None, 150, "setuptools"),
        Step("what runs where", info, info, 60),
        Step("results, reproducibility, graphs", [*results, *WORKERS], results, 120, "pytest"),
        Step("every access of the kernels", [], [*PYTEST, f"{TRITON}/in_interpreter.py"], 240, "pytest"),
        *cuda_kernels(),
        *measured,
        Step("every kernel against float64", [*kernels, "triton-", *WORKERS], [*kernels, few], 120, "pytest"),
        *more,
        Step("the ops", [*ops, "not bad_input", *WORKERS], [*ops, few_ops], 120, "pytest"),
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
        Step("CUDA C++: results, reproducibility, graphs", [*own, *WORKERS], own, 90, "pytest", True),
        Step(
            "CUDA C++: every kernel against float64",
            [*all_backends, "cuda- and not conv", *WORKERS],
            [*all_backends, few],
            90,
            "pytest",
            True,
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
            True,
            "compute-sanitizer",
        )
        for tool, flags in tools.items()
    ]


def benchmarks(out: Path) -> tuple[list[Step], list[Step]]:
    """The tables of DenseNet-121's training, compiled rivals among them, and where its time goes; then those of its
    inference and of DenseNet-201."""
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
    table = ["--dtype", "bf16", "--batch", "32,256", "--minutes", "1.3", "--memory", "faster"]
    table += ["--against", "torchvision,torchvision-me"]

    def compared(model: str, mode: str) -> Step:
        what = f"{model}, {'training' if mode == '--train' else 'inference'}, bfloat16"
        return Step(what, [*bench, "--model", model, mode, *table], [*alone, mode], 180)

    one = ["--dtype", "bf16", "--batch", "128", "--repeats", "10"]
    rivals = ["--against", "reference,torchvision,timm,compile,ours-compile", "--layout", "channels_last"]
    rivals += ["--dtype", "bf16", "--batch", "128", "--memory", "none", "--compile-limit", "90", "--minutes", "0.8"]
    compiled = [*bench[:-1], str(out / "compiled"), *rivals]
    return [
        compared("densenet121", "--train"),
        Step("every kernel beside its floor", [*bench, *one, "--floor"], [*dry, "--floor"], 60),
        Step("densenet121, training, every rival", compiled, [*alone, "--layout", "channels_last"], 240),
        Step("where the time goes", [*bench, *one, "--profile"], [*dry, "--profile"], 60),
    ], [
        compared("densenet121", "--infer"),
        compared("densenet201", "--train"),
        compared("densenet201", "--infer"),
    ]


def run(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> str:
    """Runs a command, its output on the screen and added to ``log``; how it ended.

    At its time, and when it has ended, its whole process group is killed. A process that left the group and still holds
    the pipe is not waited for.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )

    def copy() -> None:
        with open(log, "ab") as file:
            for chunk in iter(lambda: process.stdout.read1(1 << 16), b""):
                file.write(chunk)
                file.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.flush()

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    late = False
    try:
        process.wait(seconds if seconds < float("inf") else None)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    reader.join(5)
    return "TIMED OUT" if late else "passed" if code == 0 else "FAILED"


def conditions(device: str) -> str:
    """GPU, driver and versions, as the benchmarks write them."""
    sys.path.insert(0, str(ROOT))
    from densenet_fast.benchmarking.conditions import conditions, sentence

    return sentence(conditions(torch.device(device)))


def main() -> int:
    """Runs the steps and returns 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: interpreted and emulated")
    parser.add_argument("--out", type=Path, help="folder of the results (runs/gpu; dry: runs/gpu_dry)")
    parser.add_argument("--minutes", type=float, help="for all steps together (9; dry: none)")
    parser.add_argument("--only", default="", metavar="PATTERN", help="the steps whose name matches")
    options = parser.parse_args()
    dry = options.dry_run
    out = (options.out or ROOT / ("runs/gpu_dry" if dry else "runs/gpu")).resolve()
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
    out.mkdir(parents=True, exist_ok=True)
    log, summary = out / "log.txt", out / "summary.txt"
    log.write_text("")
    rows, passed = [], True
    for step in steps(out):
        command = step.dry if dry else step.command
        if not command or not re.search(options.only, step.name):
            continue
        title = f"\n== {step.name}: {' '.join(command)}\n"
        print(title, end="", flush=True)
        with open(log, "a") as file:
            file.write(title)
        start = time.perf_counter()
        limit = min(float("inf") if dry else step.seconds, end - start)
        emulate = dry and step.emulated
        if importlib.util.find_spec(step.needs) is None:
            state = f"LEFT OUT: {step.needs} is not installed"
        elif not dry and shutil.which(step.program) is None:
            state = f"LEFT OUT: {step.program} was not found"
        elif emulate and emulation.find_nvcc() is None:
            state = "LEFT OUT: nvcc was not found"
        elif limit <= 0:
            state = "LEFT OUT: the time is up"
        else:
            own = emulation.environment(emulation.build()) if emulate else {}
            state = run(command, environment | own, log, limit)
        passed = passed and (state == "passed" or dry and state.startswith("LEFT OUT"))
        rows.append(f"{step.name:44} {time.perf_counter() - start:7.1f} s  {state}")
        summary.write_text("\n".join(rows) + "\n")
    summary.write_text("\n".join([conditions("cpu" if dry else "cuda"), "", *rows]) + "\n")
    print(f"\n{summary.read_text()}\nin {out}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
