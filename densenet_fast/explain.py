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
"""Notes below the table, by the backends of CPUs in it; docs/limits.md has the figures and reasons."""
VOLUME_POOLS = (nn.MaxPool3d, nn.AvgPool3d)
LEFT_OUT = {
    "fused": False,
    "backend": STOCK,
    "reason": "its network did not call it: it leaves it out, or calls its children one by one",
}


@dataclass(frozen=True)
class ModuleReport:
    """One dense block, transition, BN-ReLU-Conv1x1, stem or head: whether it runs fused, and its last call."""

    name: str
    kind: str
    fused: bool
    reason: str
    """Why the part does not run fused; empty if it does."""
    backend: str
    """The backend for the device and dtype of its parameters; "stock torch" if it does not run fused."""
    device: str
    last_call: str
    """How the last call ran.

    "fused", on a GPU followed by "planned", or by "walked: " and why it was not planned; or "stock: " and why it was
    not fused. Empty before the first call, and for compiled calls.
    """


class Report(list[ModuleReport]):
    """A list of :class:`ModuleReport`. It prints as a table, with notes on backends that are slower than stock."""

    def __str__(self) -> str:
        rows = [(r.name, r.kind, "yes" if r.fused else "no", r.backend, r.device, r.last_call, r.reason) for r in self]
        shown = table(("module", "kind", "fused", "backend", "device", "last call", "reason"), rows)
        backends = sorted({r.backend for r in self if r.fused and r.device == "cpu"} & SLOW.keys())
        return "\n".join([shown, *(SLOW[backend] for backend in backends)])

    __repr__ = __str__


def explain(model: nn.Module) -> Report:
    """Lists the parts of ``model`` that may run fused.

    For each part it says whether it runs fused on ordinary input on its device, on which backend, and if not, why. It
    also says how the last call ran.

    The parts are dense blocks, transitions and BN-ReLU-Conv1x1 modules, and of a :class:`densenet_fast.DenseNet` the
    stem (``norm0`` to ``pool0``) and the head (``norm5``, the ReLU and the average behind it). Parts of another library
    are listed as converted (:func:`densenet_fast.convert`) or not converted yet. Modules that only resemble such a part
    are listed as left alone, with the reason. A part that consists of consecutive children of an nn.Sequential has a
    name such as ``stage1.unit1...unit6``.

    A part that was never called does not count as fused if two others were: the network does not use it, or runs its
    children one by one.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report, heads = Report(), Report()
    others: dict[int, list[conversion.Part]] = {}
    for part in conversion.survey(model):
        others.setdefault(id(part.first), []).append(part)
    input_dtypes = _input_dtypes(model, others)
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
        report += [_other(part, input_dtypes.get(id(module))) for part in others.get(id(module), [])]
    report = Report(report + heads)
    called = sum(bool(row.last_call) for row in report)
    return Report(replace(row, **LEFT_OUT) if called > 1 and row.fused and not row.last_call else row for row in report)


def _input_dtypes(model: nn.Module, others: dict[int, list[conversion.Part]]) -> dict[int, torch.dtype]:
    """The input dtypes of other libraries' parts, by the id of their first module.

    Assumes that modules are called in order. Without autocast, the inputs have the dtype of the parameters. Under
    autocast, they have autocast's dtype behind a convolution, and float32 behind a pooling of volumes on CPUs.
    """
    example = _example(model)
    device, dtype = example.device, example.dtype
    lower = None if dtype == torch.float64 else autocast_dtype(device)
    input_dtypes: dict[int, torch.dtype] = {}
    inside: set[int] = set()
    for module in model.modules():
        if id(module) in inside:
            continue
        part = next((part for part in others.get(id(module), []) if part.layout is not None), None)
        convolves, pools_volumes = isinstance(module, _ConvNd), isinstance(module, VOLUME_POOLS)
        if part is not None:
            input_dtypes[id(module)] = dtype
            inside = {id(m) for m in part.body.modules()}
            convolves, pools_volumes = fused.convolves(part.layout), fused.pools_volumes(part.layout)
        if lower is not None and convolves:
            dtype = lower
        if lower is not None and pools_volumes and device.type == "cpu":
            dtype = torch.float32
    return input_dtypes


def _other(part: conversion.Part, input_dtype: torch.dtype | None) -> ModuleReport:
    """The report on a part of another library's model, called with ``input_dtype``."""
    call = calls.last(part.module, part.key)
    if part.layout is None:
        return _row(part.name, part.kind, part.body, f"left alone: {part.reason}", call)
    if not part.converted:
        return _row(part.name, part.kind, part.body, "not converted; densenet_fast.convert(model) converts it", call)
    reason = fused.autocast_obstacle(input_dtype, _example(part.body).device, part.layout) or part.obstacle()
    return _part(part.name, part.kind, part.body, part.layout.dims, reason, call)


def _part(
    name: str, kind: str, module: nn.Module, dims: int, obstacle: str | None, call: calls.Call | None
) -> ModuleReport:
    example = torch.empty([1] * (dims + 2), dtype=_example(module).dtype, device="meta")
    return _row(name, kind, module, fusion.call_obstacle(example, dims) or obstacle or "", call)


def _row(name: str, kind: str, module: nn.Module, reason: str, call: calls.Call | None) -> ModuleReport:
    example = _example(module)
    backend = STOCK if reason else select(example.device, example.dtype).name
    return ModuleReport(name, kind, not reason, reason, backend, str(example.device), _last_call(call, example.device))


def _example(module: nn.Module) -> Tensor:
    """A floating-point parameter of ``module``, or a buffer: a frozen normalisation has no parameters."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((t for t in tensors if t.dtype.is_floating_point), torch.empty(0))


def _last_call(call: calls.Call | None, device: torch.device) -> str:
    """The text of :attr:`ModuleReport.last_call`."""
    if call is None:
        return ""
    if call.reason is not None:
        return f"stock: {call.reason}"
    if device.type != planned.DEVICE or call.outcome is None:
        return "fused"
    return "fused, planned" if call.outcome.walked is None else f"fused, walked: {call.outcome.walked}"


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
