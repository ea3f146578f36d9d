"""Times of steps, interleaved: every competitor has its turn in every round, so a drift of the machine hits all."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from statistics import median

import torch
from torch import Tensor, nn

from densenet_fast.benchmarking.competitors import Entry, compiled
from densenet_fast.benchmarking.steps import Disagreement, Run, compiled_agrees, enqueue
from densenet_fast.progress import progress

__all__ = ["Timing", "measure_times"]

LEAST_REPEATS = 2
PAUSE = 0.05
"""Seconds."""
WARM_UPS = {"cpu": 1, "cuda": 3}
"""Steps before the first that counts, by the type of device. The last of them tells how long one takes."""


@dataclass
class Timing:
    """Seconds of each step of an entry on ``batch`` images, and on a GPU the seconds until it was enqueued. ``failure``
    says why there are none."""

    entry: Entry
    batch: int
    seconds: list[float] = field(default_factory=list)
    failure: str = ""
    enqueued: list[float] = field(default_factory=list)

    @property
    def enqueue_seconds(self) -> float | None:
        """The median."""
        return median(self.enqueued) if self.enqueued else None

    def quantile(self, q: float) -> float:
        """Linear between the two nearest."""
        ordered = sorted(self.seconds)
        place = q * (len(ordered) - 1)
        low = int(place)
        return ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


class _Contestant:
    """A competitor with its model and its images."""

    def __init__(self, timing: Timing, size: int, dtype: torch.dtype, train: bool, device: torch.device) -> None:
        self.timing, self.dtype, self.train, self.device = timing, dtype, train, device
        self.model: nn.Module = timing.entry.model(device, train)
        self.parameters = list(self.model.parameters())
        self.images: Tensor = timing.entry.images(timing.batch, size, device)
        self.run: Run = self.model
        if timing.entry.compiled:
            self.run = compiled(self.model)
            compiled_agrees(timing.entry, self.model, self.run, self.images, dtype, train)
        self.estimate = [self.turn()[1] for _ in range(WARM_UPS[device.type])][-1]

    def turn(self) -> tuple[float, float]:
        """Seconds of one step, until it is enqueued and until it is done."""
        self.wait()
        start = time.perf_counter()
        enqueue(self.run, self.images, self.dtype, self.train, self.parameters)
        enqueued = time.perf_counter() - start
        self.wait()
        seconds = time.perf_counter() - start
        for parameter in self.parameters:
            parameter.grad = None  # the others need the room
        return enqueued, seconds

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def take_turn(self) -> None:
        """Takes a step that counts.

        In inference on a CPU a pause and a step that does not count come first: the threads of the competitor before
        still look for work for a while.
        """
        if self.device.type == "cpu" and not self.train:
            time.sleep(PAUSE)
            self.turn()
        enqueued, seconds = self.turn()
        self.timing.seconds.append(seconds)
        if self.device.type == "cuda":
            self.timing.enqueued.append(enqueued)


def measure_times(
    turns: Sequence[tuple[Entry, int]],
    size: int,
    dtype: torch.dtype,
    train: bool,
    device: torch.device,
    repeats: int,
    until: float = inf,
) -> list[Timing]:
    """Times ``repeats`` steps of each (entry, batch) after warming up.

    ``until`` is a time of ``time.perf_counter``. A contestant that would need more than its share of what is left until
    then gets fewer steps, though never fewer than two.

    Raises:
        Disagreement: what ``torch.compile`` made computes something else.
    """
    timings = [Timing(entry, batch) for entry, batch in turns]
    contestants = []
    for timing in progress(timings, "warming up"):
        with _failures_noted(timing):
            contestants.append(_Contestant(timing, size, dtype, train, device))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    share = max(0.0, until - time.perf_counter()) / max(1, len(contestants))
    for i in progress(range(repeats), "rounds"):
        for contestant in contestants:
            due = max(LEAST_REPEATS, int(min(repeats, share / contestant.estimate)))
            if i < due and not contestant.timing.failure:
                with _failures_noted(contestant.timing):
                    contestant.take_turn()
    return timings


@contextmanager
def _failures_noted(timing: Timing) -> Iterator[None]:
    """Memory that runs out, or a compiler that fails, ends one competitor's part, not the measurement."""
    try:
        yield
    except Disagreement:
        raise
    except (torch.OutOfMemoryError, MemoryError):
        timing.failure = "out of memory"
    except RuntimeError as error:
        if not timing.entry.compiled:
            raise
        timing.failure = f"cannot be compiled: {error}".splitlines()[0]
