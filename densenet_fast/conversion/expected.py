"""The state of a module when it was recognised, and changes since."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from densenet_fast import reference
from densenet_fast.nn import fusion

RECOMPUTATION_FLAGS = ("memory_efficient", "grad_checkpointing", "efficient")
"""Flags of libraries that make the backward pass recompute the bottlenecks."""

STATE = "_densenet_fast"
"""Where a converted module keeps its layout."""
_MODULE_ATTRIBUTES = set(vars(nn.Module())) | {*RECOMPUTATION_FLAGS, STATE}
_NORM_ATTRIBUTES = set(vars(nn.BatchNorm2d(1)))
_UNCHECKED = {nn.Identity, *reference.BATCH_NORMS.values(), *reference.AVERAGE_POOLS.values(), *fusion.SYNC_BATCH_NORMS}


class Expected(NamedTuple):
    """The class, attributes and children of a module when it was recognised. With others its results may differ."""

    kind: type[nn.Module]
    attributes: tuple[tuple[str, Any], ...]
    rate: str | None
    """The attribute that holds a dropout rate. It may change, because every call reads it."""
    size: int | None
    """The number of all attributes; None if they do not matter."""
    children: tuple[tuple[str, "Expected"], ...]


def expected_of(module: nn.Module, rates: Mapping[str, str], path: str = "") -> Expected:
    """The current state of ``module``. ``rates`` gives, by path, the attributes with dropout rates; they may change."""
    rate = rates.get(path)
    if isinstance(module, (_ConvNd, nn.ReLU, nn.modules.dropout._DropoutNd)) or type(module) in _UNCHECKED:
        attributes, size = (), None  # every call reads or checks those that matter
    else:
        ignored = _MODULE_ATTRIBUTES | (_NORM_ATTRIBUTES if isinstance(module, _BatchNorm) else set()) | {rate}
        attributes = tuple((name, value) for name, value in vars(module).items() if name not in ignored)
        size = len(vars(module)) + (not path)  # a converted module keeps its layout too
    children = [
        (name, expected_of(child, rates, f"{path}.{name}" if path else name))
        for name, child in module._modules.items()
        if child is not None
    ]
    return Expected(type(module), attributes, rate, size, tuple(children))


def changed(module: nn.Module, expected: Expected, path: str = "", hooks: bool = True) -> str | None:
    """The first difference between ``module`` and ``expected``, or the first module below it with a hook, or None."""
    for name, value in expected.attributes:
        now = getattr(module, name, None)
        if now is not value and not (type(now) is type(value) and isinstance(now, (int, float, str)) and now == value):
            return f"{path}{name} has changed since the conversion"
    if expected.size not in (None, len(module.__dict__)):
        added = _shadowing(module, {name for name, _ in expected.attributes} | {expected.rate})
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


def _shadowing(module: nn.Module, expected: Collection[str | None]) -> str | None:
    """An attribute of ``module`` that is new and shadows one of its class, or None."""
    ignored = _MODULE_ATTRIBUTES | {"forward"}
    return next((n for n in vars(module) if n not in expected and n not in ignored and hasattr(type(module), n)), None)
