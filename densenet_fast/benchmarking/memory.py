"""Peak memory of a competitor's step, each in a process of its own.

``python -m densenet_fast.benchmarking.memory JSON`` is that process: it prints the result as JSON.
"""

import ctypes
import gc
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch
from torch import nn

from densenet_fast.benchmarking.competitors import Entry
from densenet_fast.benchmarking.progress import progress
from densenet_fast.benchmarking.steps import DTYPES, Run, step
from densenet_fast.memory import PeakMemory

__all__ = ["Job", "Memory", "measure", "measure_all"]

WARM_UP = (2, 64)
"""Batch and size of the step that comes before the baseline."""
OUT_OF_MEMORY = "out of memory"
KILLED = f"{OUT_OF_MEMORY} (killed)"
NO_MEMORY = "can't allocate memory"
"""What torch's allocator on CPUs says."""


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
        """By the system, as it does when its memory runs out, whoever took it."""
        return self.failure == KILLED


def measure(job: Job) -> Memory:
    """In a new process."""
    command = [sys.executable, "-m", "densenet_fast.benchmarking.memory", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == -9:  # SIGKILL
        return Memory(failure=KILLED)
    if done.returncode and NO_MEMORY in done.stderr:
        return Memory(failure=OUT_OF_MEMORY)
    if done.returncode:
        return Memory(failure=(done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1])
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def measure_all(jobs: list[Job], workers: int = 1) -> list[Memory]:
    """Each in a new process, ``workers`` at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return list(progress(pool.map(measure, jobs), "memory", len(jobs)))


def measure_here(job: Job) -> Memory:
    """In this process, which should have done nothing else."""
    torch.set_num_threads(job.threads)
    device = torch.device(job.device)
    model = job.entry.model(device, job.train)
    run: Run = torch.compile(model) if job.entry.compiled else model
    parameters = list(model.parameters())
    # What is compiled is compiled for one size: it warms up with the real one, so that the compiler is not measured.
    warm_up = (job.batch, job.size) if job.entry.compiled else (min(job.batch, WARM_UP[0]), min(job.size, WARM_UP[1]))
    step(run, job.entry.images(*warm_up, device), DTYPES[job.dtype], job.train, parameters)
    images = job.entry.images(job.batch, job.size, device)
    release_free_memory(device)
    memory = PeakMemory(device)
    step(run, images, DTYPES[job.dtype], job.train, parameters)
    use = memory.read()
    return Memory(use.added, use.reserved, held_by(model, job.train))


def held_by(model: nn.Module, train: bool) -> int:
    """Bytes of the parameters, their gradients if ``train``, and the buffers."""
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    return (1 + train) * parameters + sum(b.numel() * b.element_size() for b in model.buffers())


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
