"""Which parts of a model run fused, and why the others do not."""

from dataclasses import dataclass

import torch
from torch import nn

from densenet_fast import conversion
from densenet_fast.backends import select
from densenet_fast.conversion import fused
from densenet_fast.models import DenseNet
from densenet_fast.nn import BNReLUConv1x1, DenseBlock, Transition, fusion
from densenet_fast.nn.features import Features
from densenet_fast.table import table

PARTS = (DenseBlock, Transition, BNReLUConv1x1)


@dataclass(frozen=True)
class ModuleReport:
    """What one dense block, transition, BN-ReLU-Conv1x1, stem or head does when called."""

    name: str
    kind: str
    fused: bool
    reason: str
    """Why it does not run fused; empty if it does."""
    backend: str
    """The backend that its parameters' device and dtype select; "stock torch" where it does not run fused."""
    device: str


class Report(list[ModuleReport]):
    """A list of :class:`ModuleReport`, printed as a table."""

    def __str__(self) -> str:
        rows = [(r.name, r.kind, "yes" if r.fused else "no", r.backend, r.device, r.reason) for r in self]
        return table(("module", "kind", "fused", "backend", "device", "reason"), rows)

    __repr__ = __str__


def explain(model: nn.Module) -> Report:
    """Lists the parts of ``model`` that may run fused: whether each does on ordinary input on its device, by which
    backend, and why not otherwise.

    A dense block or transition of another library, or what resembles one, is listed too: converted
    (:func:`densenet_fast.convert`), not converted yet, or left alone, and why.

    The parts are the dense blocks, transitions and BN-ReLU-Conv1x1 modules, a :class:`densenet_fast.DenseNet`'s stem
    (from ``norm0`` to ``pool0``) and its head (``norm5``, and the ReLU and the average behind it).

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report, heads = Report(), Report()
    others = {id(part.module): part for part in conversion.survey(model)}
    for name, module in model.named_modules():
        kind = next((kind for kind in PARTS if isinstance(module, kind)), None)
        if kind is not None:
            report.append(_part(name, kind.__name__, module, module.spatial_dims, module.obstacle()))
        elif id(module) in others:
            report.append(_other(name, others[id(module)]))
        elif isinstance(module, Features) and "norm0" in module._modules:
            report.append(_part(_join(name, "norm0"), "Stem", module, 2, module.stem_obstacle()))
        elif isinstance(module, DenseNet):
            heads.append(_part(_join(name, "features.norm5"), "Head", module, 2, module.head_obstacle()))
    return Report(report + heads)


def _other(name: str, part: conversion.Part) -> ModuleReport:
    """A part of another library's model."""
    if part.layout is None:
        return _row(name, part.kind, part.module, f"left alone: {part.reason}")
    if not part.converted:
        return _row(name, part.kind, part.module, "not converted; densenet_fast.convert(model) converts it")
    return _part(name, part.kind, part.module, part.layout.dims, fused.obstacle(part.module, part.layout))


def _part(name: str, kind: str, module: nn.Module, dims: int, obstacle: str | None) -> ModuleReport:
    dtype = next(module.parameters(), torch.empty(0)).dtype
    example = torch.empty([1] * (dims + 2), dtype=dtype, device="meta")
    return _row(name, kind, module, fusion.call_obstacle(example, dims) or obstacle or "")


def _row(name: str, kind: str, module: nn.Module, reason: str) -> ModuleReport:
    parameter = next(module.parameters(), torch.empty(0))
    backend = "stock torch" if reason else select(parameter.device, parameter.dtype).name
    return ModuleReport(name, kind, not reason, reason, backend, str(parameter.device))


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
