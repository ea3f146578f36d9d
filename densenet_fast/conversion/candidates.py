"""The layouts that a dense block's modules leave open: on which side new features stand, whether the input is returned
with them, and where its layers drop out."""

from collections.abc import Iterator

from torch import nn

from densenet_fast.conversion.expected import expected_of
from densenet_fast.conversion.layout import (
    CHANNEL_DROPOUTS,
    BlockLayout,
    Dropout,
    Layer,
    Unlike,
    at,
    dropout_modules,
    read_block,
)
from densenet_fast.conversion.probe import differs

INFERENCE = (False,)
PLACES = {1: ((True,),), 2: ((False, True), (True, True), (True, False))}
"""Behind which of a layer's units it may drop out, by their number."""


def block_layouts(block: nn.Module) -> Iterator[BlockLayout]:
    """What ``block``, which has dense layers, may be, the most usual first; further ones are looked for if that fails.

    Raises:
        Unlike: it is nothing of the kind.
    """
    plain = read_block(block)
    dropping = _dropping(block, plain)
    first = next(dropping)
    yield first
    form = next((form for form in _forms(plain) if differs(block, form, INFERENCE) is None), None)
    if form is None:
        return
    kind = dict(prepend=form.prepend, new_only=form.new_only)
    if form is not plain:
        yield first._replace(**kind)
    for layout in dropping:
        yield layout._replace(**kind)
    raise Unlike(differs(block, first._replace(**kind)))


def _forms(layout: BlockLayout) -> Iterator[BlockLayout]:
    yield layout
    yield layout._replace(prepend=True)
    if len(layout.layers) > 1:  # else any chain of units is one
        yield layout._replace(new_only=True)
        yield layout._replace(prepend=True, new_only=True)


def _dropping(block: nn.Module, layout: BlockLayout) -> Iterator[BlockLayout]:
    """``layout`` with each place where the dropout may stand that its modules or their attributes tell of."""
    modules = [_modules(block, layer) for layer in layout.layers]
    if any(map(any, modules)):
        yield from _placed(block, layout, modules)
        return
    for whole_channels in (False, True):
        rates = [_rates(block, layer, whole_channels) for layer in layout.layers]
        if any(map(any, rates)):
            yield from _placed(block, layout, rates)
    yield layout  # whatever it does with a rate, it holds while that does not change


def _modules(block: nn.Module, layer: Layer) -> tuple[Dropout | None, ...]:
    """The dropout module that may stand behind each unit of ``layer``."""
    found = [
        Dropout(path, "p", isinstance(at(block, path), CHANNEL_DROPOUTS)) for path in dropout_modules(block, layer)
    ]
    return tuple(found if len(found) > 1 else (found or [None]) * len(layer.units))


def _rates(block: nn.Module, layer: Layer, whole_channels: bool) -> tuple[Dropout | None, ...]:
    """The attribute that may be the rate of a functional dropout behind each unit of ``layer``."""
    found = [_rate(block, layer, unit.conv) for unit in layer.units]
    return tuple(None if rate is None else Dropout(*rate, whole_channels) for rate in found)


def _rate(block: nn.Module, layer: Layer, conv: str) -> tuple[str, str] | None:
    """The path and the attribute of the module around ``conv``, of the layer or of the block, whichever has one first
    that may be a rate."""
    path = conv
    while path:
        path = path.rpartition(".")[0] if len(path) > len(layer.path) else ""
        for name, value in vars(at(block, path)).items():
            if "drop" in name.lower() and type(value) in (int, float) and 0 <= value <= 1:
                return path, name
    return None


def _placed(block: nn.Module, layout: BlockLayout, behind: list[tuple[Dropout | None, ...]]) -> Iterator[BlockLayout]:
    """``layout`` with the dropouts ``behind`` each layer's units, or behind some of them."""
    if len({dropout.whole_channels for layer in behind for dropout in layer if dropout is not None}) > 1:
        raise Unlike("some of its layers drop whole channels and some do not: let all do the same")
    places = PLACES[len(layout.layers[0].units)]
    if any(len(set(layer)) > 1 for layer in behind):
        places = [place for place in places if all(place)]
    for place in places:
        dropouts = [tuple(d if used else None for d, used in zip(layer, place)) for layer in behind]
        layers = tuple(layer._replace(dropouts=d) for layer, d in zip(layout.layers, dropouts))
        free = {d.path: d.rate for layer in dropouts for d in layer if d is not None}
        yield layout._replace(layers=layers, expected=expected_of(block, free))
