"""The inputs of an op, split into its tensors and everything else.

What the op does depends on everything else, and on the shapes, strides, dtypes and devices of the tensors.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter}
TENSORS = {*PLAIN, type(None)}
Made = TypeVar("Made")


class Constants(tuple[Any, ...]):
    """A tuple of hundreds of values, whose hash is computed once."""

    @functools.cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash


class Fixed(list[Any]):
    """A list among an op's inputs that nobody changes. What a call finds out about it is kept with it."""

    @functools.cached_property
    def holds_others(self) -> bool:
        """What :func:`holds_others` returns for this list."""
        return holds_others([*self])

    @functools.cached_property
    def split(self) -> tuple[Sequence[Tensor], Constants]:
        """What :func:`split_tensors` returns for this list."""
        tensors, constants = _split(self)
        return tensors, Constants(constants)

    @functools.cached_property
    def _made(self) -> dict[Hashable, Any]:
        return {}

    def made(self, kind: Hashable, make: Callable[[], Made]) -> Made:
        """The result of ``make`` on this list, for one ``kind`` of call. The results of sixteen kinds are kept."""
        if kind not in self._made:
            if len(self._made) >= 16:
                self._made.clear()
            self._made[kind] = make()
        return self._made[kind]

    def saved(self) -> Sequence[Tensor]:
        """Its tensors, to be kept for a backward pass."""
        return self.split[0]

    def restored(self, tensors: Sequence[Tensor]) -> list[Any]:
        """This list with ``tensors`` in the places of those that were :meth:`saved`. They may be others by now."""
        if all(map(operator.is_, self.saved(), tensors)):
            return self
        left = iter(tensors)
        return [next(left) if isinstance(value, Tensor) else value for value in self]


LISTS = (list, tuple, Fixed)
KNOWN = {*TENSORS, bool, int, float, str, *LISTS}


def holds_others(values: Sequence[Any]) -> bool:
    """Whether a subclass of Tensor is among ``values``, or in a list among them."""
    kinds = {*map(type, values)}
    if not kinds <= KNOWN and any(issubclass(kind, Tensor) for kind in kinds - KNOWN):
        return True
    return not kinds.isdisjoint(LISTS) and any(
        [v.holds_others if type(v) is Fixed else holds_others(v) for v in values if type(v) in LISTS]
    )


def split_tensors(inputs: Sequence[Any]) -> tuple[list[Tensor], tuple[Any, ...]]:
    """Returns the tensors among ``inputs``, in order, and all else as a tuple that can be hashed, where 1, 1.0 and True
    differ. An op has hundreds of inputs."""
    tensors: list[Tensor] = []
    constants: list[Any] = []
    for value in inputs:
        kind = type(value)
        if kind in PLAIN:
            tensors.append(value)
            constants.append(Ellipsis)
        elif kind in LISTS:
            inner, others = value.split if kind is Fixed else _split(value)
            tensors += inner
            constants.append(others)
        else:
            constants.append((kind, value))
    return tensors, tuple(constants)


def _split(values: Sequence[Any]) -> tuple[Sequence[Tensor], tuple[Any, ...]]:
    kinds = {*map(type, values)}
    if kinds <= TENSORS:
        given = tuple(map(operator.is_not, values, itertools.repeat(None)))
        return [*itertools.compress(values, given)], given
    if not kinds.isdisjoint({*PLAIN, *LISTS}):
        return split_tensors(values)
    return (), (tuple(map(type, values)), tuple(values))
