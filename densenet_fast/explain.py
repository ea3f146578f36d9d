"""Which modules of a model run fused, and why the others do not."""

from dataclasses import dataclass

import torch
from torch import nn

from densenet_fast.backends import select
from densenet_fast.nn import BNReLUConv1x1, DenseBlock, Transition, fusion
from densenet_fast.table import table


@dataclass(frozen=True)
class ModuleReport:
    """What one dense block, transition or BN-ReLU-Conv1x1 does when called."""

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
    """Lists the dense blocks, transitions and BN-ReLU-Conv1x1 modules of ``model``: whether each runs fused on ordinary
    input on its device, by which backend, and why not otherwise.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    report = Report()
    for name, module in model.named_modules():
        if isinstance(module, (DenseBlock, Transition, BNReLUConv1x1)):
            parameter = next(module.parameters(), torch.empty(0))
            example = torch.empty([1] * (module.spatial_dims + 2), dtype=parameter.dtype, device="meta")
            reason = fusion.call_obstacle(example, module.spatial_dims) or module.obstacle() or ""
            backend = "stock torch" if reason else select(parameter.device, parameter.dtype).name
            kind = type(module).__name__
            report.append(ModuleReport(name, kind, not reason, reason, backend, str(parameter.device)))
    return report
