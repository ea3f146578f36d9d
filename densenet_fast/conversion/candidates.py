"""The possible layouts of a dense block, where its modules alone do not decide.

They leave open whether new features come before or behind the others, whether the block returns its input too, and
where its layers apply dropout.
"""

from collections.abc import Iterator

from torch import nn

from densenet_fast.conversion.expected import expected_of
from densenet_fast.conversion.layout import (
    CHANNEL_DROPOUTS,
    BlockLayout,
    Dropout,
    Layer,
    NotRecognised,
    dropout_modules,
    module_at,
    read_block,
)
from densenet_fast.conversion.probe import differs

INFERENCE = (False,)
PLACES = {1: ((True,),), 2: ((False, True), (True, True), (True, False))}
"""By the number of units of a layer: which of them dropout may follow."""


def block_layouts(block: nn.Module) -> Iterator[BlockLayout]:
    """The possible layouts of ``block``, which has dense layers, the most common first.

    Each is searched for only when the caller has rejected those before it.

    Raises:
        NotRecognised: ``block`` is built in another way.
    """
    plain = read_block(block)
    candidates = _with_dropout(block, plain)
    first = next(candidates)
    yield first
    form = next((form for form in _result_forms(plain) if differs(block, form, INFERENCE) is None), None)
    if form is None:
        return
    options = dict(prepend=form.prepend, new_only=form.new_only)
    if form is not plain:
        yield first._replace(**options)
    for layout in candidates:
        yield layout._replace(**options)
    raise NotRecognised(differs(block, first._replace(**options)))


def _result_forms(layout: BlockLayout) -> Iterator[BlockLayout]:
    """``layout`` with new features behind or before the others, and with or without the block's input."""
    yield layout
    yield layout._replace(prepend=True)
    if len(layout.layers) > 1:  # with one layer, any chain of units would match
        yield layout._replace(new_only=True)
        yield layout._replace(prepend=True, new_only=True)


def _with_dropout(block: nn.Module, layout: BlockLayout) -> Iterator[BlockLayout]:
    """``layout`` with dropout at each place that the block's modules or attributes allow."""
    modules = [_modules(block, layer) for layer in layout.layers]
    if any(map(any, modules)):
        yield from _with_dropout_behind(block, layout, modules)
        return
    for whole_channels in (False, True):
        rates = [_rates(block, layer, whole_channels) for layer in layout.layers]
        if any(map(any, rates)):
            yield from _with_dropout_behind(block, layout, rates)
    yield layout  # without dropout, valid as long as no attribute changes


def _modules(block: nn.Module, layer: Layer) -> tuple[Dropout | None, ...]:
    """For each unit of ``layer``, the dropout module that may follow it."""
    paths = dropout_modules(block, layer)
    found = [Dropout(path, "p", isinstance(module_at(block, path), CHANNEL_DROPOUTS)) for path in paths]
    return tuple(found if len(found) > 1 else (found or [None]) * len(layer.units))


def _rates(block: nn.Module, layer: Layer, whole_channels: bool) -> tuple[Dropout | None, ...]:
    """For each unit of ``layer``, the attribute that may hold the rate of a functional dropout behind it."""
    found = [_rate(block, layer, unit.conv) for unit in layer.units]
    return tuple(None if rate is None else Dropout(*rate, whole_channels) for rate in found)


def _rate(block: nn.Module, layer: Layer, conv: str) -> tuple[str, str] | None:
    """The path of a module and the name of its attribute that may be a dropout rate, or None.

    Searches the modules around ``conv`` from the inside out, then the layer, then the block.
    """
    path = conv
    while path:
        path = path.rpartition(".")[0] if len(path) > len(layer.path) else ""
        for name, value in vars(module_at(block, path)).items():
            if "drop" in name.lower() and type(value) in (int, float) and 0 <= value <= 1:
                return path, name
    return None


def _with_dropout_behind(
    block: nn.Module, layout: BlockLayout, candidates: list[tuple[Dropout | None, ...]]
) -> Iterator[BlockLayout]:
    """``layout`` with ``candidates`` (per layer, a dropout for each unit) behind all units, or behind some of them."""
    if len({dropout.whole_channels for layer in candidates for dropout in layer if dropout is not None}) > 1:
        raise NotRecognised("some of its layers drop whole channels and some do not: let all do the same")
    places = PLACES[len(layout.layers[0].units)]
    if any(len(set(layer)) > 1 for layer in candidates):
        places = [place for place in places if all(place)]
    for place in places:
        dropouts = [tuple(d if used else None for d, used in zip(layer, place)) for layer in candidates]
        layers = tuple(layer._replace(dropouts=d) for layer, d in zip(layout.layers, dropouts))
        rates = {d.path: d.rate for layer in dropouts for d in layer if d is not None}
        yield layout._replace(layers=layers, expected=expected_of(block, rates))
