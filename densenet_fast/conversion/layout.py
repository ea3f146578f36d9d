"""The layout of a dense block of any library, read from its modules alone; and whether a block still has its layout.

Names, classes and import paths do not matter. A dense layer is a module with one or two pairs of batch normalisation
and convolution. A block is a module of such layers; each reads as many channels as the layer before it reads and makes
together. The modules do not show whether there is a functional ReLU, or where and in which order features are
concatenated. :mod:`densenet_fast.conversion.probe` finds that out.
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


class NotRecognised(Exception):
    """A module is not a part that can run as one op. The message says why."""


class Unit(NamedTuple):
    """The paths of a batch normalisation and of the convolution behind it, and the convolution's kernel size."""

    norm: str
    conv: str
    kernel: int


class Dropout(NamedTuple):
    """Dropout behind a unit."""

    path: str
    """The path of the module that has the rate and the mode."""
    rate: str
    """The name of the module's attribute with the rate."""
    whole_channels: bool
    """Whether whole channels are dropped, as by ``nn.Dropout2d``."""


class Layer(NamedTuple):
    """One dense layer: its path in the block, its units, and the dropout behind each unit."""

    path: str
    units: tuple[Unit, ...]
    dropouts: tuple[Dropout | None, ...]


class BlockLayout(NamedTuple):
    dims: int
    layers: tuple[Layer, ...]
    prepend: bool
    """Whether each layer puts its features before its input: ``torch.cat([new, x], 1)``."""
    new_only: bool
    """Whether the block returns its new features alone, without its input."""
    expected: Expected
    classes: Classes

    kind = "DenseBlock"

    def channels(self, module: nn.Module) -> int:
        """The number of channels that ``module`` reads."""
        return fusion.child(module, self.layers[0].units[0].conv).in_channels


class Layout(Protocol):
    """How a part is built: a :class:`BlockLayout`, or a :class:`PartLayout` for other parts."""

    dims: int
    expected: Expected
    classes: Classes
    kind: str
    """The name of the kind in :func:`densenet_fast.explain`."""

    def channels(self, module: nn.Module) -> int:
        """The number of channels that ``module`` reads."""


class PartLayout(Layout, Protocol):
    """The layout of a transition, a stem or a head."""

    convolves: bool
    """Whether it has a convolution. Under autocast, its result then has autocast's dtype."""
    pools: bool
    """Whether it ends with pooling. Autocast on CPUs pools volumes in float32."""

    def obstacle(self, module: nn.Module) -> str | None:
        """Why the modules inside ``module`` cannot run as one op, or None."""

    def dropouts(self) -> list[Dropout]:
        """Its dropouts."""

    def operands_of(self, module: nn.Module) -> Any:
        """The operands of the op for ``module``: its current tensors, modes and rates."""


class Leaves(NamedTuple):
    """The paths of the modules that a layer or another part consists of, in order of registration."""

    norms: list[str]
    convs: list[str]
    dropouts: list[str]
    others: list[str]


def dense_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The children of ``module`` that may be the layers of a dense block, by path; empty if there are none.

    Such a child has one or two convolutions. It reads as many channels as the child before it reads and makes together.
    The children may also be in a single container that ``module`` loops over.
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
    """All convolutions of ``module`` but transposed ones, in the order of a dense layer: 1x1 first."""
    found = [m for m in module.modules() if isinstance(m, _ConvNd) and not isinstance(m, _ConvTransposeNd)]
    return sorted(found, key=_kernel)


def _kernel(conv: nn.Module) -> int:
    return max(conv.kernel_size)


