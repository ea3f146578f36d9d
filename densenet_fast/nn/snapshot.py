"""Keeps what was found out about a module for as long as nothing that decides it has changed.

Whether a part may run fused depends on hundreds of modules, and so do the tensors that it runs on. To look at all of
them in Python takes longer than to launch the kernels. So a first call looks at them. Each later call compares them
with what they were then, in a few comparisons of whole lists, which Python makes in C.

Of every module these are compared: its attributes (with them its mode, its options and a ``forward`` of its own), its
class, the absence of hooks, and its children, parameters and buffers by identity. Of a tensor these are compared,
because they may change in place: dtype, device and shape. A call looks at everything else about a tensor itself, and at
global switches and patched functions.

What is kept stands outside the modules, so copies, pickles and state dicts do not contain it. It does not keep the
module alive. If something below refers to the module (a parameter's hook, for example), only Python's garbage collector
can find that the module is not used any more. So before each full collection all snapshots are dropped, and later taken
anew.
"""

import gc
import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from densenet_fast.nn.sync_batch_norm import SyncBatchNorm

PACKAGE = __name__.partition(".")[0]

CONTENTS = ("_parameters", "_buffers", "_modules")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TORCHS_OWN = {*vars(nn.Module()), "_reversed_padding_repeated_twice"}
"""Attributes in which torch keeps tables. The last one is a list, which no convolution that may run fused reads."""
TABLES = (dict, OrderedDict)
TENSORS = (Tensor, nn.Parameter)
CONSTANTS = {bool, int, float, str, type(None)}
SYNCHRONISED = (nn.SyncBatchNorm, SyncBatchNorm)

_values = dict.values
_dtype, _device, _is_cpu, _shape = map(operator.attrgetter, ("dtype", "device", "is_cpu", "shape"))


class Found(NamedTuple):
    """Why a module cannot run fused, or the operands of its op."""

    obstacle: str | None
    operands: Any


