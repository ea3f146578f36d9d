"""What the CUDA kernels do on running statistics: on a GPU if there is one, else emulated on CPU tensors.

Run as ``on_device.py`` is; the truth is ``aten``'s.
"""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from backends.cuda.on_device import (
    DTYPES,
    by_dtype,
    close,
    default_device,  # noqa: F401
)
from densenet_fast.backends import aten
from densenet_fast.backends import cuda_kernels as kernels
from densenet_fast.backends.affine import Running, RunningStatistics, Update, accumulation_dtype

pytestmark = pytest.mark.skipif(kernels.unavailable() is not None, reason=str(kernels.unavailable()))


def normalisations(dtypes, momenta, packed):
    """Running statistics of every dtype and momentum, with and without a counter, of columns anywhere."""
    torch.manual_seed(1)
    made = []
    for i, (dtype, momentum, counted) in enumerate(itertools.product(dtypes, momenta, [True, False])):
        n, start = 1 + 13 * i % 40, 7 * i % (packed - 40)
        batches = torch.tensor(i % 4) if counted else None
        made.append(Running(torch.randn(n).to(dtype), torch.rand(n).to(dtype), batches, momentum, start))
    return made


MOMENTA = [0.1, 0.5, 0.9, 1.0, 0.0, None]


def wide_of(running):
    return [t.double() for r in running for t in (r.mean, r.var, r.batches) if t is not None]


@pytest.mark.parametrize("counted", [True, False])
@by_dtype
def test_running_statistics_are_atens(dtype, counted):
    """Of 96 normalisations in two launches, three times over."""
    wide, packed = accumulation_dtype(dtype), 90
    ours, theirs = (normalisations([*DTYPES, wide, dtype], MOMENTA, packed) for _ in range(2))
    assert len(ours) > 64
    for step in range(3):
        mean, var = torch.randn(packed).to(wide), torch.rand(packed).to(wide)
        mean[step], var[50 + step] = torch.nan, torch.inf
        count = torch.tensor(35.0, dtype=torch.float64) if counted else 35
        kernels.update_running_statistics([Update(ours, mean, var, count)])
        aten.update_running_statistics([Update(theirs, mean, var, count)])
        for a, b in zip(ours, theirs):
            assert a.batches is None or a.batches.equal(b.batches)
            for got, expected in ((a.mean, b.mean), (a.var, b.var)):
                assert got.dtype == expected.dtype and got.isnan().equal(expected.isnan())
                tolerance = 4 * max(torch.finfo(got.dtype).eps, torch.finfo(wide).eps)
                assert torch.allclose(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True), a.momentum


def test_running_statistics_are_those_of_stock_batch_norm():
    x = torch.randn(6, 5, 7)
    for momentum in (0.1, None):
        module = nn.BatchNorm1d(5, momentum=momentum)
        ours = Running(torch.zeros(5), torch.ones(5), torch.tensor(0), momentum, 2)
        for step in range(3):
            batch = x * (step + 1) + step
            module(batch)
            var, mean = torch.var_mean(batch, (0, 2), correction=0)
            kernels.update_running_statistics(
                [Update([ours], *(nn.functional.pad(v, (2, 1)) for v in (mean, var)), 42)]
            )
        assert torch.allclose(ours.mean, module.running_mean) and torch.allclose(ours.var, module.running_var)
        assert ours.batches == module.num_batches_tracked == 3


@pytest.mark.parametrize("module", [kernels, aten], ids=["cuda", "aten"])
def test_a_normalisation_that_comes_twice_is_updated_by_each_in_turn(module):
    mean, var = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0])
    for momentum in (0.25, None):
        shared = Running(torch.zeros(1), torch.zeros(1), torch.tensor(0), momentum, 0)
        other = Running(torch.zeros(1), torch.zeros(1), None, 1.0, 1)
        module.update_running_statistics([Update([shared, other, shared._replace(start=1)], mean, var, 4)])
        assert shared.batches == 2 and other.mean == 5
        second = 0.5 if momentum is None else momentum
        first = 1.0 if momentum is None else momentum
        assert close(shared.mean, first * 1 * (1 - second) + second * mean[1:], 1e-6)
        unbiased = var * 4 / 3
        assert close(shared.var, first * unbiased[:1] * (1 - second) + second * unbiased[1:], 1e-6)


