"""The search for the largest batch, against simulated memories whose right answer is known."""

import math
import random

import pytest

from densenet_fast.benchmarking.largest import largest_batch
from densenet_fast.benchmarking.memory import KILLED, OUT_OF_MEMORY, Job, Memory

MIB = 1 << 20
JOB = Job("ours", "channels_last", "densenet_bc10", 64, 32, "fp32", True, "cpu", 1)
MODEL = 60
SHAPES = {
    "straight": lambda batch: 30 + 17.3 * batch,
    "steep": lambda batch: 20 + 240.0 * batch,
    "bent": lambda batch: 90 * batch**0.9,
    "stepped": lambda batch: 25 * batch + (120 if batch >= 9 else 0) + (200 if batch >= 33 else 0),
    "flat at first": lambda batch: max(400.0, 25.0 * batch),
    "falling at first": lambda batch: 300 - 40 * batch if batch < 6 else 28.0 * batch,
}


class Simulated:
    """MiB that a batch needs, above the model's; the same from run to run."""

    def __init__(self, shape, noise=0.0, most=math.inf):
        self.shape, self.noise, self.most, self.ran = shape, noise, most, []

    def need(self, batch):
        return MODEL + self.shape(batch) + random.Random(batch).uniform(-self.noise, self.noise)

    def __call__(self, job):
        self.ran.append(job.batch)
        if self.need(job.batch) > self.most:
            return Memory(failure=OUT_OF_MEMORY)
        return Memory(added=int((self.need(job.batch) - MODEL) * MIB), model=MODEL * MIB)


@pytest.mark.parametrize("budget", [500, 1024, 2048, 8192])
@pytest.mark.parametrize("noise", [0, 30])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_fits_and_one_more_does_not(shape, noise, budget):
    simulated = Simulated(SHAPES[shape], noise)
    found = largest_batch(JOB, budget * MIB, simulated)
    assert found.failure == "" and found.batch in simulated.ran
    assert found.bytes == pytest.approx(simulated.need(found.batch) * MIB) and found.bytes <= budget * MIB
    assert found.bytes_of_next > budget * MIB
    exact = [batch for batch in range(1, 1000) if MODEL + SHAPES[shape](batch) <= budget]
    each = SHAPES[shape](1001) - SHAPES[shape](1000)
    assert abs(found.batch - max(exact)) <= 2 + 2.5 * noise / each
    assert len(simulated.ran) <= 9 and max(simulated.ran) <= 4 * found.batch
    assert len(set(simulated.ran)) == len(simulated.ran)


def test_few_processes_where_memory_is_a_line():
    for budget in (512, 1024, 2048):
        for shape in ("straight", "bent"):
            simulated = Simulated(SHAPES[shape])
            largest_batch(JOB, budget * MIB, simulated)
            assert len(simulated.ran) <= 5


@pytest.mark.parametrize("most", [math.inf, 5000, 1500, 1024])
def test_what_does_not_run_at_all_does_not_fit(most):
    simulated = Simulated(SHAPES["straight"], most=most)
    found = largest_batch(JOB, 10000 * MIB, simulated)
    least = min(most, 10000)
    assert MODEL + SHAPES["straight"](found.batch) <= least < MODEL + SHAPES["straight"](found.batch + 1)


def test_none_fits_only_where_one_image_was_measured_not_to():
    for budget in range(MODEL, 500):
        simulated = Simulated(SHAPES["steep"])
        found = largest_batch(JOB, budget * MIB, simulated)
        assert found.batch == (budget >= simulated.need(1)) and (found.batch or 1 in simulated.ran)
    simulated = Simulated(SHAPES["steep"], most=100)
    assert largest_batch(JOB, 1000 * MIB, simulated).batch == 0 and 1 in simulated.ran


def test_a_batch_killed_once_is_run_again():
    simulated, killed = Simulated(SHAPES["straight"]), set()

    def once(job):
        if job.batch in killed:
            return simulated(job)
        killed.add(job.batch)
        return Memory(failure=KILLED)

    assert largest_batch(JOB, 1024 * MIB, once) == largest_batch(JOB, 1024 * MIB, simulated)


def test_a_failure_is_no_lack_of_memory():
    found = largest_batch(JOB, MIB, lambda job: Memory(failure="RuntimeError: no"))
    assert found.failure == "RuntimeError: no" and found.batch == 0
