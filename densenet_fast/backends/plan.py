"""An op's body as a plan: its launches, recorded once and replayed by one call of the compiled library.

A plan is made by running the body on tensors with addresses and without memory (``recording``). What it allocates and
does not return stands in one arena, by lifetime. A replay computes the addresses anew and launches: no Python of the
body runs, so a plan holds for equal constants, settings, shapes, strides, dtypes and alignments only. ``cached`` keeps
plans by these.

A replay calls none of the hooks that Triton has for launches.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import extension, nvidia
from densenet_fast.backends.inputs import split_tensors
from densenet_fast.backends.recording import Native, Recording, View, replaced, tensors_in
from densenet_fast.backends.symbolic import Allocation, Unplannable
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.launch import Launch
from densenet_fast.backends.triton.parameters import parameters

kernels = torch.ops.densenet_fast

LIMIT = 256
"""How many plans are kept, and how many signatures without one. The oldest goes first."""


class Call(NamedTuple):
    """A launch as the driver takes it."""

    name: str
    own: bool
    """Whether the function is a symbol of the compiled library, else the driver's handle."""
    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    data: bytes
    """The parameters."""
    arguments: list[int]
    """The offset of each in ``data``."""
    relocations: list[tuple[int, int, int]]
    """(offset in ``data``, buffer, bytes behind its start)."""


