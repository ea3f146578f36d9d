"""The benchmark command, on something tiny."""

import re

import pytest
import torch

from densenet_fast import bench
from densenet_fast.__main__ import main


@pytest.mark.parametrize("mode", [[], ["--infer", "--dtype", "bf16"]])
def test_table_of_all_competitors(mode, capsys, monkeypatch):
    if mode:
        monkeypatch.setattr(bench, "measured_memory", lambda *_: 1.0)
    tiny = ["--batch", "2", "--size", "64", "--repeats", "2", "--threads", "1"]
    assert main(["bench", *tiny, *mode]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == list(bench.competitors())
    for row in rows[1:]:
        assert float(row[1]) > 0 and re.fullmatch(r"\d+\.\d\dx", row[3]) and float(row[4]) >= 0
    assert max(float(row[3][:-1]) for row in rows if row[0].startswith("torchvision")) == 1


def test_a_network_that_torchvision_does_not_have(capsys, monkeypatch):
    monkeypatch.setattr(bench, "measured_memory", lambda *_: 1.0)
    tiny = ["--model", "densenet_bc100", "--batch", "11", "--size", "32", "--repeats", "1", "--threads", "1"]
    assert main(["bench", *tiny]) == 0
    out = capsys.readouterr().out
    assert "torchvision" not in out and "reference 1" in out and out.count("densenet_fast") == 4


def test_disagreement_is_not_timed(monkeypatch, capsys):
    def broken(name):
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(1000))
        model(torch.zeros(1, 3, 64, 64))
        return model

    honest = bench.competitors()
    wrong = {**honest, "wrong": bench.Competitor("wrong", broken, False)}
    monkeypatch.setattr(bench, "competitors", lambda: wrong)
    with pytest.raises(RuntimeError, match="wrong: its logits differ"):
        main(["bench", "--batch", "2", "--size", "64"])
    assert "|" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag, value", [("--batch", "0"), ("--size", "8"), ("--memory-of", "nobody"), ("--dtype", "int8")]
)
def test_bad_arguments(flag, value, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", flag, value])
    assert caught.value.code == 2 and flag in capsys.readouterr().err
