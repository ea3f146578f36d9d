"""Which parts of a model run fused, and why the others do not."""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from densenet_fast import conversion
from densenet_fast.backends import select
from densenet_fast.conversion import fused
from densenet_fast.models import DenseNet
from densenet_fast.nn import BNReLUConv1x1, DenseBlock, Transition, calls, fusion
from densenet_fast.nn.features import Features
from densenet_fast.ops import planned
from densenet_fast.ops.stage import autocast_dtype
from densenet_fast.table import table

PARTS = (DenseBlock, Transition, BNReLUConv1x1)
STOCK = "stock torch"
SLOW = {
    "aten": "On CPUs this dtype runs on plain torch operations: in less memory than stock, but slower.",
    "cpu": "Slower than stock, on any device: second derivatives.",
}
"""What is said below a table of the backends that serve CPUs; docs/limits.md has the figures and reasons."""
VOLUME_POOLS = (nn.MaxPool3d, nn.AvgPool3d)
LEFT_OUT = {
    "fused": False,
    "backend": STOCK,
    "reason": "its network did not call it: it leaves it out, or calls its children one by one",
}


@dataclass(frozen=True)
class ModuleReport:
    """What one dense block, transition, BN-ReLU-Conv1x1, stem or head does when called, and did."""

    name: str
    kind: str
    fused: bool
    reason: str
    """Why it does not run fused; empty if it does."""
    backend: str
    """The backend that its parameters' device and dtype select; "stock torch" where it does not run fused."""
    device: str
    last_call: str
    """"fused", on a GPU with "planned" or "walked: " and why not planned; "stock: " and why; empty if it was not called
    yet, or compiled."""


class Report(list[ModuleReport]):
    """A list of :class:`ModuleReport`, printed as a table, and below it what is slower than stock there."""

    def __str__(self) -> str:
        rows = [(r.name, r.kind, "yes" if r.fused else "no", r.backend, r.device, r.last_call, r.reason) for r in self]
        shown = table(("module", "kind", "fused", "backend", "device", "last call", "reason"), rows)
        backends = sorted({r.backend for r in self if r.fused and r.device == "cpu"} & SLOW.keys())
        return "\n".join([shown, *(SLOW[backend] for backend in backends)])

    __repr__ = __str__


def explain(model: nn.Module) -> Report:
    """Lists the parts of ``model`` that may run fused: whether each does on ordinary input on its device, by which
    backend, and why not otherwise; and what its last call did.

    The parts are the dense blocks, transitions and BN-ReLU-Conv1x1 modules, a :class:`densenet_fast.DenseNet`'s stem
    (from ``norm0`` to ``pool0``) and its head (``norm5``, and the ReLU and the average behind it). Those of another
    library, or what resembles one, are listed too: converted (:func:`densenet_fast.convert`), not converted yet, or
    left alone, and why. What children of an nn.Sequential are together has a name such as ``stage1.unit1...unit6``.

    A part that was never called, though two others were, does not count as fused: its network leaves it out, or runs
    its children one by one.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report, heads = Report(), Report()
    others: dict[int, list[conversion.Part]] = {}
    for part in conversion.survey(model):
        others.setdefault(id(part.first), []).append(part)
    given = _dtypes_given(model, others)
    for name, module in model.named_modules():
        kind = next((kind for kind in PARTS if isinstance(module, kind)), None)
        if kind is not None:
            call = calls.last(module)
            report.append(_part(name, kind.__name__, module, module.spatial_dims, module.obstacle(), call))
        elif isinstance(module, Features) and "norm0" in module._modules:
            call = calls.last(module, "Stem")
            report.append(_part(_join(name, "norm0"), "Stem", module, 2, module.stem_obstacle(), call))
        elif isinstance(module, DenseNet):
            call = calls.last(module, "Head")
            heads.append(_part(_join(name, "features.norm5"), "Head", module, 2, module.head_obstacle(), call))
        report += [_other(part, given.get(id(module))) for part in others.get(id(module), [])]
    report = Report(report + heads)
    called = sum(bool(row.last_call) for row in report)
    return Report(replace(row, **LEFT_OUT) if called > 1 and row.fused and not row.last_call else row for row in report)


def _dtypes_given(model: nn.Module, others: dict[int, list[conversion.Part]]) -> dict[int, torch.dtype]:
    """The dtypes in which other libraries' parts are called, by where they stand, if modules are called in order: those
    of their parameters, but under autocast its own behind a convolution, and float32 behind a pooling of volumes on
    CPUs."""
    like = _example(model)
    device, dtype = like.device, like.dtype
    lower = None if dtype == torch.float64 else autocast_dtype(device)
    given: dict[int, torch.dtype] = {}
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        part = next((part for part in others.get(id(module), []) if part.layout is not None), None)
        convolves, pools_volumes = isinstance(module, _ConvNd), isinstance(module, VOLUME_POOLS)
        if part is not None:
            given[id(module)] = dtype
            inside = {id(m) for m in part.body.modules()}
            convolves, pools_volumes = fused.convolves(part.layout), fused.pools_volumes(part.layout)
        if lower is not None and convolves:
            dtype = lower
        if lower is not None and pools_volumes and device.type == "cpu":
            dtype = torch.float32
    return given


def _other(part: conversion.Part, given: torch.dtype | None) -> ModuleReport:
    """A part of another library's model, called in the dtype ``given``."""
    call = calls.last(part.module, part.key)
    if part.layout is None:
        return _row(part.name, part.kind, part.body, f"left alone: {part.reason}", call)
    if not part.converted:
        return _row(part.name, part.kind, part.body, "not converted; densenet_fast.convert(model) converts it", call)
    reason = fused.autocast_obstacle(given, _example(part.body).device, part.layout) or part.obstacle()
    return _part(part.name, part.kind, part.body, part.layout.dims, reason, call)


def _part(
    name: str, kind: str, module: nn.Module, dims: int, obstacle: str | None, call: calls.Call | None
) -> ModuleReport:
    example = torch.empty([1] * (dims + 2), dtype=_example(module).dtype, device="meta")
    return _row(name, kind, module, fusion.call_obstacle(example, dims) or obstacle or "", call)


def _row(name: str, kind: str, module: nn.Module, reason: str, call: calls.Call | None) -> ModuleReport:
    like = _example(module)
    backend = STOCK if reason else select(like.device, like.dtype).name
    return ModuleReport(name, kind, not reason, reason, backend, str(like.device), _told(call, like.device))


def _example(module: nn.Module) -> Tensor:
    """One of the module's floating tensors; a frozen normalisation has buffers alone."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t for t in tensors if t.dtype.is_floating_point), torch.empty(0))


def _told(call: calls.Call | None, device: torch.device) -> str:
    """What the last call was."""
    if call is None:
        return ""
    if call.reason is not None:
        return f"stock: {call.reason}"
    if device.type != planned.DEVICE or call.outcome is None:
        return "fused"
    return "fused, planned" if call.outcome.walked is None else f"fused, walked: {call.outcome.walked}"


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
