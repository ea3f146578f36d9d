"""Which GPUs are new enough, by what torch says of them."""

import pytest
import torch

from densenet_fast.backends import nvidia


@pytest.fixture(autouse=True)
def gpus(monkeypatch):
    """Three GPUs, of compute capability 7.5, 8.0 and 9.0; the current one is the last."""
    nvidia.obstacle.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(7, 5), (8, 0), (9, 0)][index])
    yield
    nvidia.obstacle.cache_clear()


def test_the_minimum_itself_serves():
    served = [nvidia.serves(torch.device("cuda", i), (8, 0)) for i in range(3)]
    assert served == [False, True, True] and nvidia.serves(torch.device("cuda"), (9, 0))
    assert nvidia.obstacles((8, 0)) == ["cuda:0 has compute capability 7.5, below 8.0", None, None]
    assert nvidia.unavailable((8, 0)) is None and not nvidia.serves(torch.device("cpu"), (1, 0))


def test_without_one_that_serves(monkeypatch):
    assert nvidia.unavailable((10, 0)).count("below 10.0") == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nvidia.unavailable((8, 0)) == "no CUDA device"
