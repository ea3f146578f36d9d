"""What every test runs under."""

import os

import pytest
import torch

from densenet_fast.thirdparty import import_torchvision

DEVICE = os.environ.get("DENSENET_FAST_TEST_DEVICE", "cpu")
"""Where tests make their tensors, if they do not say."""

import_torchvision()
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills uninitialised memory with NaN, so that an element nobody wrote shows; and fixes the seed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
