"""How a dense block or a transition of any library is built, read from its modules alone, and whether it still is.

Names, classes and import paths do not count. A dense layer is whatever holds one or two pairs of batch normalisation
and convolution; a block is a module of such layers, each of which reads as many channels as its predecessor read and
made. What the modules do not say (a functional ReLU, where the features are concatenated, in which order) is settled by
:mod:`densenet_fast.conversion.probe`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from densenet_fast import reference
from densenet_fast.conversion.classes import Classes, classes_of
from densenet_fast.nn import fusion

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
DROP_RATES = ("drop_rate", "droprate", "dropout_rate")
"""Attributes in which layers keep the rate of a functional dropout of their new features."""
RECOMPUTATION_FLAGS = ("memory_efficient", "grad_checkpointing", "efficient")
"""Attributes by which libraries ask for a bottleneck to be recomputed in the backward pass."""

STATE = "_densenet_fast"
"""Where a converted module keeps its layout."""
_OWN = set(vars(nn.Module())) | {*RECOMPUTATION_FLAGS, STATE}
_NORM = set(vars(nn.BatchNorm2d(1)))


class Unlike(Exception):
    """Why a module is not a dense block or transition that can run as one op."""


class Expected(NamedTuple):
    """What a module was when it was recognised; another class, child or attribute may compute something else."""

    kind: type[nn.Module]
    attributes: tuple[tuple[str, Any], ...]
    size: int | None
    """How many attributes it had, of whatever name; None if they do not count."""
    children: tuple[tuple[str, "Expected"], ...]


class Unit(NamedTuple):
    """Paths of a batch normalisation and the convolution behind it, and the convolution's kernel size."""

    norm: str
    conv: str
    kernel: int


class Layer(NamedTuple):
    """One dense layer: its path in the block, its units, and the path of its dropout module or the attribute that holds
    its dropout rate, if any."""

    path: str
    units: tuple[Unit, ...]
    dropout: str | None
    drop_rate: str | None


class BlockLayout(NamedTuple):
    dims: int
    layers: tuple[Layer, ...]
    expected: Expected
    classes: Classes


class TransitionLayout(NamedTuple):
    dims: int
    unit: Unit
    pool: str | None
    """Path of its average pool; None if the pooling is functional."""
    expected: Expected
    classes: Classes


Layout = BlockLayout | TransitionLayout


class Leaves(NamedTuple):
    """What a layer or a transition is made of, in order of registration; paths from the module that was read."""

    norms: list[str]
    convs: list[str]
    dropouts: list[str]
    others: list[str]


