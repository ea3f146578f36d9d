"""``convert``, ``restore`` and what they look for.

Why no module is rebuilt: a dense block of another library is an object that users hold, hook, index, slice, count and
pickle, whose parameters their optimizers hold, whose flags their code sets (timm's ``set_grad_checkpointing`` looks for
``isinstance(layer, DenseLayer)``) and whose layers they may call one by one. Another module in its place would have to
answer all of that. So the object stays, with its children, parameters, buffers and hooks; only its class changes, to a
subclass of its own whose ``forward`` gathers the tensors and runs them as one op
(:mod:`densenet_fast.conversion.fused`). Whenever that would not be the same (a hook on an inner layer, a replaced
child, a changed attribute, tracing), it calls the ``forward`` that the module always had. The layers inside keep their
classes: who calls one alone, or hooks it, gets what the library gives. Nothing is registered, so blocks that loop over
their children find the children they had.

How a block is recognised: by what it holds (:mod:`densenet_fast.conversion.layout`), then by what it computes, run on
random numbers beside the op that would replace it (:mod:`densenet_fast.conversion.probe`). The second step is what
makes the first one safe: a copy of torchvision's block with a residual scale, dropout in front of a normalisation or
layers that read their features in another order has the same modules and is left alone. What the modules leave open
(:mod:`densenet_fast.conversion.candidates`) it decides. What cannot be seen from a run, that a user changes an
attribute later, is checked at every call.

An nn.Sequential that holds converted modules, or children that make a part together (the layers of a block that has no
module of its own, a stem, a head), changes its class too (:mod:`densenet_fast.conversion.sequential`). It runs such
children as one op; their classes stay. Between parts it keeps feature maps channels last in memory, and behind them it
gives them the memory format that stock's would have, so that code that calls ``view`` on the result works as before.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from densenet_fast.conversion import fused, graphs, layout
from densenet_fast.conversion.expected import STATE
from densenet_fast.conversion.layout import Layout
from densenet_fast.conversion.recognition import OURS, Recognised, examine, runs_in_turn, segments
from densenet_fast.conversion.sequential import (
    FusedSequential,
    Segment,
    Stretch,
    follow_each_other,
    segment_obstacle,
    segments_of,
)

__all__ = ["Part", "convert", "restore", "survey"]

LOOKED_FOR = (
    "dense blocks (modules whose children are layers of batch normalisation, ReLU and convolution, 1x1 then 3x3 or 3x3 "
    "alone, each of which reads the block's input and all features made before it; or such layers one after the other "
    "in an nn.Sequential) and transitions (batch normalisation, ReLU, 1x1 convolution, average pooling over 2)"
)
EXTRAS = ("Stem", "Head", "BNReLUConv1x1")
"""What makes no DenseNet by itself."""


class Part(NamedTuple):
    """A dense block, transition, stem or head of a model, converted, convertible, or left alone for a reason."""

    name: str
    kind: str
    module: nn.Module
    layout: Layout | None
    """What it is converted to, or can be; None if it is left alone."""
    reason: str
    """Why it is left alone."""
    names: tuple[str, ...] = ()
    """The children that it consists of, if it is not the whole module: of an nn.Sequential, one behind the other."""

    @property
    def converted(self) -> bool:
        if self.names:
            return fused.is_converted(self.module) and self.names in [s.names for s in segments_of(self.module)]
        return fused.is_converted(self.module) and fused.mixin(self.module) is fused.Fused

    @property
    def first(self) -> nn.Module:
        """Where it stands: the module, or the first of the children."""
        return self.module._modules[self.names[0]] if self.names else self.module

    @property
    def body(self) -> nn.Module:
        """The module, or one of the children alone."""
        return Stretch(self.module, self.names) if self.names else self.module

    @property
    def key(self) -> str:
        """The name under which its calls are noted for the module."""
        return self.names[0] if self.names else ""

    def obstacle(self) -> str | None:
        """Why it, which is converted, cannot run as one op now, or None."""
        if self.names:
            return segment_obstacle(self.module, Segment(self.names, self.layout))
        return layout.obstacle(self.module, self.layout)


def convert(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Makes every dense block and transition of ``model``, and the stem, run as one op, as densenet_fast's own do.

    ``model`` may be of torchvision, timm, MONAI, torchxrayvision, gpleiss/efficient_densenet_pytorch, d2l.ai, or a copy
    of one of these: they are recognised by what they hold and compute, on 1, 2 or 3 spatial dimensions, and
    :func:`densenet_fast.explain` lists what was converted, what was left and why. A graph that torch.fx or torch.export
    made of a model cannot be converted: convert the model before.

    Parameters, buffers, module names, ``state_dict``, hooks, modes, optimizers, copies and pickles of the model are as
    before, and so are its numbers, but for rounding and one correction: with ``memory_efficient`` (torchvision,
    ``efficient`` in gpleiss, ``set_grad_checkpointing`` in timm), which stays in force, running statistics are updated
    once per step instead of twice. Feature maps between converted parts are channels last in memory. Under autocast, a
    block whose input is in another dtype runs as before, but for volumes on CPUs, which stock pools in float32: it
    computes in autocast's dtype and returns its input's.

    A model that was converted before may be converted again: what was edited since is looked at anew.

    Args:
        model: a module that holds dense blocks, or is one.
        inplace: whether to convert ``model`` itself instead of a deep copy.

    Returns:
        ``model``, or its converted copy.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: it has nothing to convert, or lazy modules that have seen no input yet.
    """
    _check_module(model)
    if not inplace:
        model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, (_ConvNd, _BatchNorm)) and any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise ValueError(f"model: expected initialised modules, got {name} that is lazy: call the model once first")
    _revert_edited(model)
    parts = list(survey(model))
    usable = [part for part in parts if part.layout is not None]
    if all(part.kind in EXTRAS for part in usable):
        left = [f"; {part.name or 'the model itself'} was left alone: {part.reason}" for part in parts if part.reason]
        if any(isinstance(module, OURS) for module in model.modules()):
            left.append("; its blocks are densenet_fast's own already")
        raise ValueError(f"model: expected {LOOKED_FOR}, found none in a {type(model).__name__}{''.join(left)}")
    held: dict[nn.Module, list[Segment]] = {}
    for part in usable:
        if part.names:
            held.setdefault(part.module, []).append(Segment(part.names, part.layout))
        elif not part.converted:
            fused.change_class(part.module, fused.Fused, part.layout)
    for module in reversed(list(model.modules())):
        chains = any(isinstance(child, fused.Converted) for child in module._modules.values())
        if (module in held or chains) and type(module).forward is nn.Sequential.forward:
            fused.change_class(module, FusedSequential, (*held[module],) if module in held else None)
    return model


