"""Two and three processes over gloo, beside one process on the joined batch or on each share of it."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from integration.support import assert_close
from torch import nn

import densenet_fast
from helpers import randomise

ARGUMENTS = dict(growth_rate=4, block_config=(2, 1), num_init_features=6, num_classes=3)
SHARES = {2: [1, 4], 3: [1, 2, 2]}
OF_THREE = ["plain", "sync_batch_norm", "sync_batch_norm_of_torch", "collectives", "fully_shard_blocks"]
"""The scenarios that three processes run; two run all."""
TOLERANCE = 1e-9


def runs_of(*scenarios: str) -> pytest.MarkDecorator:
    cases = [(2, name) for name in scenarios] + [(3, name) for name in scenarios if name in OF_THREE]
    return pytest.mark.parametrize("world_size, scenario", cases)


def write_case(folder: Path, shares: list[int], scenarios: list[str] | None = None) -> dict:
    torch.manual_seed(0)
    model = randomise(densenet_fast.DenseNet(**ARGUMENTS).double())
    case = dict(arguments=ARGUMENTS, state=model.state_dict(), shares=shares, scenarios=scenarios)
    case["x"] = torch.randn(sum(shares), 3, 40, 33, dtype=torch.float64)
    case["cotangent"] = torch.randn(sum(shares), 3, dtype=torch.float64)
    torch.save(case, folder / "case.pt")
    return case


def start(folder: Path, world_size: int, *arguments: str) -> list[subprocess.Popen]:
    """The processes, their output in ``FOLDER/RANK.log``."""
    script = Path(__file__).with_name("distributed_worker.py")
    root = str(Path(densenet_fast.__file__).parents[1])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
            **dict(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="localhost", MASTER_PORT=str(port)),
            "OMP_NUM_THREADS": "1",
        }
        with open(folder / f"{rank}.log", "w") as log:
            command = [sys.executable, str(script), str(folder), *arguments]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return processes


def wait(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()


class Runs:
    """What the processes of every scenario wrote, made once for all workers of a test run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, world_size: int, scenario: str) -> tuple[dict, list[dict]]:
        folder = self.folder / f"distributed-{world_size}"
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                write_case(folder, SHARES[world_size], OF_THREE if world_size == 3 else None)
                codes = wait(start(folder, world_size), 300)
                assert not any(codes), "\n".join((folder / f"{r}.log").read_text() for r in range(world_size))[-5000:]
        results = [torch.load(folder / f"{rank}.pt", weights_only=True)[scenario] for rank in range(world_size)]
        return torch.load(folder / "case.pt", weights_only=True), results


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    return Runs(folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


def model_of(case: dict, state: dict | None = None, **options) -> densenet_fast.DenseNet:
    model = densenet_fast.DenseNet(**{**case["arguments"], **options}).double()
    model.load_state_dict(state or case["state"])
    return model


def step(model: nn.Module, x: torch.Tensor, cotangent: torch.Tensor, steps: int = 1) -> dict:
    for _ in range(steps):
        x = x.detach().clone().requires_grad_()
        model.zero_grad()
        output = model(x)
        output.backward(cotangent)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"output": output.detach(), "x": x.grad, "gradients": gradients, "buffers": dict(model.named_buffers())}


def of_each_share(case: dict, steps: int = 1) -> list[dict]:
    """One process's step on each share: what each normalises by itself."""
    shares = case["shares"]
    parts = zip(case["x"].split(shares), case["cotangent"].split(shares))
    return [step(model_of(case), x, cotangent, steps) for x, cotangent in parts]


def mean_gradients(results: list[dict]) -> dict:
    return {name: sum(r["gradients"][name] for r in results) / len(results) for name in results[0]["gradients"]}


@runs_of("plain", "static_graph", "compiled")
def test_distributed_data_parallel(runs, world_size, scenario):
    """Each process normalises its own images; the gradients are the mean over the processes."""
    case, results = runs(world_size, scenario)
    alone = of_each_share(case)
    for got, expected in zip(results, alone):
        for key in ("output", "x", "buffers"):
            assert_close(got[key], expected[key], TOLERANCE, key)
        assert_close(got["gradients"], mean_gradients(alone), TOLERANCE)
        assert all(g.equal(results[0]["gradients"][name]) for name, g in got["gradients"].items())