def module_at(module: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` below ``module``; ``module`` itself for the empty path."""
    return fusion.child(module, path) if path else module


def current_rate(module: nn.Module, dropout: Dropout | None) -> float:
    """The current rate of a dropout in ``module``; 0 in inference or without dropout."""
    if dropout is None:
        return 0.0
    holder = module_at(module, dropout.path)
    return max(float(getattr(holder, dropout.rate)), 0.0) if holder.training else 0.0


def read_block(block: nn.Module) -> BlockLayout:
    """The layout of ``block``, which has dense layers.

    Raises:
        NotRecognised: the block or one of its layers has other modules too, or a layer is not made of
            BN-ReLU-convolutions.
    """
    found = dense_layers(block)
    container, dot, _ = next(iter(found)).rpartition(".")
    holder = fusion.child(block, container) if dot else block
    for name, child in holder._modules.items():
        if child is None or (container + dot + name not in found and type(child) is not nn.Identity):
            raise NotRecognised(f"{container}{dot}{name} is a {type(child).__name__}, not a dense layer")
    refuse_tensors(block, "it")
    layers = tuple(_read_layer(block, path, layer) for path, layer in found.items())
    if len({len(layer.units) for layer in layers}) != 1:
        raise NotRecognised("some of its layers have a bottleneck and some none")
    if len({type(fusion.child(block, unit.conv)) for layer in layers for unit in layer.units}) != 1:
        raise NotRecognised("its convolutions differ in dimensions")
    dims = fusion.DIMENSIONS[type(fusion.child(block, layers[0].units[0].conv))]
    return _checked(block, BlockLayout(dims, layers, False, False, expected_of(block, {}), classes_below(block)))


def obstacle(module: nn.Module, layout: Layout) -> str | None:
    """Why ``module``, recognised as ``layout``, cannot run as one op now, or None."""
    return replaced(layout) or changed(module, layout.expected) or _part_obstacle(module, layout)


def outdated(module: nn.Module, layout: Layout) -> bool:
    """Whether ``module`` has changed since it was recognised as ``layout``, hooks aside."""
    edited = replaced(layout) or changed(module, layout.expected, hooks=False)
    return bool(edited or _part_obstacle(module, layout))


def _part_obstacle(module: nn.Module, layout: Layout) -> str | None:
    """Why a normalisation, convolution or pool of ``module`` does not fit the op, or None."""
    if not isinstance(layout, BlockLayout):
        return layout.obstacle(module)
    for layer in layout.layers:
        for unit in layer.units:
            reason = unit_obstacle(module, unit, layout.dims)
            if reason is not None:
                return reason
    return None


def _checked(module: nn.Module, layout: Any) -> Any:
    reason = _part_obstacle(module, layout)
    if reason is not None:
        raise NotRecognised(reason)
    return layout


def unit_obstacle(module: nn.Module, unit: Unit, dims: int) -> str | None:
    """Why ``unit`` of ``module`` is not a batch normalisation and a plain convolution, or None."""
    return fusion.convolution_obstacle(module, unit.conv, unit.kernel) or norm_obstacle(module, unit.norm, dims)


def norm_obstacle(module: nn.Module, norm: str, dims: int) -> str | None:
    """Why the child ``norm`` of ``module`` is not a batch normalisation, or None.

    Subclasses and frozen normalisations are accepted: :mod:`densenet_fast.conversion.probe` checks their results.
    """
    child = fusion.child(module, norm)
    accepted = isinstance(child, (reference.BATCH_NORMS[dims], nn.SyncBatchNorm)) or fusion.is_frozen_norm(child)
    return None if accepted else fusion.norm_obstacle(module, norm, dims)


def classes_below(module: nn.Module) -> Classes:
    return classes_of(type(part) for part in module.modules())


def replaced(layout: Layout) -> str | None:
    """The reason if a function of a class was replaced since ``layout`` was read, or None."""
    function = layout.classes.replaced()
    return None if function is None else f"{function} was replaced since the conversion"


def _read_layer(block: nn.Module, path: str, layer: nn.Module) -> Layer:
    leaves = leaves_of(layer, f"{path}.")
    refuse_tensors(layer, path)
    if leaves.others:
        other = fusion.child(block, leaves.others[0])
        raise NotRecognised(f"{leaves.others[0]} is a {type(other).__name__}, not a part of BN-ReLU-convolutions")
    if len(leaves.dropouts) > len(leaves.convs):
        raise NotRecognised(f"{path} has {len(leaves.dropouts)} dropout modules and {len(leaves.convs)} convolutions")
    units = units_of(block, leaves, (1, 3) if len(leaves.convs) == 2 else (3,))
    return Layer(path, units, (None,) * len(units))


def units_of(module: nn.Module, leaves: Leaves, kernels: tuple[int, ...]) -> tuple[Unit, ...]:
    """The units that the ``leaves`` of ``module`` make up, with convolutions of these ``kernels``."""
    if len(leaves.norms) != len(leaves.convs):
        raise NotRecognised(
            f"expected as many batch normalisations as convolutions, got {', '.join(leaves.norms) or 'none'} and "
            f"{', '.join(leaves.convs)}"
        )
    convs = sorted(leaves.convs, key=lambda path: _kernel(fusion.child(module, path)))
    for conv, kernel in zip(convs, kernels):
        reason = fusion.convolution_obstacle(module, conv, kernel)
        if reason is not None:
            raise NotRecognised(reason)
    read = [fusion.child(module, conv).in_channels for conv in convs]
    normalised = {path: fusion.normalised_channels(fusion.child(module, path)) for path in leaves.norms}
    orders = permutations(leaves.norms)
    norms = next((order for order in orders if [normalised[path] for path in order] == read), None)
    if norms is None:
        norm, conv, channels = next(
            (norm, conv, n) for norm, conv, n in zip(leaves.norms, convs, read) if normalised[norm] != n
        )
        raise NotRecognised(f"{norm} normalises {normalised[norm]} channels and {conv} reads {channels}")
    return tuple(Unit(*unit) for unit in zip(norms, convs, kernels))


def dropout_modules(block: nn.Module, layer: Layer) -> list[str]:
    """The paths of the dropout modules of ``layer``, in order of registration."""
    return leaves_of(fusion.child(block, layer.path), f"{layer.path}.").dropouts


def leaves_of(module: nn.Module, prefix: str) -> Leaves:
    """The paths of the modules that ``module`` consists of, without ReLU and identity."""
    leaves = Leaves([], [], [], [])
    for path, leaf in _leaf_modules(module, prefix):
        if isinstance(leaf, _ConvNd):
            leaves.convs.append(path)
        elif is_norm(leaf):
            leaves.norms.append(path)
        elif type(leaf) is nn.Dropout or type(leaf) in CHANNEL_DROPOUTS:
            leaves.dropouts.append(path)
        elif type(leaf) not in (nn.ReLU, nn.Identity):
            leaves.others.append(path)
    return leaves


def _leaf_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, _ConvNd) or is_norm(module):
        raise NotRecognised(f"{prefix.rstrip('.')} is a {type(module).__name__}, not BN-ReLU-convolutions")
    for name, child in module._modules.items():
        path = prefix + name
        if child is None:
            continue
        if "." in name:
            raise NotRecognised(f"{path} has a dot in its name")
        if isinstance(child, _ConvNd):
            yield path, child
        elif is_norm(child):  # which may have its activation as a child
            yield path, child
            for inner, leaf in child._modules.items():
                if not isinstance(leaf, (nn.ReLU, nn.Identity)):
                    raise NotRecognised(f"{path}.{inner} is a {type(leaf).__name__}, not a ReLU")
        elif child._modules or isinstance(child, CONTAINERS):
            refuse_tensors(child, path)
            yield from _leaf_modules(child, f"{path}.")
        else:
            yield path, child


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or fusion.is_frozen_norm(module)


def refuse_tensors(module: nn.Module, name: str) -> None:
    keys = [key for table in (module._parameters, module._buffers) for key, value in table.items() if value is not None]
    keys += [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)]
    if keys:
        raise NotRecognised(f"{name} has tensors of its own: {', '.join(keys)}")
