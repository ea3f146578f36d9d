"""What is called peak memory is: a known allocation, a model's need in a process of its own, the largest batch."""

import subprocess
import sys
from dataclasses import replace

import pytest

import densenet_fast
from densenet_fast.benchmarking.largest import largest_batch
from densenet_fast.benchmarking.memory import Job, Memory, measure
from densenet_fast.benchmarking.networks import architecture

MIB = 1 << 20
JOB = Job("ours", "channels_last", "densenet_bc10", 64, 32, "fp32", True, "cpu", 1)

METER = f"""
import torch
from densenet_fast.memory import PeakMemory
kept = torch.ones(64 * {MIB}, dtype=torch.uint8)
del kept
memory = PeakMemory(torch.device("cpu"))
gone = torch.ones(300 * {MIB}, dtype=torch.uint8)
del gone
kept = torch.ones(100 * {MIB}, dtype=torch.uint8)
print(memory.read().added / {MIB})
"""


def test_the_meter_reads_a_known_allocation():
    added = float(subprocess.run([sys.executable, "-c", METER], check=True, capture_output=True, text=True).stdout)
    assert added == pytest.approx(300, rel=0.05)


def test_a_step_needs_what_it_keeps_and_little_more():
    memory = measure(JOB)
    assert memory.failure == ""
    rows = 64 * 32 * 32 * 4
    kept = rows * sum((36 + 48, (36 // 2 + 12) / 4 + 12, (30 // 2 + 12) / 16 + 3))  # F and the bottleneck of each block
    assert kept < memory.added < 4 * kept
    parameters = sum(p.numel() for p in densenet_fast.DenseNet(**architecture("densenet_bc10")).parameters())
    assert 8 * parameters < memory.model < 9 * parameters  # with their gradients, and the buffers


def test_the_plain_network_needs_more():
    ours, plain = (measure(replace(JOB, competitor=name, network="densenet_bc40")) for name in ("ours", "reference"))
    assert 0 < ours.added < 0.6 * plain.added


def test_a_process_that_fails_says_why():
    assert "densenet_bc11" in measure(Job("ours", "contiguous", "densenet_bc11", 1, 32, "fp32", True, "cpu", 1)).failure


@pytest.mark.parametrize("noise", [0, 1.5])
def test_the_largest_batch(noise):
    ran = []

    def need(job):
        ran.append(job.batch)
        if job.batch > 100:
            return Memory(failure="out of memory")
        wobble = noise * MIB if job.batch == 8 else 0
        return Memory(added=int((50 + 7 * job.batch) * MIB + wobble), model=10 * MIB)

    found = largest_batch(JOB, 500 * MIB, need)
    assert found.batch == 62 and found.bytes == (60 + 7 * 62) * MIB and 62 in ran
    assert largest_batch(JOB, 60 * MIB, need).batch == 0
    assert largest_batch(JOB, 67 * MIB, need).batch == 1
    assert largest_batch(JOB, 5000 * MIB, need).batch <= 100


def test_the_largest_batch_of_what_fails():
    assert largest_batch(JOB, 1, lambda job: Memory(failure="RuntimeError: no")).failure == "RuntimeError: no"
    assert "8 images do not fit" in largest_batch(JOB, 1, lambda job: Memory(failure="out of memory")).failure
