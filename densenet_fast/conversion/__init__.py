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
makes the first one safe: a copy of torchvision's block with a residual scale, another order of concatenation or dropout
in another place has the same modules and is left alone. What cannot be seen from a run, that a user changes an
attribute later, is checked at every call.

An nn.Sequential that holds converted modules changes its class too: between a block and a transition it keeps feature
maps channels last in memory, and behind them gives them the memory format that the first one's input had, so that code
that calls ``view`` on the result works as before.
"""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from densenet_fast.conversion import fused, layout
from densenet_fast.conversion.candidates import block_layouts
from densenet_fast.conversion.expected import STATE
from densenet_fast.conversion.layout import BlockLayout, Layout, TransitionLayout, Unlike
from densenet_fast.conversion.probe import differs
from densenet_fast.nn import BNReLUConv1x1, DenseBlock, Transition

__all__ = ["Part", "convert", "restore", "survey"]

OURS = (DenseBlock, Transition, BNReLUConv1x1)
LOOKED_FOR = (
    "dense blocks (modules whose children are layers of batch normalisation, ReLU and convolution, 1x1 then 3x3 or 3x3 "
    "alone, each of which reads the block's input and all features made before it) and transitions (batch "
    "normalisation, ReLU, 1x1 convolution, average pooling over 2)"
)


class Part(NamedTuple):
    """A dense block or transition of a model, converted, convertible, or left alone for a reason."""

    name: str
    kind: str
    module: nn.Module
    layout: Layout | None
    """What it is converted to, or can be; None if it is left alone."""
    reason: str
    """Why it is left alone."""

    @property
    def converted(self) -> bool:
        return fused.is_converted(self.module)


def convert(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Makes every dense block and transition of ``model`` run as one op, as densenet_fast's own do.

    ``model`` may be of torchvision, timm, MONAI, torchxrayvision, gpleiss/efficient_densenet_pytorch, d2l.ai, or a copy
    of one of these: they are recognised by what they hold and compute, on 1, 2 or 3 spatial dimensions, and
    :func:`densenet_fast.explain` lists what was converted, what was left and why.

    Parameters, buffers, module names, ``state_dict``, hooks, modes, optimizers, copies and pickles of the model are as
    before, and so are its numbers, but for rounding and one correction: with ``memory_efficient`` (torchvision,
    ``efficient`` in gpleiss, ``set_grad_checkpointing`` in timm), which stays in force, running statistics are updated
    once per step instead of twice. Feature maps between converted parts are channels last in memory. Under autocast, a
    block whose input is in another dtype runs as before.

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
    if not usable:
        left = "".join(f"; {part.name or 'the model itself'} was left alone: {part.reason}" for part in parts)
        ours = any(isinstance(module, OURS) for module in model.modules())
        left += "; its blocks are densenet_fast's own already" if ours else ""
        raise ValueError(f"model: expected {LOOKED_FOR}, found none in a {type(model).__name__}{left}")
    for part in usable:
        if not part.converted:
            fused.change_class(part.module, fused.Fused, part.layout)
    for module in list(model.modules()):
        if _holds_fused(module) and type(module).forward is nn.Sequential.forward:
            fused.change_class(module, fused.FusedSequential)
    return model


def _revert_edited(model: nn.Module) -> None:
    """Undoes :func:`convert` for the parts of ``model`` that were edited since, and for what holds no other part."""
    for module in model.modules():
        known = vars(module).get(STATE) if fused.is_converted(module) else None
        if known is not None and layout.outdated(module, known):
            fused.revert(module)
    for module in model.modules():
        if fused.is_converted(module) and fused.mixin(module) is fused.FusedSequential and not _holds_fused(module):
            fused.revert(module)


def _holds_fused(module: nn.Module) -> bool:
    return any(isinstance(child, fused.Fused) for child in module._modules.values())


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
    """The dense blocks and transitions of ``model`` that are not densenet_fast's own, and what resembles one."""
    yield from _survey(model, "", set())


def _survey(module: nn.Module, name: str, seen: set[int]) -> Iterator[Part]:
    if id(module) in seen or isinstance(module, OURS):
        return
    seen.add(id(module))
    part = _examine(module, name)
    inside = module._modules
    if part is not None:
        yield part
        if part.layout is not None:
            return
        inside = layout.dense_layers(module) or inside
    for child, submodule in inside.items():
        if submodule is not None:
            yield from _survey(submodule, f"{name}.{child}" if name else child, seen)


def _examine(module: nn.Module, name: str) -> Part | None:
    known = module.__dict__.get(STATE) if fused.is_converted(module) else None
    if known is not None:
        return Part(name, "DenseBlock" if isinstance(known, BlockLayout) else "Transition", module, known, "")
    layers = layout.dense_layers(module)
    if layers:
        found, reason = _recognise(module, block_layouts)
        if found is not None or len(layers) > 1:
            return Part(name, "DenseBlock", module, found, reason)
    found, reason = _recognise(module, _transition_layouts)
    if found is not None or _resembles_transition(module):
        return Part(name, "Transition", module, found, reason)
    return None


def _recognise(module: nn.Module, layouts: Callable[[nn.Module], Iterator[Layout]]) -> tuple[Layout | None, str]:
    """The first of ``layouts(module)`` that says what the module computes; or None and why there is none."""
    if "forward" in vars(module):
        return None, "it has a forward of its own"
    reason = ""
    try:
        for candidate in layouts(module):
            if type(module).forward is nn.Module.forward:
                return None, (
                    f"a {type(module).__name__} has no forward: its layers are called one by one, as in a graph that "
                    "torch.fx made; extract one with the blocks as leaf modules, or use hooks"
                )
            difference = differs(module, candidate)
            if difference is None:
                return candidate, ""
            reason = reason or difference
    except Unlike as error:
        reason = str(error)
    return None, reason


def _transition_layouts(module: nn.Module) -> Iterator[TransitionLayout]:
    yield layout.read_transition(module)


def _resembles_transition(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation, perhaps an activation, a 1x1 convolution and a pool, of any kind."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    convs = layout.convolutions(module)
    if not 3 <= len(children) <= 4 or len(convs) != 1 or set(convs[0].kernel_size) != {1}:
        return False
    (first, norm), (last, pool) = children[0], children[-1]
    return "norm" in f"{first}{type(norm).__name__}".lower() and "pool" in f"{last}{type(pool).__name__}".lower()


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