class Snapshot:
    """A module and those ``below`` it as they were when this was made; see :meth:`of`."""

    def __init__(self, module: nn.Module, below: Sequence[nn.Module]) -> None:
        self._below = below
        self._kinds = [type(module), *map(type, below)]
        self._attributes = [vars(module), *map(vars, below)]
        self._copies = [dict(attributes) for attributes in self._attributes]
        full = [(vs, name) for vs in self._attributes for name in CONTENTS if vs[name]]
        self._holders, self._names = [vs for vs, _ in full], [name for _, name in full]
        self._tables = [vs[name] for vs, name in full]
        self._keys = [*chain.from_iterable(self._tables)]
        self._contents = [*chain.from_iterable(map(_values, self._tables))]
        self._empty = [vs[name] for vs in self._attributes for name in CONTENTS if not vs[name]]
        self._empty += [vs[name] for vs in self._attributes[1:] for name in HOOKS]
        self._tensors = [
            tensor
            for table, kind in zip(self._tables, self._names)
            if kind != "_modules"
            for name, tensor in table.items()
            if tensor is not None and name != "num_batches_tracked"
        ]
        self._dtypes = [*map(_dtype, self._tensors)]
        self._on_cpu = all(map(_is_cpu, self._tensors))  # which takes less long to ask
        self._devices = [*map(_device, self._tensors)]
        self._vectors = [tensor for tensor in self._tensors if tensor.dim() <= 1]  # whose size is their shape
        self._ranks = [*map(Tensor.dim, self._vectors)]
        self._sizes = [*map(Tensor.numel, self._vectors)]
        self._arrays = [tensor for tensor in self._tensors if tensor.dim() > 1]
        self._shapes = [*map(_shape, self._arrays)]

    @classmethod
    def of(cls, module: nn.Module, below: Sequence[nn.Module], constant_names: Collection[str]) -> "Snapshot | None":
        """Takes a snapshot of all that decides whether ``module`` may run fused, or returns None where that is
        impossible.

        It is impossible if a module below has hooks; if a module has an attribute that may change in place or refers to
        the module, and is not one of ``constant_names``; if a tensor is not a plain leaf; or if batches of several
        processes are normalised together.
        """
        if not all(_is_plain(part, constant_names) for part in (module, *below)) or any(map(_has_hooks, below)):
            return None
        return cls(module, below)

    def unchanged(self, module: nn.Module) -> bool:
        """Whether ``module``, whose snapshot this is, the modules below it and their tensors are as they were."""
        # Shapes, which are new tuples, are not put into a list: so many at once would wake the garbage collector.
        return (
            self.holds(module)
            and [*map(_dtype, self._tensors)] == self._dtypes
            and (all(map(_is_cpu, self._tensors)) if self._on_cpu else [*map(_device, self._tensors)] == self._devices)
            and [*map(Tensor.dim, self._vectors)] == self._ranks
            and [*map(Tensor.numel, self._vectors)] == self._sizes
            and all(map(operator.eq, map(_shape, self._arrays), self._shapes))
        )

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` and the modules below it are as they were, and have the same tensors. These may have
        changed in place."""
        if vars(module) is not self._attributes[0]:
            return False
        try:
            same = self._attributes == self._copies
        except Exception:  # an attribute now is what cannot be compared: a tensor, an array
            return False
        flat = chain.from_iterable
        return (
            same
            and [type(module), *map(type, self._below)] == self._kinds
            and not any(self._empty)
            and all(map(operator.is_, map(operator.getitem, self._holders, self._names), self._tables))
            and [*flat(self._tables)] == self._keys
            and all(map(operator.is_, flat(map(_values, self._tables)), self._contents))
        )


class Memory:
    """Keeps what ``examine`` finds out about a module.

    The module is examined again only if it or one of the modules ``below`` has changed since, or if there was an
    obstacle.

    Args:
        examine: finds out what decides whether the module may run fused, and its operands.
        below: returns the modules that ``examine`` looks at, besides the one it is given.
        kinds: the class of the modules, and those of our own classes that may stand ``below``. A module of a subclass,
            which may redefine anything, is examined every time. Empty for any class, if functions on classes are
            checked elsewhere.
        constant_names: names of attributes that do not change in place.
    """

    def __init__(
        self,
        examine: Callable[[Any], Found],
        below: Callable[[Any], Sequence[nn.Module]],
        kinds: tuple[type[nn.Module], ...] = (),
        constant_names: Collection[str] = (),
    ) -> None:
        self._examine, self._below, self._kinds = examine, below, kinds
        self._constant_names = TORCHS_OWN.union(constant_names)
        ours = dict.fromkeys(base for kind in kinds for base in kind.__mro__ if base.__module__.startswith(PACKAGE))
        self._classes = [vars(kind) for kind in ours]
        _memories.append(self)
        self.forget()

    def forget(self) -> None:
        """Forgets all that was found out."""
        self._functions = [dict(attributes) for attributes in self._classes]
        self._remembered: WeakKeyDictionary[nn.Module, tuple[Snapshot, Found]] = WeakKeyDictionary()

    def __call__(self, module: nn.Module) -> Found:
        if torch.compiler.is_compiling() or (self._kinds and type(module) is not self._kinds[0]):
            return self._examine(module)
        if self._classes != self._functions:
            self.forget()
        remembered = self._remembered.get(module)
        if remembered is not None and remembered[0].unchanged(module):
            return remembered[1]
        found = self._examine(module)
        snapshot = Snapshot.of(module, self._below(module), self._constant_names) if found.obstacle is None else None
        if snapshot is not None:
            found = self._examine(module)  # again: another thread may have changed it before the snapshot was taken
        if snapshot is None or found.obstacle is not None:
            self._remembered.pop(module, None)
        else:
            self._remembered[module] = snapshot, found
        return found

    def held(self, module: nn.Module) -> Found | None:
        """What was found out about ``module`` last, if nothing but its tensors, in place, may have changed since."""
        if self._classes != self._functions:
            return None
        snapshot, found = self._remembered.get(module, (None, None))
        return found if snapshot is not None and snapshot.holds(module) else None


_memories: list[Memory] = []


def _forget_all(phase: str, info: dict[str, int]) -> None:
    """The garbage collector calls this before and after it runs."""
    if phase == "start" and info["generation"] == 2:
        for memory in _memories:
            memory.forget()


gc.callbacks.append(_forget_all)


def all_below(module: nn.Module) -> list[nn.Module]:
    """All modules below ``module``."""
    return [*module.modules()][1:]


def _is_plain(module: nn.Module, constant_names: Collection[str]) -> bool:
    attributes = vars(module)
    return (
        all(type(attributes.get(name)) in TABLES for name in (*CONTENTS, *HOOKS))
        and all(name in constant_names or _is_constant(value) for name, value in attributes.items())
        and all(map(_is_plain_tensor, chain(module._parameters.values(), module._buffers.values())))
        and not (isinstance(module, SYNCHRONISED) and module.training)
    )


def _is_constant(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_constant, value))
    return type(value) in CONSTANTS or isinstance(value, type)


def _is_plain_tensor(tensor: Tensor | None) -> bool:
    return tensor is None or (type(tensor) in TENSORS and tensor.is_leaf)


def _has_hooks(module: nn.Module) -> bool:
    return any(vars(module)[name] for name in HOOKS)