def dense_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Paths and modules of what may be the layers of a dense block: children with one or two convolutions, each of
    which reads as many channels as its predecessor reads and makes. Empty if there are none.

    The children may stand in one container, which ``module`` then loops over.
    """
    prefix, children = "", module._modules
    if len(children) == 1:
        ((name, only),) = children.items()
        if type(only) in CONTAINERS:
            prefix, children = f"{name}.", only._modules
    layers, channels = {}, None
    if any("." in name for name in children):
        return {}
    for name, layer in children.items():
        convs = convolutions(layer) if layer is not None else []
        if not convs:
            continue
        if len(convs) > 2 or channels not in (None, convs[0].in_channels):
            return {}
        channels = convs[0].in_channels + convs[-1].out_channels
        layers[prefix + name] = layer
    return layers


def convolutions(module: nn.Module) -> list[_ConvNd]:
    """All convolutions of ``module``, without transposed ones."""
    return [m for m in module.modules() if isinstance(m, _ConvNd) and not isinstance(m, _ConvTransposeNd)]


def read_block(block: nn.Module) -> BlockLayout:
    """The layout of ``block``, which has dense layers.

    Raises:
        Unlike: it or one of its layers holds something else too, or no BN-ReLU-convolutions.
    """
    found = dense_layers(block)
    container, dot, _ = next(iter(found)).rpartition(".")
    holder = fusion.child(block, container) if dot else block
    for name, child in holder._modules.items():
        if child is None or (container + dot + name not in found and type(child) is not nn.Identity):
            raise Unlike(f"{container}{dot}{name} is a {type(child).__name__}, not a dense layer")
    _refuse_tensors(block, "it")
    layers = tuple(_read_layer(block, path, layer) for path, layer in found.items())
    if len({len(layer.units) for layer in layers}) != 1:
        raise Unlike("some of its layers have a bottleneck and some none")
    if len({type(fusion.child(block, unit.conv)) for layer in layers for unit in layer.units}) != 1:
        raise Unlike("its convolutions differ in dimensions")
    dropouts = {type(fusion.child(block, layer.dropout)) if layer.dropout else nn.Dropout for layer in layers}
    if len({kind in CHANNEL_DROPOUTS for kind in dropouts}) != 1:
        raise Unlike("some of its layers drop whole channels and some do not")
    dims = fusion.DIMENSIONS[type(fusion.child(block, layers[0].units[0].conv))]
    rates = {layer.path: layer.drop_rate for layer in layers if layer.drop_rate}
    return _checked(block, BlockLayout(dims, layers, _expected(block, "", rates), _classes(block)))


def without_drop_rates(block: nn.Module, layout: BlockLayout) -> BlockLayout:
    """``layout`` for a block whose layers use their drop rates in a way of their own: it holds while they do not
    change."""
    layers = tuple(layer._replace(drop_rate=None) for layer in layout.layers)
    return BlockLayout(layout.dims, layers, _expected(block, "", {}), layout.classes)


def read_transition(module: nn.Module) -> TransitionLayout:
    """The layout of ``module`` as a transition: batch normalisation, ReLU, 1x1 convolution, average over 2.

    Raises:
        Unlike: it is built in another way.
    """
    leaves = _leaves(module, "")
    _refuse_tensors(module, "it")
    if len(leaves.convs) != 1:
        raise Unlike(f"it has {len(leaves.convs)} convolutions")
    (unit,) = _units(module, leaves, (1,))
    if leaves.dropouts or len(leaves.others) > 1:
        raise Unlike(f"{(leaves.dropouts + leaves.others)[-1]} is not a part of BN-ReLU-convolution-pooling")
    pool = leaves.others[0] if leaves.others else None
    dims = fusion.DIMENSIONS[type(fusion.child(module, unit.conv))]
    return _checked(module, TransitionLayout(dims, unit, pool, _expected(module, "", {}), _classes(module)))


def obstacle(module: nn.Module, layout: Layout) -> str | None:
    """Why ``module``, which was recognised as ``layout``, cannot run as one op now, or None."""
    return replaced(layout) or _changed(module, layout.expected, "") or _unlike(module, layout)


def outdated(module: nn.Module, layout: Layout) -> bool:
    """Whether ``module`` is not what it was when it was recognised as ``layout``, hooks aside."""
    changed = replaced(layout) or _changed(module, layout.expected, "", hooks=False)
    return bool(changed or _unlike(module, layout))


def _unlike(module: nn.Module, layout: Layout) -> str | None:
    """Which normalisation, convolution or pool of ``module`` has no place in an op, or None."""
    if isinstance(layout, TransitionLayout):
        reason = _unit_obstacle(module, layout.unit, layout.dims)
        if reason is None and layout.pool is not None:
            reason = fusion.average_pool_obstacle(module, layout.pool, layout.dims)
        return reason
    for layer in layout.layers:
        for unit in layer.units:
            reason = _unit_obstacle(module, unit, layout.dims)
            if reason is not None:
                return reason
    return None


def _checked(module: nn.Module, layout: Any) -> Any:
    reason = _unlike(module, layout)
    if reason is not None:
        raise Unlike(reason)
    return layout


def _unit_obstacle(module: nn.Module, unit: Unit, dims: int) -> str | None:
    norm = fusion.child(module, unit.norm)
    reason = fusion.convolution_obstacle(module, unit.conv, unit.kernel)
    if reason is None and not isinstance(norm, reference.BATCH_NORMS[dims]):
        reason = fusion.norm_obstacle(module, unit.norm, dims)
    return reason


def _classes(module: nn.Module) -> Classes:
    return classes_of(type(part) for part in module.modules())


def replaced(layout: Layout) -> str | None:
    """What was replaced on a class since ``layout`` was read, or None."""
    function = layout.classes.replaced()
    return None if function is None else f"{function} was replaced since the conversion"


def _changed(module: nn.Module, expected: Expected, path: str, hooks: bool = True) -> str | None:
    """Which module below ``module`` has a hook, or which has changed since ``expected``, or None."""
    for name, value in expected.attributes:
        now = getattr(module, name, None)
        if now is not value and not (type(now) is type(value) and isinstance(now, (int, float, str)) and now == value):
            return f"{path}{name} has changed since the conversion"
    if expected.size not in (None, len(module.__dict__)):
        added = _hiding(module, expected)
        if added is not None:
            return f"{path}{added} has changed since the conversion"
    if [name for name, _ in expected.children] != [name for name, m in module._modules.items() if m is not None]:
        return f"the children of {path.rstrip('.') or 'the module'} are {', '.join(module._modules) or 'none'}"
    for name, part in expected.children:
        child = module._modules[name]
        synchronised = type(child) in fusion.SYNC_BATCH_NORMS and part.kind in reference.BATCH_NORMS.values()
        if type(child) is not part.kind and not synchronised:
            return f"{path}{name} is a {type(child).__name__}, not a {part.kind.__name__}"
        if fusion.has_hooks(child) if hooks else "forward" in vars(child):
            return f"{path}{name} has a hook or a forward of its own"
        reason = _changed(child, part, f"{path}{name}.", hooks)
        if reason is not None:
            return reason
    return None


def _hiding(module: nn.Module, expected: Expected) -> str | None:
    """An attribute that ``module`` has got since, in front of one of its class, or None."""
    known = {name for name, _ in expected.attributes} | _OWN | set(DROP_RATES) | {"forward"}
    return next((name for name in vars(module) if name not in known and hasattr(type(module), name)), None)


def _expected(module: nn.Module, path: str, drop_rates: dict[str, str]) -> Expected:
    """What to hold ``module`` to; the attribute of a layer that ``drop_rates`` names by its path may change."""
    if isinstance(module, (_ConvNd, nn.ReLU, nn.modules.dropout._DropoutNd)) or type(module) in _STOCK:
        attributes, size = (), None  # what counts of these is read, or checked, at every call
    else:
        ignored = _OWN | (_NORM if isinstance(module, _BatchNorm) else set()) | {drop_rates.get(path)}
        attributes = tuple((name, value) for name, value in vars(module).items() if name not in ignored)
        size = len(vars(module)) + (not path)  # a converted module keeps its layout too
    children = [
        (name, _expected(child, f"{path}.{name}" if path else name, drop_rates))
        for name, child in module._modules.items()
        if child is not None
    ]
    return Expected(type(module), attributes, size, tuple(children))


_STOCK = {nn.Identity, *reference.BATCH_NORMS.values(), *reference.AVERAGE_POOLS.values(), *fusion.SYNC_BATCH_NORMS}


def _read_layer(block: nn.Module, path: str, layer: nn.Module) -> Layer:
    leaves = _leaves(layer, f"{path}.")
    _refuse_tensors(layer, path)
    if leaves.others:
        other = fusion.child(block, leaves.others[0])
        raise Unlike(f"{leaves.others[0]} is a {type(other).__name__}, not a part of BN-ReLU-convolutions")
    if len(leaves.dropouts) > 1:
        raise Unlike(f"{path} has {len(leaves.dropouts)} dropout modules")
    units = _units(block, leaves, (1, 3) if len(leaves.convs) == 2 else (3,))
    rates = [name for name in DROP_RATES if isinstance(vars(layer).get(name), (int, float))]
    dropout = leaves.dropouts[0] if leaves.dropouts else None
    return Layer(path, units, dropout, rates[0] if rates and dropout is None else None)


def _units(module: nn.Module, leaves: Leaves, kernels: tuple[int, ...]) -> tuple[Unit, ...]:
    """Each normalisation with the convolution behind it."""
    if len(leaves.norms) != len(leaves.convs):
        raise Unlike(
            f"expected as many batch normalisations as convolutions, got {', '.join(leaves.norms) or 'none'} and "
            f"{', '.join(leaves.convs)}"
        )
    for norm, conv, kernel in zip(leaves.norms, leaves.convs, kernels):
        reason = fusion.convolution_obstacle(module, conv, kernel)
        if reason is not None:
            raise Unlike(reason)
        features, channels = fusion.child(module, norm).num_features, fusion.child(module, conv).in_channels
        if features != channels:
            raise Unlike(f"{norm} normalises {features} channels and {conv} reads {channels}")
    return tuple(Unit(*unit) for unit in zip(leaves.norms, leaves.convs, kernels))


def _leaves(module: nn.Module, prefix: str) -> Leaves:
    """What ``module`` is made of; ReLU and identity count as nothing."""
    leaves = Leaves([], [], [], [])
    for path, leaf in _walk(module, prefix):
        if isinstance(leaf, _ConvNd):
            leaves.convs.append(path)
        elif isinstance(leaf, _BatchNorm):
            leaves.norms.append(path)
        elif type(leaf) is nn.Dropout or type(leaf) in CHANNEL_DROPOUTS:
            leaves.dropouts.append(path)
        elif type(leaf) not in (nn.ReLU, nn.Identity):
            leaves.others.append(path)
    return leaves


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, (_ConvNd, _BatchNorm)):
        raise Unlike(f"{prefix.rstrip('.')} is a {type(module).__name__}, not BN-ReLU-convolutions")
    for name, child in module._modules.items():
        path = prefix + name
        if child is None:
            continue
        if "." in name:
            raise Unlike(f"{path} has a dot in its name")
        if type(child) in CONTAINERS or type(child).forward is nn.Sequential.forward:
            _refuse_tensors(child, path)
            yield from _walk(child, f"{path}.")
            continue
        yield path, child
        if isinstance(child, _BatchNorm):  # some hold their activation
            for inner, leaf in child._modules.items():
                if not isinstance(leaf, (nn.ReLU, nn.Identity)):
                    raise Unlike(f"{path}.{inner} is a {type(leaf).__name__}, not a ReLU")


def _refuse_tensors(module: nn.Module, name: str) -> None:
    own = [key for table in (module._parameters, module._buffers) for key, value in table.items() if value is not None]
    own += [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
    if own:
        raise Unlike(f"{name} has tensors of its own: {', '.join(own)}")
