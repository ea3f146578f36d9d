"""What a body does on symbolic tensors: its launches in order, and the places of their tensors."""

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import nvidia
from densenet_fast.backends.arena import Lifetime, layout
from densenet_fast.backends.symbolic import ADDRESSES, Allocation, Memory, Symbolic, Unplannable
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.launch import Launch


class Native(NamedTuple):
    """A launch of a kernel in CUDA C++, whose parameters are one struct; ``function`` is the host's symbol of it."""

    name: str
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    data: bytes


class View(NamedTuple):
    """A tensor in a buffer, ``offset`` bytes behind its start; None stands for a tensor without elements."""

    buffer: int | None
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_view: bool
    """Whether torch calls it a view."""

    def of(self, buffers: Sequence[Tensor]) -> Tensor:
        if self.buffer is None:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=buffers[0].device)
        base = buffers[self.buffer]
        if not self.is_view and (base.shape, base.stride(), base.dtype) == (self.shape, self.stride, self.dtype):
            return base
        start = (base.storage_offset() * base.element_size() + self.offset) // self.dtype.itemsize
        if self.is_view and base.dtype == self.dtype:
            return base.as_strided(self.shape, self.stride, start)
        made = torch.empty(0, dtype=self.dtype, device=base.device)
        return made.set_(base.untyped_storage(), start, self.shape, self.stride)


class Recording:
    """``body(*inputs)`` on symbolic tensors that stand in for ``inputs`` on ``device``.

    Buffers are numbered: the tensors among the inputs, also where two are the same, then what the result's tensors are
    views of (``outputs``), and last the arena, which holds the rest.

    Raises:
        Unplannable: the body does more than to allocate, take views and launch kernels, or returns an input.
    """

    def __init__(self, body: Callable[..., Any], inputs: Sequence[Any], device: torch.device) -> None:
        self.steps: list[Launch | Native] = []
        """The launches, on symbolic tensors."""
        self.memory = Memory()

        def stand_in(t: Tensor) -> Tensor:
            if t.device != device or t.layout != torch.strided:
                raise Unplannable(f"an input is on {t.device}, {t.layout}")
            return self.memory.allocate(t, t.data_ptr() % 16)

        given = replaced(list(inputs), stand_in)
        count = len([*tensors_in(inputs)])
        with (
            config.assume(config.device_of(device)),
            nvidia.standing_in(device),
            launch.planning(self._launched),
            torch.no_grad(),
            Symbolic(self.memory, self._recorded),
        ):
            result = body(*given)
        own = self.memory.allocations[:count]
        self.outputs = list(dict.fromkeys(self._allocation(t) for t in tensors_in(result)))
        """What the tensors of the result are views of."""
        if not set(own).isdisjoint(self.outputs):
            raise Unplannable("a result is an input or a view of one")
        temporary = [a for a in self.memory.allocations[count:] if a not in self.outputs]
        self.lifetimes = self._lifetimes(temporary)
        self.offsets, self.arena_bytes = layout(self.lifetimes)
        """Where the arena's allocations stand in it."""
        self._places = {a: (i, 0) for i, a in enumerate(own)}
        self._places |= {a: (count + i, 0) for i, a in enumerate(self.outputs)}
        self._places |= {a: (count + len(self.outputs), at) for a, at in zip(temporary, self.offsets)}
        self.result = replaced(result, self.view)
        """What the body returned, each tensor as a :class:`View`."""
        for t in tensors_in(result):
            self._allocation(t).take_form_of(t)

    def view(self, t: Tensor) -> View:
        """Where a symbolic tensor stands."""
        empty = t.numel() == 0 and self.memory.place_of(t) is None
        buffer, offset = (None, 0) if empty else self.buffer(t.untyped_storage().data_ptr())
        offset += t.storage_offset() * t.element_size()
        return View(buffer, offset, t.shape, t.stride(), t.dtype, t._is_view())

    def buffer(self, address: int) -> tuple[int, int]:
        """(buffer, bytes behind its start) of a symbolic address."""
        place = self.memory.place(address)
        buffer, start = self._places[place.allocation]
        return buffer, start + place.offset

    def relocations(self, data: bytes) -> list[tuple[int, int, int]]:
        """(offset, buffer, bytes behind its start) of every symbolic address in a struct of parameters."""
        return [(at, *self.buffer(address)) for at, address in self._addresses(data)]

    def _addresses(self, data: bytes) -> list[tuple[int, int]]:
        """Returns (offset, address) of every symbolic address."""
        words = struct.unpack_from(f"<{len(data) // 8}Q", data)
        return [(8 * i, word) for i, word in enumerate(words) if word >= ADDRESSES and self.memory.place(word)]

    def _lifetimes(self, allocations: list[Allocation]) -> list[Lifetime]:
        """Returns, for each allocation, the launches from the first to the last that has an address in it."""
        used: dict[Allocation, list[int]] = {a: [] for a in self.memory.allocations}
        for i, step in enumerate(self.steps):
            if isinstance(step, Native):
                addresses = [address for _, address in self._addresses(step.data)]
            else:
                addresses = [t.data_ptr() for t in tensors_in(step.arguments)]
            for place in filter(None, map(self.memory.place, addresses)):
                used[place.allocation].append(i)
        return [Lifetime(a.size, *(used[a][0], used[a][-1] + 1) if used[a] else (0, 0)) for a in allocations]

    def _allocation(self, t: Tensor) -> Allocation:
        place = self.memory.place_of(t)
        if place is None:
            raise Unplannable("a result was made elsewhere")
        return place.allocation

    def _launched(self, item: Launch) -> None:
        if math.prod(item.grid) == 0:
            return
        for t in tensors_in(item.arguments):
            if t.numel() and self.memory.place_of(t) is None:
                raise Unplannable(f"{item.name} takes a tensor that was made elsewhere")
        self.steps.append(item)

    def _recorded(self, name: str, launches: Tensor, parameters: Tensor) -> None:
        data = bytes(parameters[0].tolist())
        for function, *sizes, shared, length in launches.tolist():
            self.steps.append(Native(name, function, tuple(sizes[:3]), tuple(sizes[3:]), shared, data[:length]))
            data = data[length:]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for v in value:
            yield from tensors_in(v)


def replaced(value: Any, function: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Returns ``value`` with ``function`` applied to every object of ``kind`` in its nested lists and tuples."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, list | tuple):
        items = [replaced(v, function, kind) for v in value]
        return items if isinstance(value, list) else type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
