"""What every test runs under."""

import importlib.util
import os
import shutil
import sys

import pytest
import torch

from densenet_fast.backends import extension, triton
from densenet_fast.thirdparty import import_torchvision

DEVICE = os.environ.get("DENSENET_FAST_TEST_DEVICE", "cpu")
"""Where tests make their tensors, if they do not say."""

if DEVICE != "cpu":
    import_torchvision()
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
if triton.interpreted() and importlib.util.find_spec("triton"):
    from backends.triton import interpreter

    interpreter.take()
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

NO_LIBRARY = not extension.LIBRARY.is_file() and shutil.which(os.environ.get("CXX", "c++")) is None
"""Whether the compiled kernels are missing for want of a compiler; missing for another reason they fail tests, but on
a GPU, where a bare checkout can be tested."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "library: needs the compiled kernels")
    if NO_LIBRARY:
        config.addinivalue_line("filterwarnings", "ignore:densenet_fast. slower without its cpu backend")
    if DEVICE != "cpu" and not extension.LIBRARY.is_file():
        config.addinivalue_line("filterwarnings", "ignore:densenet_fast. slower without its (cpu|cuda) backend")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What imports torchvision can do so in its own way once it is imported in ours, which takes two seconds."""
    if isinstance(collector, pytest.Module) and "torchvision" in collector.path.read_text():
        import_torchvision()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NO_LIBRARY and item.get_closest_marker("library"):
            item.add_marker(pytest.mark.skip(reason="no compiled kernels: no C++ compiler was found"))


def use_deterministic_algorithms(mode: bool) -> None:
    """In torch's own way, which imports its compiler for two seconds, if that is imported; else the compiler is not
    told."""
    if "torch._dynamo" in sys.modules:
        torch.use_deterministic_algorithms(mode, warn_only=DEVICE != "cpu")
    else:
        torch._C._set_deterministic_algorithms(mode, warn_only=DEVICE != "cpu")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills uninitialised memory with NaN, so that an element nobody wrote shows; and fixes the seed."""
    torch.manual_seed(0)
    use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    use_deterministic_algorithms(False)
