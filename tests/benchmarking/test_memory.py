"""What is called peak memory is: a known allocation, a model's need in a process of its own."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import densenet_fast
from densenet_fast.benchmarking.memory import KILLED, OUT_OF_MEMORY, Job, measure
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


@pytest.mark.library
def test_a_step_needs_what_it_keeps_and_little_more():
    memory = measure(JOB)
    assert memory.failure == ""
    rows = 64 * 32 * 32 * 4
    kept = rows * sum((36 + 48, (36 // 2 + 12) / 4 + 12, (30 // 2 + 12) / 16 + 3))  # F and the bottleneck of each block
    assert kept < memory.added < 4 * kept
    parameters = sum(p.numel() for p in densenet_fast.DenseNet(**architecture("densenet_bc10")).parameters())
    assert 8 * parameters < memory.model < 9 * parameters  # with their gradients, and the buffers


@pytest.mark.library
def test_the_plain_network_needs_more():
    ours, plain = (measure(replace(JOB, competitor=name, network="densenet_bc40")) for name in ("ours", "reference"))
    assert 0 < ours.added < 0.6 * plain.added


def test_a_process_that_fails_says_why():
    assert "densenet_bc11" in measure(Job("ours", "contiguous", "densenet_bc11", 1, 32, "fp32", True, "cpu", 1)).failure


@pytest.mark.parametrize(
    "code, stderr, failure",
    [
        (-9, "", KILLED),
        (1, "DefaultCPUAllocator: can't allocate memory\nRuntimeError: no", OUT_OF_MEMORY),
        (-11, "", "exit code -11"),
        (1, "Traceback\nValueError: no", "ValueError: no"),
        (0, "", ""),
    ],
)
def test_why_a_process_failed(code, stderr, failure, monkeypatch):
    line = f"import os, sys; print('{json.dumps({'added': 1})}'); sys.stderr.write({stderr!r}); sys.stdout.flush();"
    line += f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
    command = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: command([sys.executable, "-c", line], **options))
    memory = measure(JOB)
    assert memory.failure == failure and memory.killed == (code == -9)
    assert memory.out_of_memory == (failure in (KILLED, OUT_OF_MEMORY))


def test_a_process_that_takes_too_long_is_ended_with_those_it_started(monkeypatch, tmp_path):
    line = f"(sleep 2; touch {tmp_path}/late) & wait"
    command = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: command(["/bin/sh", "-c", line], **options))
    memory = measure(JOB, 0.5)
    assert memory.failure == "not done within 0 s" and not memory.out_of_memory
    time.sleep(2.5)
    assert not list(tmp_path.iterdir())
