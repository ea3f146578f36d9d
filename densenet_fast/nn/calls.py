"""Records what the last call of a part did, for :func:`densenet_fast.explain`."""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from densenet_fast.operands import Operands, Outcome


class Call(NamedTuple):
    """One call of a part."""

    reason: str | None
    """Why the part ran on stock layers; None if it ran fused."""
    outcome: Outcome | None
    """Whether its op had a launch plan; None if it ran on stock layers."""


_last: WeakKeyDictionary[nn.Module, dict[str, Call]] = WeakKeyDictionary()


def note(module: nn.Module, reason: str | None, operands: Operands | None, part: str = "") -> None:
    """Records that ``module``, or the ``part`` of it, ran fused with ``operands`` or, for a ``reason``, on stock
    layers."""
    if not torch.compiler.is_compiling():
        _last.setdefault(module, {})[part] = Call(reason, None if operands is None else operands.outcome)


def last(module: nn.Module, part: str = "") -> Call | None:
    """The last call, or None if there was none."""
    return _last.get(module, {}).get(part)
