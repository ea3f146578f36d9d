"""A converted model under autocast and in half precision: dtypes, accuracy and errors are stock's."""

import copy

import pytest
import torch

import densenet_fast
from conversion import twins
from conversion.libraries import monai
from conversion.small_torchvision import small
from helpers import error, randomise


@pytest.mark.parametrize("make, shape", [(small, (8, 3, 64, 64)), (lambda: twins.XrayNet(), (8, 1, 64, 64))])
def test_autocast_keeps_dtypes_and_accuracy(make, shape, fused_calls):
    stock = randomise(make())
    model, exact = densenet_fast.convert(stock, inplace=False), copy.deepcopy(stock).double()
    x, outputs = torch.randn(shape), []
    for net in (model, stock):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(net.features(x))
    assert len(fused_calls) == 3 and outputs[0].dtype == outputs[1].dtype == torch.bfloat16
    truth = exact.features(x.double())
    assert error(outputs[0], truth) <= 2 * error(outputs[1], truth)


def test_autocast_of_what_stock_keeps_in_float32(fused_calls):
    block = twins.XrayBlock(2, 12, 8, 0.0)
    x, expected = torch.randn(2, 12, 7, 7), copy.deepcopy(block)
    densenet_fast.convert(block)
    with torch.autocast("cpu", torch.bfloat16):
        got, stock = block(x), expected(x)
    assert not fused_calls and got.dtype == stock.dtype == torch.float32 and got.equal(stock)


@pytest.mark.skipif(monai is None, reason="monai is not installed (the Makefile installs it)")
def test_autocast_of_volumes(fused_calls):
    """Stock pools them in float32, and every part returns that."""
    stock = randomise(monai.DenseNet(3, 1, 5, 16, 8, (2, 2)))
    model = densenet_fast.convert(stock, inplace=False)
    exact = copy.deepcopy(stock).double()
    x = torch.randn(2, 1, 32, 32, 32)
    given = {"": x, "denseblock1": torch.randn(2, 16, 8, 8, 8), "transition1": torch.randn(2, 32, 8, 8, 8)}
    for name, x in given.items():
        results = []
        for net in (model, stock, exact):
            part = net.features.get_submodule(name)
            with torch.autocast("cpu", torch.bfloat16, enabled=net is not exact):
                made = part(x.double() if net is exact else x)
            grad = torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(made.dtype)
            results.append((made, *torch.autograd.grad(made, list(part.parameters()), grad)))
        for got, expected, *_ in zip(*results):
            assert got.dtype == expected.dtype == torch.float32
        assert error(results[0][0], results[2][0]) <= 2 * error(results[1][0], results[2][0])
        gradients = [torch.cat([g.double().flatten() for g in result[1:]]) for result in results]
        assert error(gradients[0], gradients[2]) <= 2 * error(gradients[1], gradients[2])
    assert len(fused_calls) == 3


def test_half_precision_and_wrong_inputs_are_as_in_stock():
    stock = small()
    model = densenet_fast.convert(stock, inplace=False)
    for x in (torch.randn(1, 3, 16, 16), torch.randn(2, 4, 64, 64), torch.randn(2, 3, 64, 64).half()):
        errors = []
        for net in (model, stock):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                net(x)
            errors.append(caught.type)
        assert errors[0] is errors[1]
    empty = torch.randn(0, 3, 64, 64)
    assert model(empty).shape == stock(empty).shape == (0, 5)
    assert model.bfloat16()(torch.randn(2, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
