"""Reduced and full precision as users turn it on, beside torchvision's network."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from integration.support import images, pair
from torch import nn

import densenet_fast
from densenet_fast.nn import DenseBlock, Transition
from helpers import assert_same, error, step

STEPS = 4


def train(
    model: nn.Module, dtype: torch.dtype | None = None, scale: float | None = None, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Losses and loss scales of a few steps, under autocast to ``dtype`` and with a GradScaler, if they are given."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    generator = torch.Generator().manual_seed(seed)
    losses, scales = [], []
    for _ in range(STEPS):
        x = torch.randn(8, 3, 40, 36, generator=generator)
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), torch.arange(8) % 5)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    return losses, scales


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, None), (torch.float16, 2.0**10)], ids=str)
def test_autocast_trains_as_torchvision(dtype, scale, memory_efficient):
    """The losses of several runs are as near to the exact ones as stock's, at worst and in the root mean square."""
    got, expected = pair(torch.float32, memory_efficient=memory_efficient)
    mine, theirs = [], []
    for seed in range(6):
        truth, _ = train(expected, seed=seed)
        for model, errors in ((got, mine), (expected, theirs)):
            losses, scales = train(model, dtype, scale, seed)
            assert scales == [scale or 1.0] * STEPS
            errors += [loss - exact for loss, exact in zip(losses, truth, strict=True)]
    assert max(map(abs, mine)) <= 2 * max(map(abs, theirs))
    assert math.hypot(*mine) <= 2 * math.hypot(*theirs)


def test_gradscaler_skips_steps_that_overflow():
    """Gradients that float16 cannot hold become infinite and are found: the scale falls as in stock."""
    got, expected = pair(torch.float32)
    (_, mine), (_, theirs) = (train(model, torch.float16, 2.0**40) for model in (got, expected))
    assert mine == theirs == [2.0**39, 2.0**38, 2.0**37, 2.0**36]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_half_precision_model(dtype, training):
    """``model.bfloat16()``: output and gradients at most twice as far from the exact ones as stock's."""
    got, expected = pair(dtype, training)
    exact = copy.deepcopy(expected).double()
    x = images(8, 3, 40, 36, dtype=dtype)
    truth, theirs, mine = dict(step(exact, x.double())), dict(step(expected, x)), dict(step(got, x))
    assert mine["output"].dtype == mine["grad features.denseblock1.denselayer1.norm1.weight"].dtype == dtype
    assert error(mine["output"], truth["output"]) <= 2 * error(theirs["output"], truth["output"])
    names = [name for name, value in truth.items() if name.startswith("grad ") and value.norm() > 1e-3]

    def mean(values):
        return sum(error(values[name], truth[name]) for name in names) / len(names)

    assert mean(mine) <= 2 * mean(theirs)


@pytest.mark.parametrize("training", [True, False])
def test_float64(training):
    assert_same(*pair(training=training), images(), 1e-9)


def test_dtype_changed_back_and_forth():
    got, expected = pair(torch.float32, training=False)
    x = images(dtype=torch.float32)
    before = got(x)
    assert error(got.double()(x.double()), expected.double()(x.double())) < 1e-10
    assert got.float()(x).equal(before)


MISMATCHES = {
    "half into float32": (lambda m: m, torch.float16),
    "double into float32": (lambda m: m, torch.float64),
    "float32 into half": (lambda m: m.half(), torch.float32),
    "bfloat16 into half": (lambda m: m.half(), torch.bfloat16),
}


@pytest.mark.parametrize("change, dtype", MISMATCHES.values(), ids=MISMATCHES)
def test_input_of_another_dtype_raises_stocks_error(change, dtype):
    """The same words for the model; for its parts the same type, naming both dtypes."""
    got, expected = pair(torch.float32)
    weight = change(got).classifier.weight.dtype
    inputs = {"": images(), "features.denseblock1": images(2, 6, 8, 8), "features.transition1": images(2, 14, 8, 8)}
    for name, x in inputs.items():
        raised = []
        for model in (got, change(expected)):
            with pytest.raises(RuntimeError) as caught:
                model.get_submodule(name)(x.to(dtype))
            raised.append(caught)
        assert raised[0].type is raised[1].type, name
        if name:
            assert str(dtype) in str(raised[0].value) and str(weight) in str(raised[0].value), name
        else:
            assert str(raised[0].value) == str(raised[1].value)


@pytest.mark.parametrize("value", [-1.0, 0.0, -1e-3])
@pytest.mark.parametrize("training", [True, False])
def test_negative_and_zero_gamma(value, training):
    models = pair(training=training)
    for model in models:
        for module in model.features.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, value)
    assert_same(*models, images(), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_deterministic_algorithms_run_without_a_warning_and_repeat_bit_for_bit(dtype, memory_efficient):
    torch.use_deterministic_algorithms(True)
    got, _ = pair(dtype, memory_efficient=memory_efficient)
    x, runs = images(dtype=dtype), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (got, copy.deepcopy(got)):
            runs.append({name: value.clone() for name, value in step(model, x)})
    assert all(value.equal(runs[1][name]) for name, value in runs[0].items())


def test_half_on_a_gpu(gpu):
    got, expected = (model.cuda().half().eval() for model in pair(torch.float32))
    x = images(dtype=torch.float16).cuda()
    truth = copy.deepcopy(expected).double()(x.double())
    assert error(got(x), truth) <= 2 * error(expected(x), truth)
    assert all(
        row.backend == "triton" for row in densenet_fast.explain(got) if row.kind in ("DenseBlock", "Transition")
    )


@pytest.mark.parametrize("module", [DenseBlock(2, 6, 4, 4), Transition(6, 4)], ids=["DenseBlock", "Transition"])
def test_autocast_off_within_autocast(module):
    x = images(2, 6, 8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert module(x).dtype == torch.float32
