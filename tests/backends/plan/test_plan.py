"""Launch plans: the arena; replays in Triton's interpreter and the emulation of CUDA C++, and over a driver that writes
launches down; in processes of their own, because each needs another environment."""

import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from backends.cuda import emulation
from backends.plan import stub
from backends.plan.bodies import native
from densenet_fast.backends import cuda_kernels, nvidia, plan, triton
from densenet_fast.backends.arena import ALIGNMENT, Lifetime, layout
from densenet_fast.backends.recording import Recording
from densenet_fast.backends.symbolic import Unplannable

HERE = Path(__file__).parent

needs_nvcc = pytest.mark.skipif(emulation.find_nvcc() is None, reason="nvcc was not found")


def run(*files, **environment):
    environment = {**os.environ, **emulation.environment(emulation.build()), "PYTEST_ADDOPTS": "", **environment}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(HERE / file for file in files)]
    tests = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=emulation.ROOT)
    assert tests.returncode == 0 and " passed" in tests.stdout, tests.stdout[-6000:] + tests.stderr[-3000:]


@needs_nvcc
@pytest.mark.parametrize(
    "files", [("interpreted.py", "networks.py"), ("stale.py", "random_blocks.py"), ("chains.py",)], ids=" ".join
)
def test_interpreted(files):
    pytest.importorskip("triton", reason="Triton is not installed")
    run(*files, TRITON_INTERPRET="1")


@needs_nvcc
@pytest.mark.skipif(shutil.which("cc") is None, reason="cc was not found")
def test_replayed(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    run("replayed.py", **stub.environment(tmp_path))


@pytest.mark.parametrize("seed", range(20))
def test_what_is_needed_at_the_same_time_stands_apart(seed):
    """And the arena is never larger than the sum of all, nor, by much, than the most that is needed at one time."""
    draw = random.Random(seed)
    lifetimes = []
    for _ in range(draw.randint(1, 120)):
        first = draw.randint(0, 60)
        lifetimes.append(Lifetime(draw.choice([1, 255, 256, 257, 5000, 70000]), first, first + draw.randint(0, 20)))
    offsets, size = layout(lifetimes)
    placed = list(zip(lifetimes, offsets))
    for i, (one, start) in enumerate(placed):
        assert start % ALIGNMENT == 0 and start + one.size <= size
        for other, begin in placed[:i]:
            if max(one.first, other.first) < min(one.end, other.end):
                assert start + one.size <= begin or begin + other.size <= start
    needed = max(sum(-(-one.size // 256) * 256 for one in lifetimes if one.first <= t < one.end) for t in range(81))
    assert needed <= size <= max(1.5 * needed, max(one.size for one in lifetimes) + ALIGNMENT)


def test_the_arena_of_a_chain_holds_two_links():
    """Each is read by the launch that makes the next."""
    lifetimes = [Lifetime(1000, i, i + 2) for i in range(50)]
    assert layout(lifetimes)[1] == 2048


@pytest.fixture
def library():
    """The kernels compiled for GPUs."""
    if plan.unavailable() is not None or cuda_kernels.emulated():
        pytest.skip("the library was built without CUDA, or an emulated one is loaded")


def test_kernels_for_gpus_refuse_other_tensors(library):
    x = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="append_features: x: expected tensors on a GPU"):
        cuda_kernels.append_features(x, torch.empty_like(x), None)


def test_kernels_for_gpus_are_recorded(library):
    """Without a GPU: launches and the places of addresses; their functions there are none of."""
    x = torch.randn(70, 33)
    recording = Recording(native, [x, None], x.device)
    assert [step.name for step in recording.steps] == ["cuda_append_features"] * 3
    source, temporary, statistics = (recording.relocations(step.data) for step in recording.steps)
    assert len({buffer for _, buffer, _ in source}) == 2 and len({buffer for _, buffer, _ in temporary}) == 2
    assert {buffer for _, buffer, _ in statistics} == {2, 3, 4, 5}
    if not torch.cuda.is_available():
        with pytest.raises(Unplannable, match="the CUDA kernel cuda_append_features: "):
            plan.make(native, [x, None], x.device)


def test_stand_ins_are_served_as_what_they_stand_for(monkeypatch):
    """In the thread that says so."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    monkeypatch.setattr(nvidia, "serves", lambda device, minimum: device == gpu)
    with nvidia.standing_in(gpu):
        assert triton.supports(cpu, torch.bfloat16) and cuda_kernels.supports(cpu, torch.bfloat16)
        assert nvidia.meant(torch.device("meta")).type == "meta"
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(nvidia.meant, cpu).result() == cpu
    assert nvidia.meant(cpu) == cpu
