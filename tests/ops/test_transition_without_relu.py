"""The transition without ReLU: derivatives, modes, statistics that are known, what it saves, low precision."""

import pytest
import torch
import torch.nn.functional as F

from densenet_fast import functional
from densenet_fast.functional import BatchStatistics
from helpers import error, make_norm

SHAPES = [(2, 3, 5), (2, 3, 4, 7), (2, 3, 2, 3, 4)]
MODES = [dict(), dict(affine=False), dict(training=False), dict(tracked=False, training=False), dict(momentum=None)]


def stock(x, n, weight, bias, running):
    dims = x.dim() - 2
    x = F.batch_norm(x, *running, n.weight, n.bias, not n.frozen, 1.0 if n.momentum is None else n.momentum, n.eps)
    x = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](x, weight, bias)
    return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims - 1](x, 2)


def make(shape, options, dtype=torch.float64, bias=True):
    weight = (torch.randn(4, 3, *[1] * (len(shape) - 2), dtype=dtype)).requires_grad_()
    bias = torch.randn(4, dtype=dtype, requires_grad=True) if bias else None
    x = (torch.randn(shape, dtype=dtype) * 2 + 3).requires_grad_()
    return x, make_norm(3, dtype=dtype, **options), weight, bias


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", MODES, ids=str)
def test_gradients_and_running_statistics(options, shape):
    x, norm, weight, bias = make(shape, options, bias="affine" not in options)
    running = [None if t is None else t.clone() for t in (norm.running_mean, norm.running_var)]
    out = functional.bn_conv1x1_avgpool(x, norm, weight, bias)
    expected = stock(x, norm, weight, bias, running)
    assert error(out, expected) < 1e-12 and out.shape == expected.shape
    if norm.running_mean is not None:
        assert error(norm.running_mean, running[0]) < 1e-12 and error(norm.running_var, running[1]) < 1e-12
        assert norm.num_batches_tracked.item() == norm.training
    untracked = norm if norm.frozen else norm._replace(running_mean=None, running_var=None, num_batches_tracked=None)
    inputs = [t for t in (x, norm.weight, norm.bias, weight, bias) if t is not None]

    def run(x, *_):
        return functional.bn_conv1x1_avgpool(x, untracked, weight, bias)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_statistics_that_are_known_take_their_gradient():
    x, norm, weight, bias = make((2, 3, 5, 4), dict(tracked=False))
    cotangent, gradients = torch.randn(2, 4, 2, 2, dtype=torch.float64), []
    for known in (False, True):
        statistics = None
        if known:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            statistics = BatchStatistics(mean, var)
        out = functional.bn_conv1x1_avgpool(x, norm, weight, bias, statistics=statistics)
        gradients.append(torch.autograd.grad(out, (x, norm.weight, weight), cotangent))
    assert all(error(a, b) < 1e-12 for a, b in zip(*gradients))


def test_it_keeps_its_input_and_a_quarter_of_it():
    x, norm, weight, _ = make((2, 3, 32, 32), {}, torch.float32)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        functional.bn_conv1x1_avgpool(x, norm, weight)
    assert sum(kept.values()) <= 1.3 * x.numel()


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_no_less_accurate_than_stock(autocast):
    x, norm, weight, bias = make((4, 3, 16, 16), dict(tracked=False))
    truth = stock(x, norm, weight, bias, (None, None))
    low = [t.detach().bfloat16() for t in (x, weight, bias)]
    norm = norm._replace(weight=norm.weight.float(), bias=norm.bias.float())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        given = (low[0], *(t.float() for t in low[1:])) if autocast else low
        got = functional.bn_conv1x1_avgpool(given[0], norm, *given[1:])
    expected = stock(low[0], norm, low[1], low[2], (None, None))
    assert got.dtype == torch.bfloat16 and error(got, truth) <= 2 * error(expected, truth)


def test_values_beyond_float32s_squares():
    x, norm, weight, bias = make((2, 3, 4, 4), dict(tracked=False), torch.float32)
    x = x.detach() * 1e18
    expected = stock(
        x.double(),
        norm._replace(weight=norm.weight.double(), bias=norm.bias.double()),
        weight.double(),
        bias.double(),
        (None, None),
    )
    assert error(functional.bn_conv1x1_avgpool(x, norm, weight, bias), expected) < 1e-5


def test_wrong_inputs():
    x, norm, weight, bias = make((2, 3, 5, 4), {})
    with pytest.raises(RuntimeError, match="x: expected 3 channels"):
        functional.bn_conv1x1_avgpool(x[:, :2], norm, weight, bias)
    with pytest.raises(RuntimeError, match="x: expected spatial sizes of at least 2"):
        functional.bn_conv1x1_avgpool(x[..., :1], norm, weight, bias)
