"""Defaults, presets, and what the command says to bad input."""

import pytest
from torch import nn
from training.support import DIGITS, train

from densenet_fast import reference
from densenet_fast.__main__ import main
from densenet_fast.training.architecture import build_model, check_image_size
from densenet_fast.training.loop import learning_rate
from densenet_fast.training.settings import DATA_SETS, UsageError, resolve


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data: expected one of digits, "),
        (("--data", "mnist"), "argument --data: invalid choice: 'mnist'"),
        (("--data", "digits", "--lr", "-1"), "argument --lr: expected a number above 0, got '-1'"),
        (("--data", "digits", "--lr", "nan"), "argument --lr: expected a number above 0, got 'nan'"),
        (
            ("--data", "digits", "--drop-rate", "1.5"),
            "argument --drop-rate: expected a number of at least 0, at most 1",
        ),
        (("--data", "digits", "--epochs", "2.5"), "argument --epochs: expected an integer of at least 1, got '2.5'"),
        (
            ("--data", "digits", "--block-config", "4,x"),
            "argument --block-config: expected layers per block as 16,16,16",
        ),
        (("--data", "digits", "--device", "tpu"), "argument --device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (("--data", "digits", "--device", "cuda:99"), "argument --device: expected a device torch can use"),
        (("--data", "digits", "--batch-size", "1438"), "--batch-size: expected at most the 1437 training images"),
        (("--data", "digits", "--model", "densenet121"), "--image-size: expected at least 29 for this network, got 8"),
        (
            ("--data", "digits", "--model", "densenet121", "--growth-rate", "8"),
            "--growth-rate: expected only with --model",
        ),
        (("--data", "digits", "--model", "reference", "--memory-efficient"), "--memory-efficient: expected one of our"),
        (
            ("--data", "digits", "--model", "reference", "--compare", "reference"),
            "--compare: expected one of our models",
        ),
        (("--data", "digits", "--momentum", "0", "--nesterov"), "--nesterov: expected a --momentum above 0, got 0"),
        (("--data", "digits", "--initial-weights", "none.pt"), "--initial-weights: expected a state dict"),
        (("--data", "cifar10"), "--root: expected the directory of --data cifar10, got nothing"),
        (("--data", "cifar10", "--root", "nowhere"), "--root: expected a directory, got nowhere"),
        (("--data", "cifar100", "--root", "."), "--root: expected train, test in cifar-100-python (or the archive"),
        (("--data", "fashion-mnist", "--root", "."), "--root: expected train-images-idx3-ubyte"),
        (("--data", "imagefolder", "--root", "."), "--root: expected ./train/CLASS/*.jpg and ./val/CLASS/*.jpg"),
        (
            ("--data", "imagefolder", "--root", ".", "--download"),
            "--download: expected a data set with a public address",
        ),
        (("--resume", "nowhere"), "--resume: expected a checkpoint or a run directory with checkpoint.pt, got nowhere"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        train(*arguments)
    assert exit.value.code == 2
    assert message.replace("./", "") in capsys.readouterr().err.replace("./", "")
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        train(*DIGITS, "--out", tmp_path)
    assert "--out: expected a new or empty directory" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_default_directories_are_new_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits-2"):
        assert train(*DIGITS, "--epochs", 1, "--model", "reference") == 0
        assert f"writing to runs/{name}\n" in capsys.readouterr().out
        assert {file.name for file in (tmp_path / "runs" / name).iterdir()} == {
            "checkpoint.pt",
            "curves.png",
            "metrics.csv",
            "summary.json",
        }
    assert (tmp_path / "runs" / "digits" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_missing_package_is_named(monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name))
    with pytest.raises(SystemExit):
        train(*DIGITS)
    assert "pip install scikit-learn" in capsys.readouterr().err


def test_without_arguments_the_command_prints_help(capsys):
    assert main([]) == 0
    assert "train" in capsys.readouterr().out


def test_info_prints_the_report(capsys):
    assert main(["info"]) == 0
    assert "cpu" in capsys.readouterr().out


def test_d2l_preset_is_the_chapters_network_and_training():
    settings = resolve({"preset": "d2l", "model": "reference"})
    model = build_model(settings, in_channels=1, num_classes=10)
    expected = reference.DenseNet(32, (4,) * 4, 64, None, num_classes=10, in_channels=1, bias=True)
    assert str(model) == str(expected)
    assert settings.data == "fashion-mnist" and settings.image_size == 96 and not settings.augment
    assert (settings.batch_size, settings.lr, settings.epochs, settings.momentum) == (128, 0.1, 10, 0)
    assert (settings.nesterov, settings.weight_decay, settings.milestones) == (False, 0, ())


@pytest.mark.parametrize("given", [{"preset": "cifar-bc-100"}, {"data": "cifar10"}])
def test_cifar_preset_is_the_papers(given):
    settings = resolve(given)
    model = build_model(settings, in_channels=3, num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 769_162
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) + 1 == 100
    rates = [learning_rate(settings.lr, settings.milestones, epoch, settings.epochs) for epoch in range(300)]
    assert rates == pytest.approx([0.1] * 150 + [0.01] * 75 + [0.001] * 75)
    assert (settings.batch_size, settings.momentum, settings.nesterov, settings.weight_decay) == (64, 0.9, True, 1e-4)


def test_flags_override_presets_and_presets_the_data_set():
    settings = resolve({"preset": "d2l", "data": "digits", "lr": 0.5, "growth_rate": 8})
    assert (settings.data, settings.lr, settings.growth_rate) == ("digits", 0.5, 8)
    assert settings.batch_size == 128 and settings.bn_size is None


@pytest.mark.parametrize("name", reference.ARCHITECTURES)
def test_named_models_are_the_papers(name):
    settings = resolve({"data": "cifar10", "model": f"reference-{name}"})
    model = build_model(settings, in_channels=3, num_classes=1000)
    assert str(model) == str(getattr(reference, name)())


def test_imagefolder_trains_densenet121_unless_told_otherwise():
    for model in ("densenet", "reference"):
        settings = resolve({"data": "imagefolder", "model": model})
        built = build_model(settings, in_channels=3, num_classes=1000)
        assert built.state_dict().keys() == reference.densenet121().state_dict().keys()


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_the_smallest_image_size_is_the_smallest_that_works(small, blocks):
    import torch

    settings = resolve({"data": "cifar10", "block_config": (1,) * blocks, "small_inputs": small, "model": "reference"})
    model = build_model(settings, in_channels=3, num_classes=2).eval()
    for size in range(1, 40):
        try:
            check_image_size(settings, size)
        except UsageError:
            with pytest.raises(RuntimeError):
                model(torch.zeros(1, 3, size, size))
        else:
            model(torch.zeros(1, 3, size, size))


def test_every_data_set_has_defaults_that_resolve():
    for name in DATA_SETS:
        assert resolve({"data": name}).data == name