def test_many_batches_in_one_call():
    """Of 20 batches, more than one launch takes; some update nothing, and one normalisation comes in several."""
    torch.manual_seed(0)
    shared = Running(torch.zeros(2), torch.ones(2), torch.tensor(0), 0.5, 1)
    updates = []
    for i in range(20):
        running = normalisations([torch.float32, torch.float16], MOMENTA[: i % 3], 90)
        count = torch.tensor(30.0 + i, dtype=torch.float64) if i % 2 else 30 + i
        updates.append(
            Update([*running, shared] if i in (3, 4, 17) else running, torch.randn(90), torch.rand(90), count)
        )
    single = copy.deepcopy(updates)
    kernels.update_running_statistics(updates)
    for update in single:
        aten.update_running_statistics([update])
    assert updates[3].running[-1].batches == 3
    for ours, theirs in zip(updates, single):
        for a, b in zip(wide_of(ours.running), wide_of(theirs.running)):
            assert torch.allclose(a, b, rtol=4e-3, atol=1e-6)


@pytest.mark.parametrize("module", [kernels, aten], ids=["cuda", "aten"])
def test_one_row_has_no_unbiased_variance(module):
    for count in (1, torch.tensor(1.0, dtype=torch.float64)):
        ours = Running(torch.zeros(2), torch.ones(2), None, 0.25, 0)
        module.update_running_statistics([Update([ours], torch.ones(2), torch.tensor([0.0, 2.0]), count)])
        assert ours.mean.eq(0.25).all() and ours.var[0].isnan() and math.isinf(ours.var[1])


def test_wrong_running_statistics_raise():
    vector = torch.zeros(4)
    right = Running(vector.clone(), vector.clone(), torch.tensor(0), 0.1, 0)
    bad = [
        ({"mean": vector.long()}, "running mean: expected float32, float64, float16 or bfloat16"),
        ({"mean": torch.zeros(8)[::2]}, "running mean and var: expected contiguous values"),
        ({"var": vector[:3]}, r"running var: expected \[4\], got \[3\]"),
        ({"batches": torch.tensor(0.0)}, "batches: expected one int64 value"),
        ({"start": 1}, r"start: expected 4 columns from it on in \[4\], got 1"),
        ({"start": -1}, "start: expected 4 columns from it on"),
    ]
    for fields, message in bad:
        with pytest.raises(RuntimeError, match=f"update_running_statistics: {message}"):
            kernels.update_running_statistics([Update([right._replace(**fields)], vector, vector, 5)])
    for fields in ({"mean": vector.to("meta")}, {"batches": torch.tensor(0, device="meta")}):
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            kernels.update_running_statistics([Update([right._replace(**fields)], vector, vector, 5)])
    for mean, var, count, message in [
        (vector.double(), vector, 5, "var: expected 4 contiguous float64"),
        (vector, vector[:3], 5, "var: expected 4"),
        (vector, vector, torch.tensor(5), "count: expected one float64 value"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            kernels.update_running_statistics([Update([right], mean, var, count)])
    assert right.batches == 0


def test_autograd_sees_that_running_statistics_change():
    running = Running(torch.zeros(4), torch.ones(4), torch.tensor(0), 0.1, 0)
    before = [t._version for t in running[:3]]
    kernels.update_running_statistics([Update([running], torch.zeros(4), torch.ones(4), 5)])
    assert [t._version - v for t, v in zip(running[:3], before)] == [1, 1, 1]


def test_addresses_are_looked_up_at_every_call():
    running = RunningStatistics([Running(torch.zeros(4), torch.ones(4), torch.tensor(0), 1.0, 0)])
    for mean in torch.rand(2, 4):
        kernels.update_running_statistics([Update(running, mean, torch.ones(4), 5)])
        assert running[0].mean.equal(mean)
        for t in (running[0].mean, running[0].batches):
            t.data = t.data.clone()
    running[0].batches.data = torch.zeros(())
    with pytest.raises(RuntimeError, match="batches: expected int64"):
        kernels.update_running_statistics([Update(running, mean, torch.ones(4), 5)])
    running[0].batches.data = torch.tensor(0)
    running[0].mean.data = torch.zeros(8)[::2]
    with pytest.raises(RuntimeError, match="expected contiguous"):
        kernels.update_running_statistics([Update(running, mean, torch.ones(4), 5)])
