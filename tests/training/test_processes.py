"""What takes several processes: torchrun, the comparison, and the measurement of memory."""

import socket
from contextlib import ExitStack, nullcontext

import pytest
import torch
from training.support import DIGITS, PATH, checkpoint, command, table, train

from densenet_fast.memory import CLEAR_REFS
from densenet_fast.training.architecture import build_model
from densenet_fast.training.data import load_data
from densenet_fast.training.distributed import Processes
from densenet_fast.training.images import evaluation_loader
from densenet_fast.training.loop import Execution, evaluate
from densenet_fast.training.run import check_data
from densenet_fast.training.settings import Settings, UsageError, resolve

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
TORCHRUN = (*LAUNCH, "-m", "densenet_fast", "train")


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [socket.getsockname()[1] for socket in sockets]


@pytest.fixture
def importable(monkeypatch):
    """Lets the processes that a test starts import the package from here."""
    monkeypatch.setenv("PYTHONPATH", PATH)


def test_two_processes_with_sync_bn_train_as_one(tmp_path):
    arguments = [*DIGITS, "--epochs", 2, "--lr", 0.01]
    done = command(*TORCHRUN, *arguments, "--sync-bn", "--out", "two", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert "destroy_process_group" not in done.stderr
    train(*arguments, "--out", tmp_path / "one")
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert one["model"].keys() == two["model"].keys()
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert len(two["random_states"]) == 2
    assert not torch.equal(two["random_states"][0]["cpu"], two["random_states"][1]["cpu"])
    for row, expected in zip(two["metrics"], one["metrics"], strict=True):
        assert row["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
        assert row["train_accuracy"] == pytest.approx(expected["train_accuracy"])


def test_resuming_two_processes_is_exact(tmp_path):
    arguments = [*DIGITS, "--drop-rate", "0.3", "--milestones", "none", "--model", "reference"]
    runs = [
        [*arguments, "--epochs", "2", "--out", "straight"],
        [*arguments, "--epochs", "1", "--out", "resumed"],
        ["--resume", "resumed", "--epochs", "2"],
    ]
    # One start of torchrun for three runs, each with a store of its own: most of the time is spent on starting.
    program = f"""
import os
from densenet_fast.__main__ import main
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
for port, run in zip({free_ports(3)}, {runs}):
    os.environ["MASTER_PORT"] = str(port)
    assert main(["train", *run]) == 0
"""
    (tmp_path / "program.py").write_text(program)
    done = command(*LAUNCH, "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    straight, resumed = checkpoint(tmp_path / "straight")["model"], checkpoint(tmp_path / "resumed")["model"]
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)

    # The score of the epoch is that of the model in the checkpoint, not that of each process's own running statistics.
    state = checkpoint(tmp_path / "straight")
    settings = Settings(**state["settings"])
    data = load_data(settings)
    model = build_model(settings, in_channels=data.channels, num_classes=data.classes)
    model.load_state_dict(state["model"])
    loader = evaluation_loader(data.test, 64, rank=0, processes=1, workers=0, pin_memory=False)
    score = evaluate(model, loader, Execution(torch.device("cpu"), Processes()), "test")
    assert score.loss == pytest.approx(state["metrics"][-1]["test_loss"], rel=1e-5)


def test_bad_input_to_several_processes_is_said_once(tmp_path):
    (tmp_path / "out").write_text("in use")
    done = command(*TORCHRUN, *DIGITS, "--out", "out", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: --out: expected a new or empty directory, got out") == 1
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]


@pytest.mark.parametrize(("size", "fits"), [(15, False), (2, False), (4, True), (1437, False), (1436, True)])
def test_batches_must_divide_among_the_processes(size, fits):
    settings = resolve({"data": "digits", "batch_size": size})
    with nullcontext() if fits else pytest.raises(UsageError, match=f"--batch-size: .* got {size}"):
        check_data(settings, load_data(settings), 2)


def test_comparison(tmp_path, importable, capfd):
    arguments = ("--epochs", 2, "--drop-rate", 0.2, "--memory-efficient", "--compare", "reference")
    assert train(*DIGITS, *arguments, "--out", tmp_path / "out") == 0
    lines = capfd.readouterr().out.strip().splitlines()[-5:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "implementation",
        "test accuracy",
        "test loss",
        "seconds per step",
        "peak memory",
        "added by training",
    ]
    assert [row[0] for row in cells[2:]] == ["reference", "densenet_fast", "reference / densenet_fast"]

    out = tmp_path / "out"
    rows = table(out / "comparison.csv")
    assert [row["implementation"] for row in rows] == ["reference", "densenet_fast"]
    for row, shown in zip(rows, cells[2:]):
        last = table(out / row["implementation"] / "metrics.csv")[-1]
        assert row["test_accuracy"] == last["test_accuracy"] and row["test_loss"] == last["test_loss"]
        assert shown[1] == f"{100 * float(row['test_accuracy']):.2f} %"
        assert int(row["peak_memory_bytes"]) > int(row["added_memory_bytes"]) > 0
        assert shown[4] == f"{int(row['peak_memory_bytes']) / 2**20:.1f} MiB"
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")

    stock, ours = (checkpoint(out / name) for name in ("reference", "densenet_fast"))
    assert ours["settings"]["memory_efficient"] and not stock["settings"]["memory_efficient"]
    first = [state["metrics"][0] for state in (stock, ours)]
    assert first[0]["train_loss"] == pytest.approx(first[1]["train_loss"], rel=1e-4), "same weights, batches, dropout"


def test_a_failing_half_of_the_comparison_is_reported(tmp_path, importable, capfd):
    out = tmp_path / "out"
    assert train(*DIGITS, "--compare", "reference", "--out", out, "--lr", 1e30, "--epochs", 3) == 1
    assert "the run of reference failed with exit code 1" in capfd.readouterr().err
    assert not (out / "comparison.csv").exists()


@pytest.mark.skipif(not CLEAR_REFS.exists(), reason="the high-water mark can be set back on Linux only")
def test_peak_memory_counts_what_comes_after_the_baseline_and_is_freed_again(tmp_path):
    program = """
import torch
from densenet_fast.training.architecture import build_model
from densenet_fast.training.data import load_data
from densenet_fast.training.distributed import Processes
from densenet_fast.training.images import evaluation_loader
from densenet_fast.training.loop import Execution, evaluate
from densenet_fast.memory import PeakMemory
earlier = torch.ones(100 << 20, dtype=torch.uint8)
del earlier
memory = PeakMemory(torch.device("cpu"))
for _ in range(3):
    training = torch.ones(40 << 20, dtype=torch.uint8)
    del training
use = memory.read()
print(use.added >> 20, use.peak >> 20)
"""
    done = command("-c", program, cwd=tmp_path)
    added, peak = map(int, done.stdout.split())
    assert 39 <= added <= 48 and peak > 60
