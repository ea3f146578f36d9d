"""Peak memory of a competitor's step, each in a process of its own.

``python -m densenet_fast.benchmarking.memory JSON`` is that process: it prints the result as JSON.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

import torch
from torch import nn

from densenet_fast.benchmarking.competitors import Entry, compiled
from densenet_fast.benchmarking.steps import DTYPES, Run, step
from densenet_fast.memory import PeakMemory
from densenet_fast.progress import progress

__all__ = ["Job", "Memory", "compile_ahead", "free_memory", "measure", "measure_all"]

WARM_UP = (2, 64)
"""Batch and size of the step that comes before the baseline."""
OUT_OF_MEMORY = "out of memory"
KILLED = f"{OUT_OF_MEMORY} (killed)"
NO_MEMORY = "can't allocate memory"
"""What torch's allocator on CPUs says where it gets none."""
SIGKILL = 9
GRACE = 30
"""Seconds."""


@dataclass(frozen=True)
class Job:
    """What the process is to measure."""

    competitor: str
    layout: str
    network: str
    batch: int
    size: int
    dtype: str
    train: bool
    device: str
    threads: int

    @classmethod
    def of(cls, entry: Entry, batch: int, size: int, options: argparse.Namespace, train: bool = True) -> "Job":
        """A step of ``entry`` on ``batch`` images of ``size``. The command's ``options`` say the dtype, the device and
        the number of threads."""
        place = options.dtype, train, str(options.device), options.threads
        return cls(entry.competitor, entry.layout, entry.network, batch, size, *place)

    @property
    def entry(self) -> Entry:
        return Entry(self.competitor, self.layout, self.network)


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        added: the peak of a step above the baseline, taken after the model was built and had run a small step.
        reserved: the same of what torch's allocator holds of a GPU's memory.
        model: the parameters, their gradients and the buffers, which the baseline holds.
        failure: why there are no numbers, or empty.
    """

    added: int = 0
    reserved: int = 0
    model: int = 0
    failure: str = ""

    @property
    def out_of_memory(self) -> bool:
        return self.failure.startswith(OUT_OF_MEMORY)

    @property
    def killed(self) -> bool:
        """Whether the system ended the process, as it does when its memory runs out, whoever took it."""
        return self.failure == KILLED


def measure(job: Job, limit: float | None = None) -> Memory:
    """Measures in a new process, which may take ``limit`` seconds."""
    command = [sys.executable, "-m", "densenet_fast.benchmarking.memory", json.dumps(asdict(job))]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        stdout, stderr = process.communicate(timeout=limit)
    except BaseException as error:
        getattr(os, "killpg", os.kill)(process.pid, SIGKILL)  # with the compilers that it may have started
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return Memory(failure=f"not done within {limit:.0f} s")
        raise
    if process.returncode == -SIGKILL:
        return Memory(failure=KILLED)
    if process.returncode and NO_MEMORY in stderr:
        return Memory(failure=OUT_OF_MEMORY)
    if process.returncode:
        return Memory(failure=(stderr.strip() or f"exit code {process.returncode}").splitlines()[-1])
    return Memory(**json.loads(stdout.splitlines()[-1]))


def measure_all(jobs: Sequence[Job], workers: int = 1, until: float = inf) -> list[Memory | None]:
    """Measures each job in a new process, ``workers`` at a time.

    ``until`` is a time of ``time.perf_counter``. A job whose turn comes later gives None. No job outlasts it by more
    than ``GRACE``.
    """

    def in_time(job: Job) -> Memory | None:
        left = until - time.perf_counter()
        return None if left <= 0 else measure(job, None if until == inf else left + GRACE)

    with ThreadPoolExecutor(workers) as pool:
        return list(progress(pool.map(in_time, jobs), "memory", len(jobs)))


def compile_ahead(jobs: Sequence[Job], limit: float) -> dict[Job, str]:
    """Has ``torch.compile`` fill its cache on disk, from which every later process takes its kernels.

    Each job runs in a new process, which may take ``limit`` seconds. Returns those that failed, and why.
    """
    failures = {}
    for job in progress(jobs, f"torch.compile, at most {limit:.0f} s each"):
        failure = measure(job, limit).failure
        if failure:
            failures[job] = failure
    return failures


def measure_here(job: Job) -> Memory:
    """Measures in this process, which should have done nothing else."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    model = job.entry.model(device, job.train)
    run: Run = compiled(model) if job.entry.compiled else model
    parameters = list(model.parameters())
    # What is compiled is compiled for one size: it warms up with the real one, so that the compiler is not measured.
    warm_up = (job.batch, job.size) if job.entry.compiled else (min(job.batch, WARM_UP[0]), min(job.size, WARM_UP[1]))
    images = job.entry.images(job.batch, job.size, device)
    if job.entry.by_engine:  # what an engine takes in its first step it keeps
        with torch.autocast(device.type, DTYPES[job.dtype], enabled=job.dtype != "fp32"):
            model.prepare(images)
    else:
        step(run, job.entry.images(*warm_up, device), DTYPES[job.dtype], job.train, parameters)
    release_free_memory(device)
    memory = PeakMemory(device)
    step(run, images, DTYPES[job.dtype], job.train, parameters)
    use = memory.read()
    return Memory(use.added, use.reserved, held_by(model, job.train))


def held_by(model: nn.Module, train: bool) -> int:
    """Bytes of the parameters, their gradients if ``train``, and the buffers."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return (1 + train) * parameters + sum(b.numel() * b.element_size() for b in model.buffers())


def free_memory(device: torch.device) -> float:
    """The memory that a process may use, in bytes: all of a GPU's, or what the system says is available.

    Raises:
        RuntimeError: the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much memory is free: give a limit")


def release_free_memory(device: torch.device) -> None:
    """Returns to the system what the process has freed but its allocators still hold."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # the C library's own; not every one has it
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    try:
        print(json.dumps(asdict(measure_here(Job(**json.loads(sys.argv[1]))))))
    except (torch.OutOfMemoryError, MemoryError):
        print(json.dumps(asdict(Memory(failure=OUT_OF_MEMORY))))
