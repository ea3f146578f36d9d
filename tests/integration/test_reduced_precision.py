"""Inference in 16 bits: no further from float64 than stock, part by part and as a whole."""

import copy
import math

import pytest
import torch
from torch import nn

import densenet_fast
from densenet_fast import reference
from densenet_fast.backends import cpu
from helpers import error

HALVES_MULTIPLIED = cpu.unavailable() is None and "bf16" in cpu.describe()
"""Where instructions multiply bfloat16 the tiles of minimal filtering are rounded to it: within twice stock's error."""


@torch.no_grad()
def errors(dtype: torch.dtype, realistic: bool, seed: int) -> dict[str, tuple[float, float]]:
    """Of each part, on the input that stock hands it, and of the network: ours and stock's."""
    torch.manual_seed(seed)
    stock = reference.DenseNet(16, (2, 2), 32, num_classes=100)
    x = torch.randn(8, 3, 48, 48)
    if realistic:
        for module in stock.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        stock(x)
    ours = densenet_fast.DenseNet(16, (2, 2), 32, num_classes=100)
    ours.load_state_dict(stock.state_dict())
    ours, stock = (model.eval().to(dtype) for model in (ours, stock))
    truth, found, x = copy.deepcopy(stock).double(), {}, x.to(dtype)
    found["network"] = tuple(error(model(x), truth(x.double())) for model in (ours, stock))
    for name, part in stock.features.named_children():
        y = part(x.clone())
        if "block" in name or "transition" in name:
            made = slice(x.shape[1] if "block" in name else 0, None)
            exact = truth.features.get_submodule(name)(x.double())[:, made]
            mine = ours.features.get_submodule(name)(x)
            found[name] = error(mine[:, made], exact), error(y[:, made], exact)
        x = y
    return found


@pytest.mark.parametrize("realistic", [False, True], ids=["initial", "realistic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inference_is_no_less_accurate_than_stock(dtype, realistic):
    """At most a tenth more, as a root mean square over seeds."""
    seeds = [errors(dtype, realistic, seed) for seed in range(4)]
    allowed = 2 if HALVES_MULTIPLIED and dtype == torch.bfloat16 else 1.1
    for name in seeds[0]:
        ours, theirs = (math.hypot(*(found[name][i] for found in seeds)) for i in (0, 1))
        assert ours <= allowed * theirs, (name, ours / theirs)
