"""What the groups say where something is wrong."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from backends.comparison import compare
from densenet_fast.benchmarking.ceilings import Ceilings
from densenet_fast.benchmarking.networks import architecture
from densenet_fast.benchmarking.traffic import training_step
from on_gpu import build, choices, cuda_kernels, kernel_times, kernels, machine_code, network, stand_ins, warm_up
from on_gpu.checks import CUDA, ERROR, LEFT_OUT, MEMORY, WRONG, Check, Wrong, carry_out
from on_gpu.settings import DRY

pytest.importorskip("triton", reason="Triton is not installed")


def test_the_worst_result_is_named():
    truth = {name: torch.ones(4, dtype=torch.float64) for name in ("Z", "dW", "mean")}
    stock = {name: torch.full((4,), 1.001) for name in truth}
    ours = {**stock, "dW": torch.full((4,), 1.5)}
    with pytest.raises(
        Wrong, match=r"1 of 3 results: dW: off by 5.00e-01, stock by 1.00e-03, allowed 2.00e-03"
    ) as told:
        kernels.verdict(compare(truth, stock, ours, torch.float32))
    assert told.value.measured["worst"] == "dW"
    assert kernels.verdict(compare(truth, stock, stock, torch.float32))["stock"] == pytest.approx(1e-3, rel=1e-3)


def test_another_result_in_a_later_run():
    results = iter([torch.zeros(3), torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])])
    with pytest.raises(Wrong, match="Z: 1 of 3 elements differ in run 2 from the first"):
        kernels.same_again(lambda: {"Z": next(results)}, 2)


def test_another_configuration_with_other_results(monkeypatch):
    monkeypatch.setattr(choices, "Bench", lambda *_: SimpleNamespace(fault=lambda tile: "result 3 is off by 5.0e-01"))
    with pytest.raises(Wrong, match="result 3 is off by 5.0e-01"):
        choices.compared(DRY, DRY.choices[0], DRY.choices[0].tiles["smaller"])


def test_a_replayed_step_with_other_results(monkeypatch):
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(network, "error", lambda got, expected: float(got.dim() == 1))
    with stand_ins.installed(), pytest.raises(Wrong, match="replayed gradients are off by 1.00e"):
        network.captured(DRY, "ours")


@pytest.mark.parametrize(
    "text, state, told",
    [
        ("print('no emulated kernels: nvcc was not found'); exit(1)", LEFT_OUT, "nvcc was not found"),
        ("print('some.cu(3): error'); exit(2)", ERROR, "some.cu(3): error"),
    ],
)
def test_a_build_that_fails(monkeypatch, text, state, told):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    settings = DRY._replace(build=[sys.executable, "-c", text])
    record = carry_out(Check("build", partial(build.build, settings)))
    assert record["state"] == state and told in record["error"]["message"]


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(cuda_kernels.backend, "unavailable", lambda: "built without CUDA")
    (check, *_) = cuda_kernels.checks(DRY)
    assert carry_out(check)["error"]["message"] == "built without CUDA"


def test_the_floor_of_what_a_block_completes_is_the_sums():
    """No kernel of its own is launched for it; transitions and the head have one."""
    rows = {name: {"seconds": 1.0, "launches": 1.0} for name in ("sum_partials", "finalise_gradient")}
    kernel_times.add_floors(rows, DRY, Ceilings(bandwidth=1.0, products=1.0), torch.float32)
    network = architecture(DRY.network)
    calls = training_step(network, DRY.profiled, DRY.size, 4)
    completed = [c for c in calls if c.kernel == "finalise_gradient"]
    of_blocks = [c for c in completed if c.part.startswith("block")]
    assert len(of_blocks) == sum(network["block_config"])
    assert rows["sum_partials"]["calls"] == len(of_blocks)
    assert rows["sum_partials"]["bytes"] == sum(c.bytes for c in of_blocks)
    assert rows["finalise_gradient"]["calls"] == len(completed) - len(of_blocks) > 0


def test_kernels_that_do_not_compile(monkeypatch):
    monkeypatch.setattr(warm_up.launch, "compiled", lambda item: 1 / 0)
    with stand_ins.installed(), pytest.raises(Wrong, match="2 of 2 kernels: .*: ZeroDivisionError: division by zero"):
        warm_up.compile_all(DRY)


def test_kernels_with_faults_in_their_machine_code(monkeypatch):
    monkeypatch.setattr(machine_code.tune, "code_fault", lambda items: "3 hazards")
    with stand_ins.installed(), pytest.raises(Wrong, match="2 of 2 kernels: .*: 3 hazards"):
        machine_code.faults(DRY)


@pytest.mark.parametrize(
    "error, state",
    [
        (Wrong("dW is off"), WRONG),
        (MemoryError("no"), MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory"), MEMORY),
        (torch.AcceleratorError("CUDA error: misaligned address"), CUDA),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), CUDA),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), CUDA),
        (RuntimeError("expected 4 columns"), ERROR),
    ],
)
def test_states(error, state):
    def raises():
        raise error

    assert carry_out(Check("some", raises))["state"] == state