class Plan:
    """The launches of a body, for tensors like those among the inputs it was made with. Made by :func:`make`."""

    def __init__(self, recording: Recording, tensors: list[Tensor], device: torch.device) -> None:
        self.device = device
        self.result: Any = recording.result
        self.outputs = recording.outputs
        self._whole = whole(self.result, self.outputs, len(tensors))
        """Makes the result of its outputs, where its tensors are just these."""
        self.lifetimes, self.offsets = recording.lifetimes, recording.offsets
        self.arena_bytes = recording.arena_bytes
        self.steps: list[Launch | Native] = [
            s._replace(arguments=replaced(s.arguments, recording.view)) if isinstance(s, Launch) else s
            for s in recording.steps
        ]
        """The launches; tensors among a Triton kernel's arguments are a :class:`View` each."""
        self.calls: list[Call | None] = calls(recording, device)
        """The same as the driver takes them: None of Triton's where they are interpreted."""
        self._handle: int | None = None
        if None not in self.calls:
            self._handle = keep(self.calls, tensors, self.outputs, self.arena_bytes)
            weakref.finalize(self, kernels.cuda_forget_plan, self._handle).atexit = False

    def run(self, inputs: Sequence[Any]) -> Any | None:
        """Returns what the body returns on ``inputs``, whose constants are those of the plan.

        Where a tensor's shape, strides, dtype, device or alignment is another, it returns None and launches nothing. It
        is not for interpreted Triton kernels.
        """
        return self.replay(list(tensors_in(inputs)))

    def replay(self, tensors: list[Tensor]) -> Any | None:
        """The same as :meth:`run`, from the tensors among the inputs."""
        outputs = kernels.cuda_call(self._handle, tensors, nvidia.current_stream(self.device))
        if not outputs:
            return None
        return self._returned(tensors, outputs)

    def interpret(self, inputs: Sequence[Any], poison: bool = False) -> Any:
        """The same on CPU tensors, launch by launch: Triton's kernels in its interpreter or by its own launcher, those
        in CUDA C++ in the emulation. With ``poison``, the parts of the arena that a launch has no use for are NaN."""
        tensors = list(tensors_in(inputs))
        outputs, memory = self._allocate()
        for t in (*outputs, memory) if poison else ():
            _poison(t)
        for i in range(len(self.steps)):
            if poison:
                self._poison_dead(memory, i)
            self.launch(i, tensors, outputs, memory)
        return self._returned(tensors, outputs)

    def launch(self, i: int, tensors: list[Tensor], outputs: list[Tensor], memory: Tensor) -> None:
        """Makes launch ``i`` alone, without the plan's replay."""
        step, buffers = self.steps[i], [*tensors, *outputs, memory]
        if isinstance(step, Launch):
            launch.run(step._replace(arguments=replaced(step.arguments, lambda view: view.of(buffers), View)))
            return
        handle = keep([self.calls[i]], tensors, self.outputs, 0)
        kernels.cuda_replay(handle, tensors, outputs, memory, 0)
        kernels.cuda_forget_plan(handle)

    def _allocate(self) -> tuple[list[Tensor], Tensor]:
        outputs = [torch.empty_strided(o.shape, o.stride, dtype=o.dtype, device=self.device) for o in self.outputs]
        return outputs, torch.empty(self.arena_bytes, dtype=torch.uint8, device=self.device)

    def _returned(self, tensors: list[Tensor], outputs: list[Tensor]) -> Any:
        if self._whole:
            return self._whole(outputs)
        return replaced(self.result, lambda view: view.of([*tensors, *outputs]), View)

    def _poison_dead(self, memory: Tensor, i: int) -> None:
        dead = torch.ones(self.arena_bytes, dtype=torch.bool)
        for lifetime, offset in zip(self.lifetimes, self.offsets):
            if lifetime.first <= i < lifetime.end:
                dead[offset : offset + lifetime.size] = False
        memory[dead] = 0xFF


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be planned here, or None."""
    if extension.unavailable() is not None or hasattr(kernels, "cuda_plan"):
        return extension.unavailable()
    return "the compiled kernels were built without CUDA (pip install --no-build-isolation . with nvcc on PATH)"


def make(body: Callable[..., Any], inputs: Sequence[Any], device: torch.device) -> Plan:
    """The plan of ``body(*inputs)``. All tensors among the inputs, also those in lists, are on ``device``.

    Raises:
        Unplannable: there is none, and why.
    """
    if unavailable() is not None:
        raise Unplannable(unavailable())
    try:
        return Plan(Recording(body, inputs, device), list(tensors_in(inputs)), device)
    except Unplannable as error:
        raise Unplannable(*error.args) from None  # whose traceback would keep all tensors
    except Exception as error:  # what it is, the body tells when it runs
        raise Unplannable(f"{type(error).__name__}: {error}") from None


_plans: dict[tuple[Any, ...], Plan | Unplannable] = {}
_met: set[tuple[Any, ...]] = set()
"""The signatures of calls without a plan so far."""
_latest: dict[tuple[Any, ...], Plan] = {}
"""The plan that ran last for a call's name, constants, settings and first shape. That shape tells a network's parts
from each other."""
_making = threading.Lock()


FIRST = Unplannable("it was the first call with such inputs")
CHANGED = Unplannable("an input changed while it was looked at, or two signatures are equal by chance")


def run(name: str, body: Callable[..., Any], inputs: Sequence[Any]) -> Any | Unplannable:
    """Returns what ``body(*inputs)`` returns, by its plan, or why there is no plan.

    Inputs of a kind that comes for the first time get no plan: to make one takes longer than a walk, and for images of
    ever new sizes that would not pay.
    """
    tensors, constants = split_tensors(inputs)
    kind = name, constants, settings(tensors[0])
    alike = *kind, tensors[0].shape
    latest = _latest.get(alike)
    result = None if latest is None else latest.replay(tensors)
    if result is not None:
        return result
    key = *kind, kernels.cuda_signature(tensors)
    if key not in _plans and key not in _met:
        if len(_met) >= 4 * LIMIT:
            _met.clear()
        _met.add(key)
        return FIRST
    found = _find(key, body, inputs, tensors)
    if not isinstance(found, Plan):
        return found
    if len(_latest) >= LIMIT:
        _latest.clear()
    _latest[alike] = found
    result = found.replay(tensors)
    return CHANGED if result is None else result


def cached(name: str, body: Callable[..., Any], inputs: Sequence[Any]) -> Plan | Unplannable:
    """The plan of the body called ``name`` for inputs like ``inputs``, or why there is none. It is made once.

    Whether a tensor requires a gradient makes no difference: a body does not see it.
    """
    if unavailable() is not None:
        return Unplannable(unavailable())
    tensors, constants = split_tensors(inputs)
    return _find((name, constants, settings(tensors[0]), kernels.cuda_signature(tensors)), body, inputs, tensors)


def _find(
    key: tuple[Any, ...], body: Callable[..., Any], inputs: Sequence[Any], tensors: list[Tensor]
) -> Plan | Unplannable:
    if key in _plans:
        return _plans[key]
    with _making:
        if key not in _plans:
            try:
                found: Plan | Unplannable = make(body, inputs, tensors[0].device)
            except Unplannable as error:
                found = error.with_traceback(None)
            while len(_plans) >= LIMIT:
                del _plans[next(iter(_plans))]
            _plans[key] = found
        return _plans[key]


def settings(x: Tensor) -> tuple[Any, ...]:
    """What a plan depends on besides an op's inputs. ``x``, a feature map, is the first of these."""
    return config.device_of(x.device), config.precision(x.dtype)


