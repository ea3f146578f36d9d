"""What the integration tests run under."""

import pytest
import torch

from densenet_fast.thirdparty import import_torchvision

import_torchvision()


@pytest.fixture
def gpu() -> None:
    """Skips where there is none; and lets cuBLAS choose its algorithms, which it else refuses to."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.use_deterministic_algorithms(False)
