"""What a module is: a dense block, a transition, a stem; and what the children of a Sequential are together."""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

from torch import nn

from densenet_fast import reference
from densenet_fast.conversion import layout
from densenet_fast.conversion.candidates import block_layouts
from densenet_fast.conversion.fused import Converted
from densenet_fast.conversion.layout import Layout, Unlike
from densenet_fast.conversion.probe import differs
from densenet_fast.conversion.sequential import FusedSequential, Stretch
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

OURS = (DenseBlock, Transition, BNReLUConv1x1)
KNOWN = "it is known already"
Layouts = Callable[[nn.Module], Iterator[Layout]]


class Recognised(NamedTuple):
    """What a module is or resembles, with the reason if it only resembles it; of a Sequential perhaps only the children
    ``names``."""

    kind: str
    layout: Layout | None
    reason: str
    names: tuple[str, ...] = ()


def examine(module: nn.Module) -> Recognised | None:
    """What ``module`` is, by itself and as a whole; None if it is nothing of the kind, or holds parts of ours."""
    if any(isinstance(part, OURS) for part in module.modules()):
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
    """Whether ``module`` is a Sequential that calls its children one after the other."""
    forward = type(module).forward
    return forward in (nn.Sequential.forward, FusedSequential.forward) and "forward" not in vars(module)


def _recognise(module: nn.Module, layouts: Layouts) -> tuple[Layout | None, str]:
    """The first of ``layouts(module)`` that says what the module computes; or None and why there is none."""
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
    except Unlike as error:
        reason = str(error)
    return None, reason


def segments(module: nn.Module, known: Collection[str] = ()) -> list[Recognised]:
    """What children of ``module``, which :func:`runs_in_turn`, are together, or resemble, but for those ``known``."""
    names = [name for name, child in module._modules.items() if child is not None]
    found = [*_runs(module, names, known)]
    taken = {*known, *(name for part in found if part.layout is not None for name in part.names)}
    parts = (_behind_norm(module, names[i:]) for i, name in enumerate(names) if name not in taken)
    return found + [part for part in parts if part is not None]


def _runs(module: nn.Module, names: Sequence[str], known: Collection[str]) -> Iterator[Recognised]:
    """Runs of dense layers among the children, and what resembles one."""
    windows = [*_windows(module, names)]
    if windows == [[name for name in names if type(module._modules[name]) is not nn.Identity]]:
        return  # it is a block as a whole, or is none
    for window in windows:
        together = len(window) > 1
        for stretch, reason in _alike(window, [KNOWN if name in known else _unlike(module, name) for name in window]):
            if reason is KNOWN:
                continue
            if reason is not None:
                yield from _left(together, stretch, reason)
            elif together or _unlike(module._modules[stretch[0]]) is not None:
                yield from _split(module, stretch, together)


def _split(module: nn.Module, names: Sequence[str], shown: bool) -> Iterator[Recognised]:
    """The longest runs that compute what a dense block does, among children that are built as its layers are; the
    others too, if they are to be ``shown``."""
    found, reason = _together(module, names)
    if found is not None:
        yield Recognised("DenseBlock", found, "", (*names,))
        return
    alone = [_together(module, [name]) for name in names]
    if len(names) == 1 or not any(layout is not None for layout, _ in alone):
        yield from _left(shown, names, reason)
        return
    for stretch, other in _alike(names, [None if found is not None else why for found, why in alone]):
        found, reason = _together(module, stretch) if other is None else (None, other)
        yield Recognised("DenseBlock", found, reason, (*stretch,))


def _left(shown: bool, names: Sequence[str], reason: str) -> Iterator[Recognised]:
    if shown:
        yield Recognised("DenseBlock", None, reason, (*names,))


def _together(module: nn.Module, names: Sequence[str]) -> tuple[Layout | None, str]:
    return _recognise(Stretch(module, names), block_layouts)


def _windows(module: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Children that follow each other and may be dense layers: with one or two convolutions, not all 1x1, each of which
    reads as many channels as its predecessor reads and makes."""
    window: list[str] = []
    channels = None
    for name in names:
        child = module._modules[name]
        convs = layout.convolutions(child)
        may = (
            1 <= len(convs) <= 2
            and max(convs[-1].kernel_size) > 1
            and child is not convs[0]
            and len(layout.dense_layers(child)) < 2
            and not isinstance(child, (Converted, *OURS))
            and "." not in name
        )
        if window and not (may and convs[0].in_channels == channels):
            yield window
            window = []
        if may:
            window.append(name)
            channels = convs[0].in_channels + convs[-1].out_channels
    if window:
        yield window


def _unlike(module: nn.Module, *names: str) -> str | None:
    """Why ``module``, or its child of that name alone, is not built as a dense block is, or None."""
    block = Stretch(module, names) if names else module
    try:
        if not layout.dense_layers(block):
            return "it has no dense layers"
        layout.read_block(block)
    except Unlike as error:
        return str(error)
    return None


def _alike(names: Sequence[str], reasons: Sequence[str | None]) -> Iterator[tuple[list[str], str | None]]:
    """Names that follow each other and have no reason, and each of the others by itself, with its reason."""
    for reason, group in itertools.groupby(zip(names, reasons), key=lambda pair: pair[1]):
        yield [name for name, _ in group], reason


def _behind_norm(module: nn.Module, names: Sequence[str]) -> Recognised | None:
    """What begins with the first of the children ``names``, a normalisation, if anything does."""
    children = [module._modules[name] for name in names]
    if not resembles_norm(children[0]):
        return None
    at = 1
    while at < len(children) and type(children[at]).__module__ == nn.modules.activation.__name__:
        at += 1
    kinds = [type(child) for child in children[at : at + 3]]
    if kinds[:1] and kinds[0] in fusion.MAX_POOLS.values():
        found, reason = _recognise(Stretch(module, names[: at + 1]), stem_layouts)
        shown = found is not None or is_stem_pool(children[at])
        return Recognised("Stem", found, reason, (*names[: at + 1],)) if shown else None
    count, layouts = 0, transition_layouts
    if kinds[:2] and kinds[0] in MEANS.values() and kinds[1:2] == [nn.Flatten]:
        count, layouts = at + 2, head_layouts
    elif kinds[:1] and kinds[0] in fusion.DIMENSIONS:
        dropout = kinds[1:2] and kinds[1] in (nn.Dropout, *layout.CHANNEL_DROPOUTS)
        pool = kinds[2:3] if dropout else kinds[1:2]
        if pool and pool[0] in (*reference.AVERAGE_POOLS.values(), *fusion.MAX_POOLS.values()):
            count = at + 2 + bool(dropout)
    found = _recognise(Stretch(module, names[:count]), layouts)[0] if count else None
    return None if found is None else Recognised(found.kind, found, "", (*names[:count],))
