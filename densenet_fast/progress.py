"""A progress bar on stderr."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["progress"]

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None, delay: float = 0) -> Iterator[Item]:
    """Iterates over ``items``, with a progress bar labelled ``what`` that appears after ``delay`` seconds.

    There is no bar if tqdm is not installed, as in a bare checkout.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    return iter(tqdm(items, desc=what, total=total, leave=False, delay=delay))
