"""How a dense block of any library is built, read from its modules alone, and whether it still is.

Names, classes and import paths do not count. A dense layer is whatever holds one or two pairs of batch normalisation
and convolution; a block is a module of such layers, each of which reads as many channels as its predecessor read and
made. What the modules do not say (a functional ReLU, where the features are concatenated, in which order) is settled by
:mod:`densenet_fast.conversion.probe`.
"""

from collections.abc import Iterator
from itertools import permutations
from typing import Any, NamedTuple, Protocol

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

    kind = "DenseBlock"

    def channels(self, module: nn.Module) -> int:
        """How many channels it reads."""
        return fusion.child(module, self.layers[0].units[0].conv).in_channels


class Layout(Protocol):
    """How a part is built. One that is no :class:`BlockLayout` knows itself what is asked of it in ``PartLayout``."""

    dims: int
    expected: Expected
    classes: Classes
    kind: str
    """What :func:`densenet_fast.explain` calls it."""

    def channels(self, module: nn.Module) -> int:
        """How many channels ``module`` reads."""


class PartLayout(Layout, Protocol):
    """That of a transition, a stem or a head."""

    convolves: bool
    """Whether a convolution makes its result, in autocast's dtype."""
    pools: bool
    """Whether it ends with a pool, which autocast on CPUs runs in float32 for volumes."""

    def obstacle(self, module: nn.Module) -> str | None:
        """Which part of ``module`` has no place in an op, or None."""

    def dropouts(self) -> list[Dropout]:
        """What drops out in it."""

    def gathered(self, module: nn.Module) -> Any:
        """What a call of ``module`` takes: its tensors, modes and rates as they are now."""


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


def rate_now(module: nn.Module, dropout: Dropout | None) -> float:
    """The rate of a dropout in ``module`` now."""
    if dropout is None:
        return 0.0
    holder = at(module, dropout.path)
    return max(float(getattr(holder, dropout.rate)), 0.0) if holder.training else 0.0


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
    refuse_tensors(block, "it")
    layers = tuple(_read_layer(block, path, layer) for path, layer in found.items())
    if len({len(layer.units) for layer in layers}) != 1:
        raise Unlike("some of its layers have a bottleneck and some none")
    if len({type(fusion.child(block, unit.conv)) for layer in layers for unit in layer.units}) != 1:
        raise Unlike("its convolutions differ in dimensions")
    dims = fusion.DIMENSIONS[type(fusion.child(block, layers[0].units[0].conv))]
    return _checked(block, BlockLayout(dims, layers, False, False, expected_of(block, {}), classes_below(block)))


def obstacle(module: nn.Module, layout: Layout) -> str | None:
    """Why ``module``, which was recognised as ``layout``, cannot run as one op now, or None."""
    return replaced(layout) or changed(module, layout.expected) or _unlike(module, layout)


def outdated(module: nn.Module, layout: Layout) -> bool:
    """Whether ``module`` is not what it was when it was recognised as ``layout``, hooks aside."""
    edited = replaced(layout) or changed(module, layout.expected, hooks=False)
    return bool(edited or _unlike(module, layout))


def _unlike(module: nn.Module, layout: Layout) -> str | None:
    """Which normalisation, convolution or pool of ``module`` has no place in an op, or None."""
    if not isinstance(layout, BlockLayout):
        return layout.obstacle(module)
    for layer in layout.layers:
        for unit in layer.units:
            reason = unit_obstacle(module, unit, layout.dims)
            if reason is not None:
                return reason
    return None


def _checked(module: nn.Module, layout: Any) -> Any:
    reason = _unlike(module, layout)
    if reason is not None:
        raise Unlike(reason)
    return layout


def unit_obstacle(module: nn.Module, unit: Unit, dims: int) -> str | None:
    """Why ``unit`` of ``module`` is no batch normalisation and plain convolution, or None."""
    return fusion.convolution_obstacle(module, unit.conv, unit.kernel) or norm_obstacle(module, unit.norm, dims)


def norm_obstacle(module: nn.Module, norm: str, dims: int) -> str | None:
    """Why the child ``norm`` of ``module`` is no batch normalisation, also one that holds its activation, or None."""
    part = fusion.child(module, norm)
    probed = isinstance(part, (reference.BATCH_NORMS[dims], nn.SyncBatchNorm)) or fusion.is_frozen_norm(part)
    return None if probed else fusion.norm_obstacle(module, norm, dims)


def classes_below(module: nn.Module) -> Classes:
    return classes_of(type(part) for part in module.modules())


def replaced(layout: Layout) -> str | None:
    """What was replaced on a class since ``layout`` was read, or None."""
    function = layout.classes.replaced()
    return None if function is None else f"{function} was replaced since the conversion"


def _read_layer(block: nn.Module, path: str, layer: nn.Module) -> Layer:
    leaves = leaves_of(layer, f"{path}.")
    refuse_tensors(layer, path)
    if leaves.others:
        other = fusion.child(block, leaves.others[0])
        raise Unlike(f"{leaves.others[0]} is a {type(other).__name__}, not a part of BN-ReLU-convolutions")
    if len(leaves.dropouts) > len(leaves.convs):
        raise Unlike(f"{path} has {len(leaves.dropouts)} dropout modules and {len(leaves.convs)} convolutions")
    units = units_of(block, leaves, (1, 3) if len(leaves.convs) == 2 else (3,))
    return Layer(path, units, (None,) * len(units))


def units_of(module: nn.Module, leaves: Leaves, kernels: tuple[int, ...]) -> tuple[Unit, ...]:
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
    return leaves_of(fusion.child(block, layer.path), f"{layer.path}.").dropouts


def leaves_of(module: nn.Module, prefix: str) -> Leaves:
    """What ``module`` is made of; ReLU and identity count as nothing."""
    leaves = Leaves([], [], [], [])
    for path, leaf in _walk(module, prefix):
        if isinstance(leaf, _ConvNd):
            leaves.convs.append(path)
        elif is_norm(leaf):
            leaves.norms.append(path)
        elif type(leaf) is nn.Dropout or type(leaf) in CHANNEL_DROPOUTS:
            leaves.dropouts.append(path)
        elif type(leaf) not in (nn.ReLU, nn.Identity):
            leaves.others.append(path)
    return leaves


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, _ConvNd) or is_norm(module):
        raise Unlike(f"{prefix.rstrip('.')} is a {type(module).__name__}, not BN-ReLU-convolutions")
    for name, child in module._modules.items():
        path = prefix + name
        if child is None:
            continue
        if "." in name:
            raise Unlike(f"{path} has a dot in its name")
        if isinstance(child, _ConvNd):
            yield path, child
        elif is_norm(child):  # some hold their activation
            yield path, child
            for inner, leaf in child._modules.items():
                if not isinstance(leaf, (nn.ReLU, nn.Identity)):
                    raise Unlike(f"{path}.{inner} is a {type(leaf).__name__}, not a ReLU")
        elif child._modules or isinstance(child, CONTAINERS):
            refuse_tensors(child, path)
            yield from _walk(child, f"{path}.")
        else:
            yield path, child


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or fusion.is_frozen_norm(module)


def refuse_tensors(module: nn.Module, name: str) -> None:
    own = [key for table in (module._parameters, module._buffers) for key, value in table.items() if value is not None]
    own += [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
    if own:
        raise Unlike(f"{name} has tensors of its own: {', '.join(own)}")
