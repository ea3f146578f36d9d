"""A training step asks the device for no value and copies nothing to it that the host waits for, synchronised over
processes too."""

import pytest
import torch
import torch.distributed as dist
from integration.support import images, ours
from torch.testing._internal.distributed.fake_pg import FakeStore

import densenet_fast
from densenet_fast import backends
from densenet_fast.backends import aten
from densenet_fast.functional import shared

WAITING = ("new_tensor", "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
"""Methods of a tensor with which the host waits for a GPU."""


@pytest.fixture(params=[False, True], ids=["one process", "of two processes"])
def model(request):
    """A network; the second has a peer that never answers, so its numbers mean nothing."""
    model = ours(memory_efficient=True, drop_rate=0.2).float()
    if not request.param:
        yield model
        return
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield densenet_fast.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    dist.destroy_process_group()


def step(model, device):
    x = images(dtype=torch.float32).to(device).requires_grad_()
    return lambda: model(x).square().sum().backward()


def test_no_method_that_waits_is_called(model, monkeypatch):
    """Nor by the backend that serves any device."""
    monkeypatch.setattr(backends, "BACKENDS", (aten,))
    monkeypatch.setattr(shared, "beyond_range", lambda *_: False)  # which asks CPUs alone
    training_step = step(model, "cpu")
    calls = []
    with monkeypatch.context() as patch:
        for name in WAITING:
            method = getattr(torch.Tensor, name)
            patch.setattr(
                torch.Tensor, name, lambda *given, name=name, method=method: calls.append(name) or method(*given)
            )
        training_step()
    assert calls == []
    assert all(row.fused for row in densenet_fast.explain(model))


@pytest.mark.usefixtures("gpu")
def test_the_host_does_not_wait_for_a_gpu(model):
    training_step = step(model.cuda(), "cuda")
    training_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
