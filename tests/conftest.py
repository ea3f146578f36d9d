"""What every test runs under."""

import os

import pytest
import torch

from densenet_fast.thirdparty import import_torchvision

import_torchvision()
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills uninitialised memory with NaN, so that an element nobody wrote shows; and fixes the seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
