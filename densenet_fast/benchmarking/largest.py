"""The largest batch that fits a memory budget, for each competitor.

Every batch that is tried runs in a process of its own. The search keeps the largest batch that was measured to fit, and
the smallest above it that was measured not to fit. It tries the batch that a line through the measured needs predicts.
Where the line misses too often, it halves the interval. It ends when the two batches are neighbours, or when one image
more would not fit by what each image was measured to add.

A batch needs everything but the libraries: parameters, gradients, buffers, and the measured peak above them. On a CPU
that is the resident set, on a GPU it is torch's allocations.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf, isfinite

from densenet_fast.benchmarking.memory import Job, Memory, measure

__all__ = ["Largest", "largest_batch"]

FIRST = 4
"""The first batch tried."""
SHARE = 0.85
"""The share of the first batch's need above the model's that grows with the batch. The second batch replaces the
guess."""
GROWTH = 4
"""The next batch is at most so many times the largest that is known to fit: a line through noise may be flat."""
PREDICTIONS = 5
"""Batches that the line chooses before the interval is halved."""


@dataclass(frozen=True)
class Largest:
    """The result, in bytes.

    Attributes:
        batch: the largest that fits; 0 where one image was measured not to fit.
        bytes: the measured need of ``batch``.
        bytes_of_next: the need of one image more, measured or by ``per_image``; infinite where it did not run.
        per_image: what each image adds, between the smallest and the largest batch measured.
        failure: why there is no result, or empty.
    """

    batch: int = 0
    bytes: float = 0.0
    bytes_of_next: float = inf
    per_image: float = 0.0
    failure: str = ""


def largest_batch(job: Job, budget: float, run: Callable[[Job], Memory] = measure) -> Largest:
    """The largest batch within ``budget`` bytes, of the competitor, network and mode of ``job``. The job's own batch
    does not matter."""
    needs: dict[int, float] = {}
    batch, model = FIRST, 0.0
    while True:
        memory = run(replace(job, batch=batch))
        if memory.killed:  # perhaps for another process's sake
            memory = run(replace(job, batch=batch))
        if memory.failure and not memory.out_of_memory:
            return Largest(failure=memory.failure)
        needs[batch] = inf if memory.failure else memory.model + memory.added
        model = memory.model or model
        fits = max((b for b, need in needs.items() if need <= budget), default=0)
        exceeds = min((b for b in needs if b > fits), default=inf)
        per_image = slope(needs)
        after = needs.get(fits + 1) or needs.get(fits, inf) + per_image
        if exceeds == fits + 1 or (per_image and fits and after > budget):
            return Largest(fits, needs.get(fits, 0.0), after, per_image)
        batch = next_batch(needs, model, budget, fits, exceeds)


def next_batch(needs: dict[int, float], model: float, budget: float, fits: int, exceeds: float) -> int:
    """The batch to try next: more than ``fits``, less than ``exceeds``.

    ``needs`` is the measured need by batch, of a model of ``model`` bytes.
    """
    known = sorted(batch for batch, need in needs.items() if isfinite(need))
    if fits and exceeds in known:
        per_image = (needs[int(exceeds)] - needs[fits]) / (exceeds - fits)
    elif len(known) == 1:
        per_image = SHARE * (needs[known[0]] - model) / known[0]
    else:
        per_image = slope(needs)
    if per_image > 0 and len(needs) <= PREDICTIONS:
        nearest = min(known, key=lambda batch: abs(needs[batch] - budget))
        predicted = nearest + int((budget - needs[nearest]) // per_image)
        return int(max(fits + 1, min(predicted, exceeds - 1, GROWTH * max(fits, 1))))
    return (fits + int(exceeds)) // 2 if isfinite(exceeds) else 2 * fits


def slope(needs: dict[int, float]) -> float:
    """Bytes that an image adds, between the smallest and the largest batch measured; 0 where these do not tell."""
    known = sorted(batch for batch, need in needs.items() if isfinite(need))
    if len(known) < 2:
        return 0.0
    return max(0.0, (needs[known[-1]] - needs[known[0]]) / (known[-1] - known[0]))
