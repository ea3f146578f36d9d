"""The largest batch that fits a memory budget, for each competitor.

What a step needs grows by the same amount with each image. Two batches, each in a process of its own, give that slope;
the batch it predicts is then run, in a process of its own again, and corrected until the measured need is within the
budget and one image more would not be. Need is everything but the libraries: parameters, gradients, buffers, and the
measured peak above them (the resident set on a CPU, torch's allocations on a GPU).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from densenet_fast.benchmarking.memory import Job, Memory, measure

__all__ = ["Largest", "largest_batch"]

PROBES = (4, 8)
CORRECTIONS = 5


@dataclass(frozen=True)
class Largest:
    """The result: ``batch`` fits, with a measured need of ``bytes`` of which each image takes ``per_image``;
    ``failure`` says why there is none. A batch of 0 means that not even one image fits."""

    batch: int = 0
    bytes: float = 0.0
    per_image: float = 0.0
    failure: str = ""


def largest_batch(job: Job, budget: float, run: Callable[[Job], Memory] = measure) -> Largest:
    """For the competitor, network and mode of ``job``, whose own batch does not matter, within ``budget`` bytes."""
    needs: dict[int, float] = {}

    def need(batch: int) -> float:
        if batch not in needs:
            memory = run(replace(job, batch=batch))
            if memory.failure and not memory.failure.startswith("out of memory"):
                raise _Failed(memory.failure)
            needs[batch] = float("inf") if memory.failure else memory.model + memory.added
        return needs[batch]

    try:
        low, high = (need(batch) for batch in PROBES)
        if high == float("inf"):
            return Largest(failure=f"{PROBES[1]} images do not fit this machine")
        per_image = max(1.0, (high - low) / (PROBES[1] - PROBES[0]))
        batch, fits = max(0, int(PROBES[0] + (budget - low) / per_image)), 0
        for _ in range(CORRECTIONS):
            if batch == 0:
                break
            needed = need(batch)
            if needed <= budget:
                fits = max(fits, batch)
                more = int((budget - needed) / per_image)
            else:
                more = -max(1, int(min(needed - budget, budget) / per_image))
            if more == 0 or batch + more in needs:
                break
            batch = max(0, batch + more)
    except _Failed as failed:
        return Largest(failure=str(failed))
    return Largest(fits, needs.get(fits, 0.0), per_image)


class _Failed(RuntimeError):
    pass
