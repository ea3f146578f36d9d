"""One epoch of training, and the test."""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from densenet_fast.training.distributed import Processes

__all__ = ["Execution", "Score", "Timing", "evaluate", "learning_rate", "train_epoch"]

AMP_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Score(NamedTuple):
    """Means over the images of an epoch."""

    loss: float
    accuracy: float


class Timing(NamedTuple):
    """The median of the steps (forward, backward and update) and the throughput including the data."""

    seconds_per_step: float
    images_per_second: float


@dataclass(frozen=True)
class Execution:
    """Where and how a model computes."""

    device: torch.device
    processes: Processes
    amp: str = "off"
    channels_last: bool = False

    def autocast(self) -> AbstractContextManager[None]:
        """The mixed precision of the forward pass."""
        return torch.autocast(self.device.type, AMP_TYPES.get(self.amp), enabled=self.amp != "off")

    def batches(self, loader: DataLoader, label: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The loader's batches on the device, with a progress bar on the main process."""
        from tqdm import tqdm

        layout = torch.channels_last if self.channels_last else torch.preserve_format
        terminal = sys.stderr.isatty()
        bar = tqdm(
            loader,
            desc=label,
            unit="step",
            leave=False,
            disable=not self.processes.is_main,
            mininterval=0.1 if terminal else 30,
            delay=0 if terminal else 30,
        )
        for images, labels in bar:
            images = images.to(self.device, non_blocking=True, memory_format=layout)
            yield images, labels.to(self.device, non_blocking=True)


def learning_rate(initial: float, milestones: tuple[float, ...], epoch: int, epochs: int) -> float:
    """The paper's schedule: divided by 10 at each of these fractions of the epochs; ``epoch`` counts from 0."""
    return initial / 10 ** sum(epoch >= fraction * epochs - 1e-6 for fraction in milestones)


def train_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    execution: Execution,
    label: str,
) -> tuple[Score, Timing]:
    """Trains on every batch once. The score is that of the model as it was before each step."""
    model.train()
    totals = torch.zeros(3, dtype=torch.float64, device=execution.device)
    clock = StepClock(execution.device)
    start = time.perf_counter()
    for images, labels in execution.batches(loader, label):
        with clock:
            with execution.autocast():
                logits = model(images)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        _count(totals, logits.detach(), labels, loss.detach() * len(labels))
    score, images_seen = _score(totals, execution.processes)
    return score, Timing(clock.median(), images_seen / (time.perf_counter() - start))


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, execution: Execution, label: str) -> Score:
    """The model's score on every image of all processes' loaders, each counted once."""
    model.eval()
    execution.processes.copy_buffers(model)
    totals = torch.zeros(3, dtype=torch.float64, device=execution.device)
    for images, labels in execution.batches(loader, label):
        with execution.autocast():
            logits = model(images)
        _count(totals, logits, labels, F.cross_entropy(logits.float(), labels, reduction="sum"))
    return _score(totals, execution.processes)[0]


def _count(totals: Tensor, logits: Tensor, labels: Tensor, loss_sum: Tensor) -> None:
    totals[0] += loss_sum
    totals[1] += (logits.argmax(1) == labels).sum()
    totals[2] += len(labels)


def _score(totals: Tensor, processes: Processes) -> tuple[Score, float]:
    loss, correct, images = processes.sum(totals).tolist()
    return Score(loss / images, correct / images), images


class StepClock:
    """Times steps without waiting for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.steps: list[tuple[float, float]] | list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self.begin = self._now()

    def __exit__(self, *_: object) -> None:
        self.steps.append((self.begin, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def median(self) -> float:
        """Seconds of the median step."""
        if self.cuda:
            torch.cuda.synchronize()
            return statistics.median(begin.elapsed_time(end) for begin, end in self.steps) / 1000
        return statistics.median(end - begin for begin, end in self.steps)
