"""Tensors with addresses and without memory, for code that only allocates, takes views and launches kernels.

They are CPU tensors over addresses that no process has. Reading or writing one crashes the process. For each address it
is recorded which allocation it belongs to.
"""

import bisect
import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_fast.backends.arena import aligned

ADDRESSES = 0x2000_0080_0000_0000
"""The first address. No size, stride, pair of 32-bit numbers or float that kernels get looks like one: as a double it
is 1e-154, and its upper half is above 5e8."""

ALLOCATIONS = {
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")
}
"""Operations whose result is uninitialised."""

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
kernels = torch.ops.densenet_fast


class Unplannable(Exception):
    """Why there is no plan of some code. It does more than to allocate, take views and launch kernels, for example."""


class Place(NamedTuple):
    """Where an address lies: in which allocation, and how many bytes behind its start."""

    allocation: "Allocation"
    offset: int


class Allocation:
    """``size`` bytes, made for a tensor of some shape, strides and dtype."""

    def __init__(self, address: int, like: Tensor) -> None:
        self.address, self.size = address, extent(like)
        self.shape, self.stride, self.dtype = like.shape, like.stride(), like.dtype

    def take_form_of(self, t: Tensor) -> None:
        """Takes the shape and strides of ``t``, if ``t`` is no view and has the dtype and the size of the whole."""
        if t.dtype == self.dtype and extent(t) == self.size and not t._is_view():
            self.shape, self.stride = t.shape, t.stride()


class Memory:
    """The allocations, in order of their addresses."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self._next = ADDRESSES

    def allocate(self, like: Tensor, misaligned: int = 0) -> Tensor:
        """A tensor with the shape, strides and dtype of ``like``, ``misaligned`` bytes behind an aligned address."""
        found = Allocation(self._next + misaligned, like)
        self.allocations.append(found)
        self._next = aligned(found.address + found.size) + aligned(1)
        memory = (ctypes.c_char * found.size).from_address(found.address)
        storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        return torch.empty(0, dtype=like.dtype, device="cpu").set_(storage, 0, like.shape, like.stride())

    def place(self, address: int) -> Place | None:
        """Where ``address`` lies, or None."""
        i = bisect.bisect_right(self.allocations, address, key=lambda a: a.address) - 1
        if i < 0 or address - self.allocations[i].address >= self.allocations[i].size:
            return None
        return Place(self.allocations[i], address - self.allocations[i].address)

    def place_of(self, t: Tensor) -> Place | None:
        """Where the memory of ``t`` starts, or None if it has memory of another kind."""
        return self.place(t.untyped_storage().data_ptr())


def extent(t: Tensor) -> int:
    """The bytes from the first to the last element of ``t``; at least one element's."""
    return t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride())) if t.numel() else 1)


class Symbolic(TorchDispatchMode):
    """Gives allocations symbolic memory, lets views pass and records calls of the kernels in CUDA C++.

    All else raises :class:`Unplannable`. For each recorded call, ``recorded(name, launches, parameters)`` gets what
    ``cuda_stop_recording`` returns.
    """

    def __init__(self, memory: Memory, recorded: Callable[[str, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.memory, self.recorded = memory, recorded

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, op._schema.name
        if name.startswith("densenet_fast::cuda_"):
            return self._record(op, args, kwargs)
        if name in ALLOCATIONS:
            return self.memory.allocate(op(*map(_on_meta, args), **{**kwargs, "device": "meta", "pin_memory": None}))
        if op.is_view or name == "aten::set_":
            return op(*args, **kwargs)
        raise Unplannable(f"it calls {op}")

    def _record(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and self.memory.place_of(value) is None:
                raise Unplannable(f"{op} takes a tensor that was made elsewhere")
        kernels.cuda_start_recording()
        try:
            with self:
                return op.redispatch(CPU, *args, **kwargs)
        finally:
            self.recorded(op._schema.name.partition("::")[2], *kernels.cuda_stop_recording())


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
