"""Recognises dense blocks, transitions, stems and heads: whole modules, or consecutive children of an nn.Sequential."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from densenet_fast import reference
from densenet_fast.conversion import layout
from densenet_fast.conversion.candidates import block_layouts
from densenet_fast.conversion.fused import Converted
from densenet_fast.conversion.layout import Layout, NotRecognised
from densenet_fast.conversion.probe import differs
from densenet_fast.conversion.sequential import FusedSequential, SequentialSlice
from densenet_fast.conversion.stem import (
    MEANS,
    head_layouts,
    is_stem_pool,
    resembles_norm,
    resembles_stem,
    stem_layouts,
)
from densenet_fast.conversion.transition import resembles_transition, transition_layouts
from densenet_fast.nn import BNReLUConv1x1, DenseBlock, Transition, fusion

FUSED_MODULES = (DenseBlock, Transition, BNReLUConv1x1)
ALREADY_FOUND = "it is known already"
Layouts = Callable[[nn.Module], Iterator[Layout]]


class Recognised(NamedTuple):
    """A part that a module is or resembles."""

    kind: str
    layout: Layout | None
    """How it is built; None if the module only resembles it."""
    reason: str
    """Why the module only resembles it; else empty."""
    names: tuple[str, ...] = ()
    """The consecutive children of an nn.Sequential that make up the part; empty if all of the module does."""


def examine(module: nn.Module) -> Recognised | None:
    """The part that ``module`` as a whole is or resembles.

    None if there is none, or if ``module`` contains modules of densenet_fast.
    """
    if any(isinstance(part, FUSED_MODULES) for part in module.modules()):
        return None
    layers = layout.dense_layers(module)
    if layers:
        found, reason = _recognise(module, block_layouts)
        if found is not None or len(layers) > 1:
            return Recognised("DenseBlock", found, reason)
    found, reason = _recognise(module, transition_layouts)
    if found is not None or resembles_transition(module):
        return Recognised("Transition" if found is None else found.kind, found, reason)
    if not runs_in_turn(module):
        found, reason = _recognise(module, stem_layouts)
        if found is not None or resembles_stem(module):
            return Recognised("Stem", found, reason)
    return None


def runs_in_turn(module: nn.Module) -> bool:
    """Whether ``module`` is an nn.Sequential with its original forward."""
    forward = type(module).forward
    return forward in (nn.Sequential.forward, FusedSequential.forward) and "forward" not in vars(module)


def _recognise(module: nn.Module, layouts: Layouts) -> tuple[Layout | None, str]:
    """The first of ``layouts(module)`` whose op computes what ``module`` does; or None and the reason."""
    if "forward" in vars(module):
        return None, "it has a forward of its own"
    reason = ""
    try:
        for candidate in layouts(module):
            if type(module).forward is nn.Module.forward:
                return None, (
                    f"a {type(module).__name__} has no forward: give it one that loops over its layers, or let each "
                    "layer concatenate and put them into an nn.Sequential"
                )
            difference = differs(module, candidate)
            if difference is None:
                return candidate, ""
            reason = reason or difference
    except NotRecognised as error:
        reason = str(error)
    return None, reason


def segments(module: nn.Module, already_found: Collection[str] = ()) -> list[Recognised]:
    """The parts that consecutive children of the nn.Sequential ``module`` make up or resemble.

    Children whose names are ``already_found`` are left out.
    """
    names = [name for name, child in module._modules.items() if child is not None]
    found = [*_runs(module, names, already_found)]
    taken = {*already_found, *(name for part in found if part.layout is not None for name in part.names)}
    parts = (_part_from_norm(module, names[i:]) for i, name in enumerate(names) if name not in taken)
    return found + [part for part in parts if part is not None]


def _runs(module: nn.Module, names: Sequence[str], already_found: Collection[str]) -> Iterator[Recognised]:
    """The dense blocks that consecutive children make up or resemble."""
    windows = [*_windows(module, names)]
    if windows == [[name for name in names if type(module._modules[name]) is not nn.Identity]]:
        return  # all children: the module as a whole was examined before
    for window in windows:
        several = len(window) > 1
        reasons = [ALREADY_FOUND if name in already_found else _block_obstacle(module, name) for name in window]
        for run, reason in _grouped_by_reason(window, reasons):
            if reason is ALREADY_FOUND:
                continue
            if reason is not None:
                yield from _left_alone(several, run, reason)
            elif several or _block_obstacle(module._modules[run[0]]) is not None:
                yield from _split(module, run, several)


def _split(module: nn.Module, names: Sequence[str], shown: bool) -> Iterator[Recognised]:
    """The longest dense blocks among the children ``names``, all of which are built like dense layers.

    If ``shown``, children that do not compute what dense layers do are returned too, with the reason.
    """
    found, reason = _recognise_together(module, names)
    if found is not None:
        yield Recognised("DenseBlock", found, "", (*names,))
        return
    singly = [_recognise_together(module, [name]) for name in names]
    if len(names) == 1 or all(found is None for found, _ in singly):
        yield from _left_alone(shown, names, reason)
        return
    for run, reason in _grouped_by_reason(names, [None if found is not None else why for found, why in singly]):
        found, reason = _recognise_together(module, run) if reason is None else (None, reason)
        yield Recognised("DenseBlock", found, reason, (*run,))


def _left_alone(shown: bool, names: Sequence[str], reason: str) -> Iterator[Recognised]:
    if shown:
        yield Recognised("DenseBlock", None, reason, (*names,))


def _recognise_together(module: nn.Module, names: Sequence[str]) -> tuple[Layout | None, str]:
    return _recognise(SequentialSlice(module, names), block_layouts)


def _windows(module: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Runs of consecutive children that may be dense layers.

    Such a child has one or two convolutions, not all of them 1x1. It reads as many channels as the child before it
    reads and makes together.
    """
    window: list[str] = []
    channels = None
    for name in names:
        child = module._modules[name]
        convs = layout.convolutions(child)
        is_candidate = (
            1 <= len(convs) <= 2
            and max(convs[-1].kernel_size) > 1
            and child is not convs[0]
            and len(layout.dense_layers(child)) < 2
            and not isinstance(child, (Converted, *FUSED_MODULES))
            and "." not in name
        )
        if window and not (is_candidate and convs[0].in_channels == channels):
            yield window
            window = []
        if is_candidate:
            window.append(name)
            channels = convs[0].in_channels + convs[-1].out_channels
    if window:
        yield window