def calls(recording: Recording, device: torch.device) -> list[Call | None]:
    """The launches as the driver takes them. Kernels that are not compiled yet are compiled. A launch of an interpreted
    Triton kernel is None."""
    triton = [] if config.interpreted() else [s for s in recording.steps if isinstance(s, Launch)]
    launch.compile_all(triton, device)
    checked: set[int] = set()
    with launch.current(device):
        return [
            _native_call(s, recording) if isinstance(s, Native) else _triton_call(s, recording, checked)
            for s in recording.steps
        ]


def _native_call(step: Native, recording: Recording) -> Call:
    name, *geometry = step
    return Call(name, True, *geometry, [0], recording.relocations(step.data))


def _triton_call(item: Launch, recording: Recording, checked: set[int]) -> Call | None:
    """A launch of Triton's as the driver takes it. The parameters of a function that is not in ``checked`` are checked,
    and it is added there."""
    if config.interpreted():
        return None
    compiled = launch.compiled(item)
    _ = compiled.run  # loads it
    try:
        data, fields, addresses = parameters(item, compiled)
    except NotImplementedError as error:
        raise Unplannable(str(error)) from None
    if compiled.function not in checked:
        found = [tuple(field) for field in kernels.cuda_parameters(compiled.function).tolist()]
        if found != fields:
            raise Unplannable(f"{item.name} has parameters at {fields}, the driver says {found or 'nothing'}")
        checked.add(compiled.function)
    relocations = [move for move in recording.relocations(data) if move[0] in addresses]
    grid, block = (*item.grid, 1, 1)[:3], (32 * compiled.metadata.num_warps, 1, 1)
    shared, arguments = compiled.metadata.shared, [at for at, _ in fields]
    return Call(item.name, False, compiled.function, grid, block, shared, data, arguments, relocations)


def whole(result: Any, outputs: list[Allocation], inputs: int) -> Callable[[list[Tensor]], tuple[Any, ...]] | None:
    """Returns what makes a flat ``result``, a tuple of tensors and lists of them, from the ``outputs`` numbered behind
    ``inputs``. None where the result has another form, or one of its tensors is not a whole output."""

    def place(value: Any) -> int:
        if value is None:
            return -1
        if not isinstance(value, View) or value.is_view or value.buffer is None:
            raise LookupError
        output = outputs[value.buffer - inputs]
        if (value.offset, value.shape, value.stride, value.dtype) != (0, output.shape, output.stride, output.dtype):
            raise LookupError
        return value.buffer - inputs

    if type(result) is not tuple:
        return None
    try:
        places = [list(map(place, v)) if isinstance(v, list) else place(v) for v in result]
    except LookupError:
        return None

    def made(tensors: list[Tensor | None]) -> tuple[Any, ...]:
        at = [*tensors, None].__getitem__
        return tuple([[*map(at, p)] if isinstance(p, list) else at(p) for p in places])

    return made


def keep(made: Sequence[Call], tensors: list[Tensor], outputs: list[Allocation], arena: int) -> int:
    """Gives the calls to the compiled library, for inputs like ``tensors``. Returns the number of the plan there."""
    rows = [
        (c.own, c.function, *c.grid, *c.block, c.shared, len(c.data), len(c.arguments), len(c.relocations))
        for c in made
    ]
    arguments = [at for c in made for at in c.arguments]
    relocations = [move for c in made for move in c.relocations]
    data = torch.tensor(list(b"".join(c.data for c in made)), dtype=torch.uint8, device="cpu")
    tables = (_table(rows, 12), _table(arguments, 1), _table(relocations, 3))
    like = [torch.empty_strided(o.shape, o.stride, dtype=o.dtype, device="meta") for o in outputs]
    return kernels.cuda_plan(tensors, like, arena, *tables, data, "\n".join(c.name for c in made))


def _table(rows: list[Any], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, columns)


def _poison(t: Tensor) -> None:
    """Fills the memory of ``t`` with bytes that make NaN."""
    torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).fill_(0xFF)
