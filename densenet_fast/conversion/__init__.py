"""``convert`` and ``restore``, and the search for the parts that they convert.

Why no module is replaced by another: users hold the modules of a model. They hook, index, slice and pickle them, pass
their parameters to optimizers, set their flags (timm's ``set_grad_checkpointing`` looks for
``isinstance(layer, DenseLayer)``) and call their layers one by one. A new module would have to support all of that. So
the module stays, with its children, parameters, buffers and hooks, and only its class changes. The new class is a
subclass of the original one; its ``forward`` collects the tensors and runs them as one op
(:mod:`densenet_fast.conversion.fused`). Where one op would not give the same result (a hook on an inner layer, a
replaced child, a changed attribute, tracing), it calls the original ``forward``. The layers inside keep their classes,
so calling or hooking a layer works as before. No submodule is added, so blocks that loop over their children find the
same children.

How a block is recognised: first by its modules (:mod:`densenet_fast.conversion.layout`), then by its results. The
module and the op run on the same random input, and both results must agree (:mod:`densenet_fast.conversion.probe`). The
second step makes the first one safe. For example, a copy of torchvision's block with a residual scale has the same
modules, but computes something else, and is left alone. So is a block with dropout in front of a normalisation, or one
whose layers read their features in another order. Where the modules allow several answers
(:mod:`densenet_fast.conversion.candidates`), the results decide. A user may also change an attribute later, so every
call checks for that.

An nn.Sequential changes its class too if it holds converted modules, or if some of its children make up a part
together: a stem, a head, or the layers of a block without a module around them
(:mod:`densenet_fast.conversion.sequential`). It runs such children as one op; their classes stay. Between parts,
feature maps are channels last in memory. Behind the last part they get the memory format of the stock result, so that
code that calls ``view`` on them works as before.
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
from densenet_fast.conversion.recognition import FUSED_MODULES, Recognised, examine, runs_in_turn, segments
from densenet_fast.conversion.sequential import (
    FusedSequential,
    Segment,
    SequentialSlice,
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
"""Parts that other networks have too: a model with nothing else is not converted."""


class Part(NamedTuple):
    """A dense block, transition, stem or head of a model, converted, convertible, or left alone for a reason."""

    name: str
    kind: str
    module: nn.Module
    layout: Layout | None
    """How it is built, if it is converted or can be; None if it is left alone."""
    reason: str
    """Why it is left alone."""
    names: tuple[str, ...] = ()
    """The consecutive children of the nn.Sequential ``module`` that make up the part; empty if all of it does."""

    @property
    def converted(self) -> bool:
        if self.names:
            return fused.is_converted(self.module) and self.names in [s.names for s in segments_of(self.module)]
        return fused.is_converted(self.module) and fused.mixin(self.module) is fused.Fused

    @property
    def first(self) -> nn.Module:
        """The first of its children, or the module itself."""
        return self.module._modules[self.names[0]] if self.names else self.module

    @property
    def body(self) -> nn.Module:
        """The module, or an nn.Sequential of its children."""
        return SequentialSlice(self.module, self.names) if self.names else self.module

    @property
    def key(self) -> str:
        """The name under which :mod:`densenet_fast.nn.calls` records its calls."""
        return self.names[0] if self.names else ""

    def obstacle(self) -> str | None:
        """Why this converted part cannot run as one op now, or None."""
        if self.names:
            return segment_obstacle(self.module, Segment(self.names, self.layout))
        return layout.obstacle(self.module, self.layout)


def convert(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Converts a DenseNet of another library: each dense block, each transition and the stem then run as one op.

    ``model`` may come from torchvision, timm, MONAI, torchxrayvision, gpleiss/efficient_densenet_pytorch or d2l.ai, or
    be a copy of one of these, with 1, 2 or 3 spatial dimensions. Its parts are recognised by their modules and by their
    results. :func:`densenet_fast.explain` lists the parts that were converted, the parts that were left alone, and why.
    A graph that torch.fx or torch.export made of a model cannot be converted: convert the model before.

    The parameters, buffers, module names, ``state_dict``, hooks, modes, optimizers, copies and pickles of the model
    stay as they are. Its results stay the same up to rounding, with one correction: recomputation in the backward pass
    (``memory_efficient`` in torchvision, ``efficient`` in gpleiss, ``set_grad_checkpointing`` in timm) stays in force,
    but running statistics are then updated once per step instead of twice. Feature maps between converted parts are
    channels last in memory. Under autocast, a block whose input is not in autocast's dtype runs its original forward.
    Volumes on CPUs are the exception, because stock pools them in float32: the block then computes in autocast's dtype
    and returns the dtype of its input.

    A converted model may be converted again: parts that were edited since are examined again.

    Args:
        model: a dense block, or a module with dense blocks.
        inplace: whether to convert ``model`` itself or a deep copy.

    Returns:
        ``model``, or its converted copy.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has nothing to convert, or lazy modules that have seen no input yet.
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
        if any(isinstance(module, FUSED_MODULES) for module in model.modules()):
            left.append("; its blocks are densenet_fast's own already")
        raise ValueError(f"model: expected {LOOKED_FOR}, found none in a {type(model).__name__}{''.join(left)}")
    segments_in: dict[nn.Module, list[Segment]] = {}
    for part in usable:
        if part.names:
            segments_in.setdefault(part.module, []).append(Segment(part.names, part.layout))
        elif not part.converted:
            fused.change_class(part.module, fused.Fused, part.layout)
    for module in reversed(list(model.modules())):
        has_converted = any(isinstance(child, fused.Converted) for child in module._modules.values())
        if (module in segments_in or has_converted) and type(module).forward is nn.Sequential.forward:
            fused.change_class(module, FusedSequential, (*segments_in[module],) if module in segments_in else None)
    return model


def _revert_edited(model: nn.Module) -> None:
    """Undoes :func:`convert` for the parts of ``model`` that were edited since.

    Reverts every nn.Sequential too, so that its children are examined again.
    """
    for module in model.modules():
        if fused.is_converted(module):
            recognised = vars(module).get(STATE)
            is_sequential = fused.mixin(module) is FusedSequential
            if is_sequential or (recognised is not None and layout.outdated(module, recognised)):
                fused.revert(module)


def restore(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert` in place: every module gets its original class back. Returns ``model``.

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
    """The dense blocks, transitions, stems and heads in ``model``, and modules that resemble one.

    Modules of densenet_fast are not among them. Stems and heads that could be converted count only in a model that also
    has a dense block or transition.
    """
    parts = [*_survey(model, "", set())]
    is_densenet = any(part.layout is not None and part.kind not in EXTRAS for part in parts)
    return (part for part in parts if is_densenet or part.layout is None or part.converted)


def _survey(module: nn.Module, name: str, seen: set[int]) -> Iterator[Part]:
    if id(module) in seen or isinstance(module, FUSED_MODULES):
        return
    seen.add(id(module))
    if isinstance(module, torch.fx.GraphModule):
        reason = graphs.graph_obstacle(module)
        if reason is not None:
            yield Part(name, "Graph", module, None, reason)
        for path, child in graphs.called_modules(module).items():
            yield from _survey(child, _join(name, path), seen)
        return
    whole, pieces = _examine(module)
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


def _examine(module: nn.Module) -> tuple[Recognised | None, list[Recognised]]:
    """The part that ``module`` is or resembles as a whole, and the parts that some of its children make up."""
    if fused.is_converted(module):
        if fused.mixin(module) is FusedSequential:
            intact = [s for s in segments_of(module) if follow_each_other(module, s.names)]
            already_found = [Recognised(s.layout.kind, s.layout, "", s.names) for s in intact]
            pieces = already_found + segments(module, {name for piece in already_found for name in piece.names})
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
