"""Values whose squares, or their cubes' inverses, float32 does not hold, on CPUs: the results are stock's."""

import copy

import pytest
import torch
from torch import nn

import densenet_fast
from densenet_fast import functional, reference
from densenet_fast.nn import fusion
from helpers import error, twin


class Unit(nn.Sequential):
    """Batch normalisation and what follows it, in stock or as one op."""

    def __init__(self, op, *rest):
        super().__init__(nn.BatchNorm2d(6), *rest)
        self.op = op

    def forward(self, x):
        return super().forward(x) if self.op is None else self.op(x, fusion.batch_norm(self[0]))


def stem(package):
    op = None if package is reference else functional.bn_relu_maxpool
    return Unit(op, nn.ReLU(), nn.MaxPool2d(3, 2, 1))


def head(package):
    op = None if package is reference else functional.bn_relu_global_avgpool
    return Unit(op, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


PARTS = {
    "block": lambda package: package.DenseBlock(2, 6, 4, 4),
    "block without bottlenecks": lambda package: package.DenseBlock(2, 6, None, 4),
    "block with dropout": lambda package: package.DenseBlock(2, 6, 4, 4, 0.5),
    "transition": lambda package: package.Transition(6, 4),
    "stem": stem,
    "head": head,
}


def run(module, x):
    """The output, every gradient and every buffer of one step."""
    x, module = x.clone().requires_grad_(), copy.deepcopy(module)
    torch.manual_seed(3)
    y = module(x)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    inputs = {"x": x, **dict(module.named_parameters())}
    gradients = torch.autograd.grad(y, list(inputs.values()), cotangent)
    return {"output": y.detach(), **dict(zip(inputs, gradients)), **dict(module.named_buffers())}


@pytest.mark.parametrize(
    "dtype, scale",
    [(torch.float32, 1e15), (torch.float32, 3e19), (torch.float32, 5e37), (torch.bfloat16, 1e30)],
    ids=str,
)
@pytest.mark.parametrize("kind", PARTS)
def test_large_values_give_what_stock_gives(kind, dtype, scale):
    """Finite where stock is, at most twice as far from the truth, and the same again."""
    torch.manual_seed(0)
    expected = PARTS[kind](reference).to(dtype)
    got = twin(expected, PARTS[kind](densenet_fast.nn))
    x = (torch.randn(2, 6, 12, 10) * scale).to(dtype)
    mine, theirs = run(got, x), run(expected, x)
    truth = run(copy.deepcopy(expected).double(), x.double())
    assert theirs["output"].isfinite().all()
    for name, exact in truth.items():
        finite = theirs[name].isfinite()
        off, stock = (error(r[name][finite], exact[finite]) for r in (mine, theirs))
        assert off <= 2 * stock + torch.finfo(dtype).eps, (name, off, stock)
    assert all(value.equal(mine[name]) for name, value in run(got, x).items())


def test_a_network_of_large_images():
    torch.manual_seed(0)
    got = densenet_fast.DenseNet(4, (2, 3), 6, num_classes=5)
    expected = twin(got, reference.DenseNet(4, (2, 3), 6, num_classes=5))
    x = torch.randn(2, 3, 40, 36) * 1e30
    mine, theirs, truth = run(got, x), run(expected, x), run(copy.deepcopy(expected).double(), x.double())
    assert error(mine["output"], truth["output"]) <= 2 * error(theirs["output"], truth["output"])
    for name, value in theirs.items():
        assert mine[name].isfinite()[value.isfinite()].all(), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_give_what_stock_gives(value):
    """Where the batch is normalised: in every place where stock has NaN, and in no other."""
    for kind, make in PARTS.items():
        expected = make(reference)
        got = twin(expected, make(densenet_fast.nn))
        x = torch.randn(2, 6, 12, 10)
        x[0, 2, 3, 4] = value
        mine, theirs = (run(model, x) for model in (got, expected))
        for name in ("output", *dict(expected.named_buffers())):
            assert mine[name].isnan().equal(theirs[name].isnan()), (kind, name)
