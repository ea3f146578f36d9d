"""The running statistics that the ops update, in every mode of batch normalisation."""

import pytest
import torch

from densenet_fast import functional
from densenet_fast.functional import BatchNorm
from helpers import error
from ops.units import make_layers, make_unit, stock_block

MODES = [
    dict(),
    dict(momentum=None),
    dict(momentum=0.7),
    dict(tracked=False),
    dict(tracked=False, training=False),
    dict(training=False),
    dict(affine=False, momentum=None),
]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_running_statistics_follow_batch_norm(mode):
    """Three steps against torch.nn.BatchNorm2d: values, running statistics, counter."""
    unit = make_unit(5, 4, 1, 2, **mode)
    layers = make_layers(5, **mode)
    for run, first in (
        (lambda x: functional.bn_relu_conv1x1(x, *unit), unit.norm),
        (lambda x: functional.bn_relu_conv1x1_avgpool(x, *unit), unit.norm),
        (lambda x: functional.dense_block(x, layers), layers[0][0].norm),
    ):
        tracked = mode.get("tracked", True)
        norm = torch.nn.BatchNorm2d(5, momentum=mode.get("momentum", 0.1), track_running_stats=tracked).double()
        if tracked:
            norm.running_mean.copy_(first.running_mean)
            norm.running_var.copy_(first.running_var)
            norm.num_batches_tracked.copy_(first.num_batches_tracked)
        norm.train(mode.get("training", True))
        for _ in range(3):
            x = torch.randn(3, 5, 4, 4, dtype=torch.float64) * 2 + 1
            run(x), norm(x)
        if tracked:
            assert error(first.running_mean, norm.running_mean) < 1e-13
            assert error(first.running_var, norm.running_var) < 1e-13
            assert first.num_batches_tracked == norm.num_batches_tracked


def test_every_normalisation_of_a_block_is_updated_once():
    """Each layer with a momentum and an epsilon of its own, one of them frozen, against stock layers."""
    options = [dict(momentum=0.3), dict(momentum=None, eps=1e-2), dict(training=False), dict(momentum=0.9, eps=1e-3)]
    layers = [(make_unit(3 + 2 * i, 3, 1, 2, **o), make_unit(3, 2, 3, 2, **o)) for i, o in enumerate(options)]
    norms = [unit.norm for layer in layers for unit in layer]
    before = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    functional.dense_block(x, layers)
    after = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]
    assert [n.num_batches_tracked.item() for n in norms] == [1, 1, 1, 1, 0, 0, 1, 1]
    for n, (mean, var) in zip(norms, before):
        n.running_mean.copy_(mean)
        n.running_var.copy_(var)
    stock_block(x, [[u._replace(norm=u.norm._replace(momentum=u.norm.momentum or 1.0)) for u in la] for la in layers])
    for n, got in zip(norms, after):
        assert error(got[0], n.running_mean) < 1e-12 and error(got[1], n.running_var) < 1e-12


def test_bfloat16_running_statistics():
    unit = make_unit(5, 4, 1, 2, dtype=torch.bfloat16)
    norm = torch.nn.BatchNorm2d(5).bfloat16()
    norm.running_mean.copy_(unit.norm.running_mean)
    norm.running_var.copy_(unit.norm.running_var)
    x = torch.randn(3, 5, 4, 4).bfloat16()
    functional.bn_relu_conv1x1(x, *unit), norm(x)
    assert error(unit.norm.running_mean, norm.running_mean) < 2**-7
    assert error(unit.norm.running_var, norm.running_var) < 2**-7


def test_running_statistics_of_half_precision_are_no_less_accurate_than_stock():
    norms = [torch.nn.BatchNorm2d(512, dtype=dtype) for dtype in (torch.float16, torch.float16, torch.float64)]
    ours, stock, exact = norms
    weight = torch.randn(1, 512, 1, 1).half()
    for _ in range(50):
        x = (torch.randn(4, 512, 4, 4) * 3 + 1).half()
        buffers = (ours.running_mean, ours.running_var, ours.num_batches_tracked)
        functional.bn_relu_conv1x1(x, BatchNorm(None, None, *buffers), weight)
        stock(x), exact(x.double())
    for name in ("running_mean", "running_var"):
        got, expected, truth = (getattr(norm, name) for norm in norms)
        assert error(got, truth) <= 1.2 * error(expected, truth)


def test_counter_without_running_statistics_is_incremented():
    counter = torch.tensor(0)
    functional.bn_relu_conv1x1(torch.randn(2, 3, 4, 4), BatchNorm(num_batches_tracked=counter), torch.randn(4, 3, 1, 1))
    assert counter == 1
