"""How a dense block or a transition of any library is built, read from its modules alone, and whether it still is.

Names, classes and import paths do not count. A dense layer is whatever holds one or two pairs of batch normalisation
and convolution; a block is a module of such layers, each of which reads as many channels as its predecessor read and
made. What the modules do not say (a functional ReLU, where the features are concatenated, in which order) is settled by
:mod:`densenet_fast.conversion.probe`.
"""

from collections.abc import Iterator
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from densenet_fast import reference
from densenet_fast.conversion.classes import Classes, classes_of
from densenet_fast.conversion.expected import Expected, changed, expected_of
from densenet_fast.nn import fusion

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Unlike(Exception):
    """Why a module is not a dense block or transition that can run as one op."""


class Unit(NamedTuple):
    """Paths of a batch normalisation and the convolution behind it, and the convolution's kernel size."""

    norm: str
    conv: str
    kernel: int


class Dropout(NamedTuple):
    """What drops out behind a unit: the path of the module that knows the rate and the mode, its attribute with the
    rate, and whether whole channels are dropped."""

    path: str
    rate: str
    whole_channels: bool


class Layer(NamedTuple):
    """One dense layer: its path in the block, its units, and what drops out behind each of them."""

    path: str
    units: tuple[Unit, ...]
    dropouts: tuple[Dropout | None, ...]


class BlockLayout(NamedTuple):
    dims: int
    layers: tuple[Layer, ...]
    prepend: bool
    """Whether new features stand in front of those that they were made of."""
    new_only: bool
    """Whether the new features are returned alone, without the block's input."""
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
    """All convolutions of ``module``, without transposed ones, in the order in which layers use them: 1x1 first."""
    found = [m for m in module.modules() if isinstance(m, _ConvNd) and not isinstance(m, _ConvTransposeNd)]
    return sorted(found, key=_kernel)


def _kernel(conv: nn.Module) -> int:
    return max(conv.kernel_size)


def at(module: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` below ``module``; itself at the empty path."""
    return fusion.child(module, path) if path else module


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
    dims = fusion.DIMENSIONS[type(fusion.child(block, layers[0].units[0].conv))]
    return _checked(block, BlockLayout(dims, layers, False, False, expected_of(block, {}), _classes(block)))


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
    return _checked(module, TransitionLayout(dims, unit, pool, expected_of(module, {}), _classes(module)))


def obstacle(module: nn.Module, layout: Layout) -> str | None:
    """Why ``module``, which was recognised as ``layout``, cannot run as one op now, or None."""
    return replaced(layout) or changed(module, layout.expected) or _unlike(module, layout)


def outdated(module: nn.Module, layout: Layout) -> bool:
    """Whether ``module`` is not what it was when it was recognised as ``layout``, hooks aside."""
    edited = replaced(layout) or changed(module, layout.expected, hooks=False)
    return bool(edited or _unlike(module, layout))


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
    probed = isinstance(norm, (reference.BATCH_NORMS[dims], nn.SyncBatchNorm)) or fusion.is_frozen_norm(norm)
    if reason is None and not probed:
        reason = fusion.norm_obstacle(module, unit.norm, dims)
    return reason


def _classes(module: nn.Module) -> Classes:
    return classes_of(type(part) for part in module.modules())


def replaced(layout: Layout) -> str | None:
    """What was replaced on a class since ``layout`` was read, or None."""
    function = layout.classes.replaced()
    return None if function is None else f"{function} was replaced since the conversion"


def _read_layer(block: nn.Module, path: str, layer: nn.Module) -> Layer:
    leaves = _leaves(layer, f"{path}.")
    _refuse_tensors(layer, path)
    if leaves.others:
        other = fusion.child(block, leaves.others[0])
        raise Unlike(f"{leaves.others[0]} is a {type(other).__name__}, not a part of BN-ReLU-convolutions")
    if len(leaves.dropouts) > len(leaves.convs):
        raise Unlike(f"{path} has {len(leaves.dropouts)} dropout modules and {len(leaves.convs)} convolutions")
    units = _units(block, leaves, (1, 3) if len(leaves.convs) == 2 else (3,))
    return Layer(path, units, (None,) * len(units))


def _units(module: nn.Module, leaves: Leaves, kernels: tuple[int, ...]) -> tuple[Unit, ...]:
    """Each normalisation with the convolution behind it."""
    if len(leaves.norms) != len(leaves.convs):
        raise Unlike(
            f"expected as many batch normalisations as convolutions, got {', '.join(leaves.norms) or 'none'} and "
            f"{', '.join(leaves.convs)}"
        )
    convs = sorted(leaves.convs, key=lambda path: _kernel(fusion.child(module, path)))
    for conv, kernel in zip(convs, kernels):
        reason = fusion.convolution_obstacle(module, conv, kernel)
        if reason is not None:
            raise Unlike(reason)
    read = [fusion.child(module, conv).in_channels for conv in convs]
    normalised = {path: fusion.normalised_channels(fusion.child(module, path)) for path in leaves.norms}
    orders = permutations(leaves.norms)
    norms = next((order for order in orders if [normalised[path] for path in order] == read), None)
    if norms is None:
        norm, conv, channels = next(
            (norm, conv, n) for norm, conv, n in zip(leaves.norms, convs, read) if normalised[norm] != n
        )
        raise Unlike(f"{norm} normalises {normalised[norm]} channels and {conv} reads {channels}")
    return tuple(Unit(*unit) for unit in zip(norms, convs, kernels))


def dropout_modules(block: nn.Module, layer: Layer) -> list[str]:
    """Paths of the dropout modules of ``layer``, in order of registration."""
    return _leaves(fusion.child(block, layer.path), f"{layer.path}.").dropouts


def _leaves(module: nn.Module, prefix: str) -> Leaves:
    """What ``module`` is made of; ReLU and identity count as nothing."""
    leaves = Leaves([], [], [], [])
    for path, leaf in _walk(module, prefix):
        if isinstance(leaf, _ConvNd):
            leaves.convs.append(path)
        elif _is_norm(leaf):
            leaves.norms.append(path)
        elif type(leaf) is nn.Dropout or type(leaf) in CHANNEL_DROPOUTS:
            leaves.dropouts.append(path)
        elif type(leaf) not in (nn.ReLU, nn.Identity):
            leaves.others.append(path)
    return leaves


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, _ConvNd) or _is_norm(module):
        raise Unlike(f"{prefix.rstrip('.')} is a {type(module).__name__}, not BN-ReLU-convolutions")
    for name, child in module._modules.items():
        path = prefix + name
        if child is None:
            continue
        if "." in name:
            raise Unlike(f"{path} has a dot in its name")
        if isinstance(child, _ConvNd):
            yield path, child
        elif _is_norm(child):  # some hold their activation
            yield path, child
            for inner, leaf in child._modules.items():
                if not isinstance(leaf, (nn.ReLU, nn.Identity)):
                    raise Unlike(f"{path}.{inner} is a {type(leaf).__name__}, not a ReLU")
        elif child._modules or isinstance(child, CONTAINERS):
            _refuse_tensors(child, path)
            yield from _walk(child, f"{path}.")
        else:
            yield path, child


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or fusion.is_frozen_norm(module)


def _refuse_tensors(module: nn.Module, name: str) -> None:
    own = [key for table in (module._parameters, module._buffers) for key, value in table.items() if value is not None]
    own += [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
    if own:
        raise Unlike(f"{name} has tensors of its own: {', '.join(own)}")
