"""What a module was when it was recognised, and whether it still is."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from densenet_fast import reference
from densenet_fast.nn import fusion

RECOMPUTATION_FLAGS = ("memory_efficient", "grad_checkpointing", "efficient")
"""Attributes by which libraries ask for a bottleneck to be recomputed in the backward pass."""

STATE = "_densenet_fast"
"""Where a converted module keeps its layout."""
_OWN = set(vars(nn.Module())) | {*RECOMPUTATION_FLAGS, STATE}
_NORM = set(vars(nn.BatchNorm2d(1)))
_STOCK = {nn.Identity, *reference.BATCH_NORMS.values(), *reference.AVERAGE_POOLS.values(), *fusion.SYNC_BATCH_NORMS}


class Expected(NamedTuple):
    """What a module was when it was recognised; another class, child or attribute may compute something else."""

    kind: type[nn.Module]
    attributes: tuple[tuple[str, Any], ...]
    free: str | None
    """The attribute that may change: a rate that is read at every call."""
    size: int | None
    """How many attributes it had, of whatever name; None if they do not count."""
    children: tuple[tuple[str, "Expected"], ...]


def expected_of(module: nn.Module, free: Mapping[str, str], path: str = "") -> Expected:
    """What to hold ``module`` to; of a module below it the attribute that ``free`` names by its path may change."""
    own = free.get(path)
    if isinstance(module, (_ConvNd, nn.ReLU, nn.modules.dropout._DropoutNd)) or type(module) in _STOCK:
        attributes, size = (), None  # what counts of these is read, or checked, at every call
    else:
        ignored = _OWN | (_NORM if isinstance(module, _BatchNorm) else set()) | {own}
        attributes = tuple((name, value) for name, value in vars(module).items() if name not in ignored)
        size = len(vars(module)) + (not path)  # a converted module keeps its layout too
    children = [
        (name, expected_of(child, free, f"{path}.{name}" if path else name))
        for name, child in module._modules.items()
        if child is not None
    ]
    return Expected(type(module), attributes, own, size, tuple(children))


def changed(module: nn.Module, expected: Expected, path: str = "", hooks: bool = True) -> str | None:
    """Which module below ``module`` has a hook, or which has changed since ``expected``, or None."""
    for name, value in expected.attributes:
        now = getattr(module, name, None)
        if now is not value and not (type(now) is type(value) and isinstance(now, (int, float, str)) and now == value):
            return f"{path}{name} has changed since the conversion"
    if expected.size not in (None, len(module.__dict__)):
        added = _hiding(module, {name for name, _ in expected.attributes} | {expected.free})
        if added is not None:
            return f"{path}{added} has changed since the conversion"
    if [name for name, _ in expected.children] != [name for name, m in module._modules.items() if m is not None]:
        return f"the children of {path.rstrip('.') or 'the module'} are {', '.join(module._modules) or 'none'}"
    for name, part in expected.children:
        child = module._modules[name]
        synchronised = type(child) in fusion.SYNC_BATCH_NORMS and part.kind in reference.BATCH_NORMS.values()
        if type(child) is not part.kind and not synchronised:
            return f"{path}{name} is a {type(child).__name__}, not a {part.kind.__name__}"
        if fusion.has_hooks(child) if hooks else "forward" in vars(child):
            return f"{path}{name} has a hook or a forward of its own"
        reason = changed(child, part, f"{path}{name}.", hooks)
        if reason is not None:
            return reason
    return None


def _hiding(module: nn.Module, known: Collection[str | None]) -> str | None:
    """An attribute that ``module`` has got since, in front of one of its class, or None."""
    ignored = _OWN | {"forward"}
    return next((n for n in vars(module) if n not in known and n not in ignored and hasattr(type(module), n)), None)
