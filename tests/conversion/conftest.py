"""What several tests of the conversion count."""

import pytest

from densenet_fast import ops
from densenet_fast.conversion import fused
from densenet_fast.functional import chain


@pytest.fixture
def fused_calls(monkeypatch):
    """One entry per call of the fused dense block by a converted module: whether it keeps the bottlenecks."""
    calls, op, apply, inside = [], ops.dense_block, fused.apply, []

    def run(*args):
        inside.append(True)
        out = apply(*args)
        inside.pop()
        return out

    monkeypatch.setattr(fused, "apply", run)
    monkeypatch.setattr(ops, "dense_block", lambda *args: (inside and calls.append(any(args[7])), op(*args))[1])
    for name in ("TRANSITION", "HEAD"):  # a block together with what reads it
        both = getattr(chain, name)
        monkeypatch.setattr(chain, name, lambda *args, both=both: (calls.append(any(args[6])), both(*args))[1])
    return calls
