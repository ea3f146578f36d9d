"""The commands of ``python3 tests/gpu.py``, in order of their worth: what the minutes do not reach comes last."""

import csv
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from backends.cuda import emulation

PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs"]
WORKERS = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
COLLECT = ["--collect-only", "-q"]
TRITON = "tests/backends/triton"
CUDA = "tests/backends/cuda"
CUDA_TESTS = [f"{CUDA}/{name}on_device.py" for name in ("", "vectors_", "running_", "conv3x3_")]
WHOLE = "tests/integration"
KERNELS = ["tests/backends/test_kernels.py", "tests/backends/test_pool_kernels.py"]
BENCH = [sys.executable, "-m", "densenet_fast", "bench"]
TINY = ["--device", "cpu", "--model", "densenet_bc10", "--batch", "2", "--dtype", "fp32", "--repeats", "1"]
WORST = 3
"""Kernels that are tuned."""
PRODUCTS = {"bn_relu_conv3x3_backward": ("bn_relu_conv3x3_grad_input", "bn_relu_conv3x3_grad_weight")}
"""The kernels of a function with several."""
USUAL = ("bn_relu_conv1x1_backward", "bn_relu_conv3x3_grad_input", "bn_relu_conv3x3_grad_weight")
"""Those that are tuned where no floor was measured."""

Command = list[str]


class Step(NamedTuple):
    """A command that may take ``seconds``; ``dry`` is what takes its place without a GPU.

    Attributes:
        needs: the module without which it is left out.
        program: the program without which it is left out on a GPU.
        environment: of the dry command.
        made: the command from the folder of the results, where it depends on them, in place of ``command``.
    """

    name: str
    command: Command
    dry: Command
    seconds: float
    needs: str = "torch"
    program: str = sys.executable
    environment: dict[str, str] = {}
    made: Callable[[Path], Command] | None = None


def steps(work: Path) -> list[Step]:
    """All of them; tables go to ``work``."""
    interpreted = {"TRITON_INTERPRET": "1"}
    build = [sys.executable, "-m", "on_gpu.build"]
    info = [sys.executable, "-m", "densenet_fast", "info"]
    bandwidth = [sys.executable, "benchmarks/kernel_bandwidth.py"]
    graph = [sys.executable, "benchmarks/cuda_graph.py"]
    tuner = [
        sys.executable,
        "-m",
        "densenet_fast.backends.triton.tune",
        "--narrow",
        "--csv",
        str(work / "tuning/tuning.csv"),
    ]
    large = ["--batch", "128", "--minutes", "0.5"]
    return [
        Step("build", [*build, "gpu"], [*build, "dry"], 120),
        Step("what runs where", info, info, 30),
        tests("Triton on the device", [f"{TRITON}/on_device.py"], 90, interpreted),
        tests("CUDA C++ on the device", [*CUDA_TESTS], 75, emulated()),
        bench(work, "training", ["--train", "--batch", "32,128,256", "--memory", "faster", "--minutes", "1.6"], 120),
        bench(work, "inference", ["--infer", "--batch", "32,128,256", "--memory", "faster", "--minutes", "0.8"], 80),
        bench(work, "floor", ["--floor", "--batch", "128", "--repeats", "10"], 60),
        bench(work, "profile", ["--profile", "--batch", "128"], 60),
        tests("every kernel against float64", [*KERNELS, "-k", "triton- or cuda- and not conv"], 120, interpreted),
        tests("ops, CUDA graphs", ["tests/ops", f"{WHOLE}/test_cuda_graphs.py", "-k", "not bad_input"], 150),
        Step("CUDA graph", graph, [*graph, "--dry-run"], 60),
        Step("bandwidth of CUDA C++", bandwidth, [*bandwidth, "--dry-run"], 60, environment=emulated()),
        Step(
            "tuning",
            [],
            [*tuner, *of(USUAL), "--dry-run"],
            100,
            made=lambda work: [*tuner, *of(worst(work))],
        ),
        *sanitizers(),
        bench(work, "densenet201", ["--model", "densenet201", *large], 60, "torchvision-me"),
        bench(work, "compiled", [*large, "--compile-limit", "240"], 300, "compile"),
    ]


def tests(name: str, arguments: Command, seconds: float, environment: dict[str, str] | None = None) -> Step:
    """Tests in parallel; without a GPU they are collected, not run."""
    command = [*PYTEST, *arguments]
    dry = [*command, *COLLECT]
    return Step(f"tests: {name}", [*command, *WORKERS], dry, seconds, "pytest", environment=environment or {})


def bench(work: Path, name: str, flags: Command, seconds: float, *rivals: str) -> Step:
    """A benchmark in channels_last and bfloat16, whose tables go to a folder of its name."""
    to = ["--out", str(work / name)]
    alone = name in ("floor", "profile")
    compared = [] if alone else ["--layout", "channels_last", "--against"]
    whom, whom_dry = ([], []) if alone else ([",".join(["torchvision", *rivals])], ["reference"])
    memory = [] if alone or "--memory" in flags else ["--memory", "none"]
    mode = [flag for flag in flags if flag in ("--floor", "--profile", "--train", "--infer")]
    quick = [] if alone else ["--memory", "none"]
    command = [*BENCH, *to, "--dtype", "bf16", *flags, *memory, *compared, *whom]
    return Step(name, command, [*BENCH, *to, *TINY, *mode, *quick, *compared, *whom_dry], seconds)


def sanitizers() -> list[Step]:
    """Small tests of the kernels in CUDA C++ under compute-sanitizer, where they take a hundred times as long."""
    tools = {"memcheck": ["--leak-check", "no"], "racecheck": ["--racecheck-report", "all"]}
    small = "bfloat16 and not runs and not many_rows and not 40 and not 288 and not 300"
    own = [*PYTEST, *CUDA_TESTS, "-k", small]
    # Every tensor an allocation of its own, with bounds
    uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "1"]
    found = []
    for tool, flags in tools.items():
        name, command = f"compute-sanitizer {tool}", [*uncached, "--tool", tool, *flags, *own]
        dry = [*own, *COLLECT] if not found else [sys.executable, "--version"]
        found.append(Step(name, command, dry, 60, "pytest", "compute-sanitizer", emulated()))
    return found


def emulated() -> dict[str, str]:
    return emulation.environment(emulation.library())


def of(kernels: Iterable[str]) -> Command:
    """The tuner's flags for them."""
    return [flag for kernel in kernels for flag in ("--kernel", kernel)]


def worst(work: Path) -> Sequence[str]:
    """The kernels furthest above their floor."""
    rows = [row for path in (work / "floor").rglob("*.csv") for row in csv.DictReader(path.open())]
    found = []
    for row in sorted(rows, key=lambda row: -float(row["gap_s"])):
        found += [k for k in PRODUCTS.get(row["kernel"], (row["kernel"],)) if k.startswith("bn_relu_") and "conv" in k]
    return found[:WORST] or USUAL
