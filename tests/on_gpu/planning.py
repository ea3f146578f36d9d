"""Which bodies of ops ran by a plan, and why others did not."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

from densenet_fast.backends import plan
from densenet_fast.ops import planned
from on_gpu.checks import Record, Wrong
from on_gpu.settings import Settings

NAMED = 3
"""Reasons that a message names."""


class Bodies:
    """The bodies that ran, by the op's name, each with why it was walked, None where it was planned."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, str | None]] = []

    def record(self) -> Record:
        """How many were planned and, by reason and op, how many were not."""
        walked: dict[str, Counter[str]] = {}
        for name, reason in self.ran:
            if reason is not None:
                walked.setdefault(reason, Counter())[name.removeprefix("densenet_fast::")] += 1
        return {"planned": sum(reason is None for _, reason in self.ran), "walked": walked}

    def all_planned(self, settings: Settings) -> Record:
        """The record. Where bodies cannot be planned, as in a dry run, it is all there is to find out.

        Raises:
            Wrong: one that could be was not planned, or none ran.
        """
        found = self.record()
        if planned.DEVICE == settings.device and plan.unavailable() is None and (found["walked"] or not self.ran):
            reasons = "; ".join(f"{', '.join(ops)}: {why}" for why, ops in [*found["walked"].items()][:NAMED])
            raise Wrong(f"{found['planned']} of {len(self.ran)} bodies were planned; {reasons or 'no op ran'}", **found)
        return found


@contextmanager
def watched() -> Iterator[Bodies]:
    """Of the ``with`` block, in every thread."""
    bodies, run = Bodies(), planned.run

    def told(name: str, body: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        result = run(name, body, inputs)
        bodies.ran.append((name, planned.last()))
        return result

    with mock.patch.object(planned, "run", told):
        yield bodies


def without_plans() -> AbstractContextManager[Any]:
    """Every body is walked."""
    return mock.patch.object(planned, "DEVICE", "none")