def _revert_edited(model: nn.Module) -> None:
    """Undoes :func:`convert` for the parts of ``model`` that were edited since, and for all Sequentials, whose children
    are looked at anew."""
    for module in model.modules():
        if fused.is_converted(module):
            known = vars(module).get(STATE)
            chains = fused.mixin(module) is FusedSequential
            if chains or (known is not None and layout.outdated(module, known)):
                fused.revert(module)


def restore(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert` in place: every module has the class it had. Returns ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a converted module's class was changed again since (by ``fully_shard``, for one).
    """
    _check_module(model)
    converted = [(name, m) for name, m in model.named_modules() if isinstance(m, fused.Converted)]
    for name, module in converted:
        if not fused.is_converted(module):
            raise ValueError(f"model: expected converted modules, got {name}, whose class was changed again since")
    for _, module in converted:
        fused.revert(module)
    return model


def survey(model: nn.Module) -> Iterator[Part]:
    """The dense blocks and transitions of ``model`` that are not densenet_fast's own, and what resembles one; with them
    stems and heads."""
    parts = [*_survey(model, "", set())]
    some = any(part.layout is not None and part.kind not in EXTRAS for part in parts)
    return (part for part in parts if some or part.layout is None or part.converted)


def _survey(module: nn.Module, name: str, seen: set[int]) -> Iterator[Part]:
    if id(module) in seen or isinstance(module, OURS):
        return
    seen.add(id(module))
    if isinstance(module, torch.fx.GraphModule):
        reason = graphs.taken_apart(module)
        if reason is not None:
            yield Part(name, "Graph", module, None, reason)
        for path, child in graphs.called(module).items():
            yield from _survey(child, _join(name, path), seen)
        return
    whole, pieces = _found(module)
    if whole is not None:
        yield Part(name, whole.kind, module, whole.layout, whole.reason)
        if whole.layout is not None:
            return
    inside = module._modules if whole is None else layout.dense_layers(module) or module._modules
    starts = {piece.names[0]: piece for piece in pieces}
    taken = {child for piece in pieces if piece.layout is not None for child in piece.names}
    for child, submodule in inside.items():
        if child in starts:
            piece = starts[child]
            ends = piece.names[:1] if len(piece.names) == 1 else (piece.names[0], piece.names[-1])
            yield Part(_join(name, "...".join(ends)), piece.kind, module, piece.layout, piece.reason, piece.names)
        if submodule is not None and child not in taken:
            yield from _survey(submodule, _join(name, child), seen)


def _found(module: nn.Module) -> tuple[Recognised | None, list[Recognised]]:
    """What ``module`` is as a whole, or resembles, and what some of its children are together."""
    if fused.is_converted(module):
        if fused.mixin(module) is FusedSequential:
            there = [s for s in segments_of(module) if follow_each_other(module, s.names)]
            known = [Recognised(s.layout.kind, s.layout, "", s.names) for s in there]
            pieces = known + segments(module, {name for piece in known for name in piece.names})
            return None if any(piece.kind == "DenseBlock" for piece in pieces) else examine(module), pieces
        layout = vars(module).get(STATE)
        return (None if layout is None else Recognised(layout.kind, layout, "")), []
    whole = examine(module)
    if (whole is not None and whole.layout is not None) or not runs_in_turn(module):
        return whole, []
    pieces = segments(module)
    return (None if any(piece.kind == "DenseBlock" for piece in pieces) else whole), pieces


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
