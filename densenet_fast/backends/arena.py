"""Where temporary tensors stand in one allocation, by the time in which each is needed."""

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 256


class Lifetime(NamedTuple):
    """``size`` bytes that are needed by the launches ``first`` to ``end - 1``."""

    size: int
    first: int
    end: int

    def overlaps(self, other: "Lifetime") -> bool:
        return self.first < other.end and other.first < self.end


def layout(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Returns an aligned offset for each tensor, and the size of the whole allocation.

    Tensors that are needed at the same time do not overlap in memory. The largest are placed first, each in the first
    gap that it fits into.
    """
    offsets, end = [0] * len(lifetimes), 0
    placed: list[int] = []
    for i in sorted(range(len(lifetimes)), key=lambda i: -lifetimes[i].size):
        size = aligned(lifetimes[i].size)
        beside = (j for j in placed if lifetimes[j].overlaps(lifetimes[i]))
        for start, stop in sorted((offsets[j], offsets[j] + aligned(lifetimes[j].size)) for j in beside):
            if offsets[i] + size <= start:
                break
            offsets[i] = max(offsets[i], stop)
        placed.append(i)
        end = max(end, offsets[i] + size)
    return offsets, end


def aligned(size: int) -> int:
    """``size`` rounded up to a multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT
