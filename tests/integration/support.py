"""What the integration tests share: a small network of ours and torchvision's with the same state."""

from typing import Any

import torch
import torchvision
from torch import nn

import densenet_fast
from helpers import error, randomise, twin

SMALL = dict(growth_rate=4, block_config=(2, 3), num_init_features=6, num_classes=5)


def ours(**options: Any) -> densenet_fast.DenseNet:
    return densenet_fast.DenseNet(**{**SMALL, **options})


def stock(**options: Any) -> nn.Module:
    return torchvision.models.DenseNet(**{**SMALL, **options})


def pair(dtype: torch.dtype = torch.float64, training: bool = True, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Our network, with ``options``, and torchvision's, with the same parameters and running statistics."""
    shape = {name: value for name, value in options.items() if name in SMALL}
    expected = randomise(stock(**shape)).to(dtype).train(training)
    return twin(expected, ours(**options)), expected


def images(*size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*(size or (2, 3, 40, 36)), dtype=dtype)


def assert_close(got: Any, expected: Any, tolerance: float = 1e-9, name: str = "result") -> None:
    """Tensors, or nested dicts, lists and tuples of them, are the same to a relative error of ``tolerance``."""
    if isinstance(expected, dict):
        assert list(got) == list(expected), name
        for key, value in expected.items():
            assert_close(got[key], value, tolerance, f"{name}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), (name, len(got), len(expected))
        for i, value in enumerate(expected):
            assert_close(got[i], value, tolerance, f"{name}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert got.shape == expected.shape, (name, got.shape, expected.shape)
        small = (got.detach().double() - expected.detach().double()).norm() <= tolerance * 1e-3
        assert small or error(got, expected) <= tolerance, (name, error(got, expected))
    else:
        assert got == expected, (name, got, expected)