def _block_obstacle(module: nn.Module, *names: str) -> str | None:
    """Why ``module``, or its child of the given name alone, is not built like a dense block, or None."""
    block = SequentialSlice(module, names) if names else module
    try:
        if not layout.dense_layers(block):
            return "it has no dense layers"
        layout.read_block(block)
    except NotRecognised as error:
        return str(error)
    return None


def _grouped_by_reason(names: Sequence[str], reasons: Sequence[str | None]) -> Iterator[tuple[list[str], str | None]]:
    """Runs of consecutive ``names`` with the same reason, or with None, and that reason."""
    for reason, group in itertools.groupby(zip(names, reasons), key=lambda pair: pair[1]):
        yield [name for name, _ in group], reason


def _part_from_norm(module: nn.Module, names: Sequence[str]) -> Recognised | None:
    """The stem, head or transition that begins with the first of the children ``names``.

    None if that child is no normalisation, or if no such part begins with it.
    """
    children = [module._modules[name] for name in names]
    if not resembles_norm(children[0]):
        return None
    i = 1
    while i < len(children) and type(children[i]).__module__ == nn.modules.activation.__name__:
        i += 1
    kinds = [type(child) for child in children[i : i + 3]]
    if kinds[:1] and kinds[0] in fusion.MAX_POOLS.values():
        found, reason = _recognise(SequentialSlice(module, names[: i + 1]), stem_layouts)
        shown = found is not None or is_stem_pool(children[i])
        return Recognised("Stem", found, reason, (*names[: i + 1],)) if shown else None
    count, layouts = 0, transition_layouts
    if kinds[:2] and kinds[0] in MEANS.values() and kinds[1:2] == [nn.Flatten]:
        count, layouts = i + 2, head_layouts
    elif kinds[:1] and kinds[0] in fusion.DIMENSIONS:
        dropout = kinds[1:2] and kinds[1] in (nn.Dropout, *layout.CHANNEL_DROPOUTS)
        pool = kinds[2:3] if dropout else kinds[1:2]
        if pool and pool[0] in (*reference.AVERAGE_POOLS.values(), *fusion.MAX_POOLS.values()):
            count = i + 2 + bool(dropout)
    found = _recognise(SequentialSlice(module, names[:count]), layouts)[0] if count else None
    return None if found is None else Recognised(found.kind, found, "", (*names[:count],))