def test_no_sync_accumulates(runs):
    case, results = runs(2, "no_sync")
    alone = of_each_share(case)
    mean = mean_gradients(alone)
    for got, expected in zip(results, alone):
        for name, gradient in expected["gradients"].items():
            assert_close(got["before"][name], 2 * gradient, TOLERANCE, name)
            assert_close(got["gradients"][name], 3 * mean[name], TOLERANCE, name)


SYNCHRONISED = {
    "sync_batch_norm": {},
    "sync_batch_norm_of_torch": {},
    "sync_batch_norm_unfused": {},
    "sync_batch_norm_compiled": {},
    "sync_batch_norm_memory_efficient": dict(memory_efficient=True),
    "sync_batch_norm_without_bottleneck": dict(bn_size=None),
}


@runs_of(*SYNCHRONISED)
def test_sync_batch_norm_equals_one_process_on_the_joined_batch(runs, world_size, scenario):
    """Of batches that differ in size from process to process; two steps."""
    case, results = runs(world_size, scenario)
    model = model_of(case, results[0].get("state"), **SYNCHRONISED[scenario])
    expected = step(model, case["x"], case["cotangent"], steps=2)
    assert_close(torch.cat([r["output"] for r in results]), expected["output"], TOLERANCE)
    assert_close(torch.cat([r["x"] for r in results]), expected["x"], TOLERANCE)
    for result in results:
        total = {name: gradient * world_size for name, gradient in result["gradients"].items()}
        assert_close(total, expected["gradients"], TOLERANCE)
        assert_close(result["buffers"], expected["buffers"], TOLERANCE)


@pytest.mark.parametrize("world_size", [2, 3])
def test_statistics_travel_once_per_feature(runs, world_size):
    """A block of three layers on 6 channels, k = 5, bottlenecks of 20: means and variances of each column of F but the
    last layer's, which nobody in the block reads, and of each bottleneck; backward P and Q of the same columns."""
    _, results = runs(world_size, "collectives")
    columns = [6, 20, 5, 20, 5, 20]
    for result in results:
        assert result["forward"] == [*(("all_gather", 2 * n + 1) for n in columns), ("all_reduce", 1)]
        assert result["backward"] == [("all_reduce", 2 * n) for n in reversed(columns)]


SHARDED = {
    "fully_shard_model": dict(DenseBlock=True, Transition=True, Stem=True, Head=True),
    "fully_shard_blocks": dict(DenseBlock=True, Transition=True, Stem=True, Head=True),
    "fully_shard_layers": dict(DenseBlock=False, Transition=True, Stem=True, Head=True),
}


@runs_of(*SHARDED)
def test_fsdp2_fully_shard(runs, world_size, scenario):
    """The whole model, its blocks too, or every layer, whose block then runs them one by one."""
    case, results = runs(world_size, scenario)
    alone = of_each_share(case, steps=2)
    for got, expected in zip(results, alone):
        assert got["fused"] == SHARDED[scenario]
        for key in ("output", "x", "buffers"):
            assert_close(got[key], expected[key], TOLERANCE, key)
        assert_close(got["gradients"], mean_gradients(alone), TOLERANCE)


def test_fsdp2_in_bfloat16(runs):
    case, results = runs(2, "fully_shard_bfloat16")
    for got, expected in zip(results, of_each_share(case, steps=2)):
        assert got["output"].dtype == torch.bfloat16
        assert (got["output"].double() - expected["output"]).norm() <= 0.1 * expected["output"].norm()
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in got["gradients"].values())


def test_a_process_that_dies_leaves_an_error_and_no_hang(tmp_path):
    write_case(tmp_path, [2, 2])
    begin = time.monotonic()
    codes = wait(start(tmp_path, 2, "die"), 120)
    assert codes[1] == 3 and codes[0] not in (0, -9)
    assert "Error" in (tmp_path / "0.log").read_text()
    assert time.monotonic() - begin < 100


def test_sync_batch_norm_in_one_process_is_batch_norm():
    model = randomise(densenet_fast.DenseNet(4, (2, 2), 6, num_classes=3).double())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    synchronised = densenet_fast.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert synchronised(x).allclose(expected, rtol=1e-12)
    assert type(synchronised.features.norm0) is densenet_fast.nn.SyncBatchNorm
