"""A run that was interrupted and resumed is the run that was not."""

import shutil

import pytest
import torch
from training.support import DIGITS, TINY, checkpoint, differences, table, train

from densenet_fast.training import files, run

TIMES = ("seconds_per_step", "images_per_second")


def interrupt(monkeypatch, epoch):
    """Makes the ``epoch``-th call of train_epoch end the run after it has changed the model."""
    real, calls = run.train_epoch, []

    def train_epoch(*arguments):
        calls.append(1)
        result = real(*arguments)
        if len(calls) == epoch:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(run, "train_epoch", train_epoch)


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "reference", "--workers", 2),
        ("--model", "densenet"),
        ("--model", "densenet", "--memory-efficient", "--amp", "bf16", "--channels-last"),
    ],
    ids=["reference", "densenet", "densenet-bf16"],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, monkeypatch, options):
    arguments = [*DIGITS, "--epochs", 3, "--drop-rate", 0.3, "--seed", 5, *options]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert train(*arguments, "--out", straight) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert train(*arguments, "--out", resumed) == 130
    assert checkpoint(resumed)["epoch"] == 2
    torch.manual_seed(123)
    torch.rand(7)
    assert train("--resume", resumed) == 0

    one, other = checkpoint(straight), checkpoint(resumed)
    for state in (one, other):
        for name in ("out", "resume"):
            del state["settings"][name]
        for row in state["metrics"]:
            for name in TIMES:
                del row[name]
    assert differences(one, other) == []
    momenta = [state["momentum_buffer"] for state in one["optimizer"]["state"].values()]
    assert len(momenta) == len(list(one["optimizer"]["param_groups"][0]["params"]))
    assert all(momentum.abs().sum() > 0 for momentum in momenta)

    rows, straight_rows = table(resumed / "metrics.csv"), table(straight / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row, expected in zip(rows, straight_rows, strict=True):
        assert {k: v for k, v in row.items() if k not in TIMES} == {k: v for k, v in expected.items() if k not in TIMES}


def test_dropout_is_part_of_what_resuming_restores(tmp_path, monkeypatch):
    """Without the random states the resumed run would differ: the test above can fail."""
    arguments = [*DIGITS, "--epochs", 2, "--drop-rate", 0.3, "--model", "reference"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(*arguments, "--out", straight)
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        train(*arguments, "--out", resumed)
    monkeypatch.setattr(run.checkpoint, "_set_random_state", lambda *_: None)
    train("--resume", resumed)
    assert differences(checkpoint(straight)["model"], checkpoint(resumed)["model"])


def test_more_epochs_and_another_directory(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(*DIGITS, "--epochs", 1, "--out", first)
    before = (first / "checkpoint.pt").read_bytes()
    assert train("--resume", first / "checkpoint.pt", "--epochs", 2, "--out", second) == 0
    assert (first / "checkpoint.pt").read_bytes() == before
    assert [row["epoch"] for row in table(second / "metrics.csv")] == ["1", "2"]


@pytest.fixture
def finished(tmp_path):
    train(*DIGITS, "--epochs", 1, "--out", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--growth-rate", 4), "--growth-rate: expected 2, as in the run to be resumed, got 4"),
        (("--data", "cifar10"), "--data: expected digits, as in the run to be resumed, got cifar10"),
        (("--model", "reference"), "--model: expected densenet, as in the run to be resumed, got reference"),
        (("--lr", 0.5), "--lr: expected 0.1, as in the run to be resumed, got 0.5"),
        (("--preset", "d2l"), "--preset: expected none with --resume"),
        ((), "--epochs: expected more than the 1 epochs already trained, got 1"),
        (("--compare", "reference"), "--resume: expected a run of one model"),
    ],
)
def test_what_resuming_refuses(finished, capsys, arguments, message):
    before = (finished / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as exit:
        train("--resume", finished, *arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
    assert (finished / "checkpoint.pt").read_bytes() == before


def test_other_data_is_refused(finished, capsys):
    state = checkpoint(finished)
    state["data"]["train_images"] = 1436
    torch.save(state, finished / "checkpoint.pt")
    with pytest.raises(SystemExit):
        train("--resume", finished, "--epochs", 2)
    assert "(train images: 1436), got 1437" in capsys.readouterr().err


def test_damaged_checkpoint_is_named(finished, capsys):
    (finished / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(SystemExit):
        train("--resume", finished, "--epochs", 2)
    assert "--resume: expected a checkpoint, got" in capsys.readouterr().err


def test_crash_while_writing_keeps_the_old_checkpoint(finished, monkeypatch):
    before = (finished / "checkpoint.pt").read_bytes()
    copy = finished.with_name("copy")
    shutil.copytree(finished, copy)

    def half_written(state, file):
        file.write(b"half of a checkpoint")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_written)
        with pytest.raises(OSError, match="no space left"):
            train("--resume", finished, "--epochs", 2)
    assert (finished / "checkpoint.pt").read_bytes() == before
    assert not list(finished.glob(".*"))
    assert train("--resume", finished, "--epochs", 2) == 0


def test_atomic_file_shows_nothing_before_it_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files.atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys, monkeypatch):
    real = run.evaluate
    monkeypatch.setattr(
        run, "evaluate", lambda model, *rest: (real(model, *rest), model.classifier.weight.data.fill_(float("nan")))[0]
    )
    assert train("--data", "digits", *TINY, "--epochs", 3, "--out", tmp_path / "run") == 1
    assert "the training loss of epoch 2 is nan" in capsys.readouterr().err
    assert checkpoint(tmp_path / "run")["epoch"] == 1
