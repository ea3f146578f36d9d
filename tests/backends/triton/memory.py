"""Watches what interpreted kernels read and write: bytes per argument, and that no access leaves its matrix."""

import contextlib
from collections import Counter

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder

from densenet_fast.backends.triton import launch


class Traffic(Counter):
    """Bytes by (kernel, "load" or "store", argument)."""

    def of(self, kernel, kind, argument):
        return self[kernel, kind, argument]


class Span:
    """The elements of one tensor argument: a dense one, or a matrix with rows ``stride`` apart."""

    def __init__(self, name, tensor):
        self.name, self.base, self.size = name, tensor.data_ptr(), tensor.element_size()
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1
        dense = tensor.numel() in (0, extent)
        self.rows, self.columns = (1, tensor.numel()) if dense else tensor.shape
        self.stride = max(1, tensor.numel()) if dense else tensor.stride(0)

    def holds(self, addresses):
        offset, rest = np.divmod(addresses.astype(np.int64) - self.base, self.size)
        row, column = np.divmod(offset, self.stride)
        return (rest == 0) & (offset >= 0) & (row < self.rows) & (column < self.columns)


@contextlib.contextmanager
def watching(monkeypatch):
    """Counts the traffic of the launches in the ``with`` block. Fails at an access outside the arguments' elements."""
    traffic, current = Traffic(), {}
    load, store, run = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store, launch.run

    def watched_run(item):
        named = item.named.items()
        current.update(name=item.name, spans=[Span(n, t) for n, t in named if isinstance(t, torch.Tensor)])
        run(item)

    def count(kind, pointers, mask):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        for span in current["spans"]:
            held = span.holds(addresses)
            traffic[current["name"], kind, span.name] += int(held.sum()) * span.size
            addresses = addresses[~held]
        assert not addresses.size, f"{current['name']}: {addresses.size} elements of a {kind} are in no argument"

    def watched_load(self, pointers, mask, *rest):
        count("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        count("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "run", watched_run)
        patch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
        yield traffic
