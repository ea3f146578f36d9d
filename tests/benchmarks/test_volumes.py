"""``benchmarks/volumes.py`` on a tiny network."""

import csv

import pytest

import volumes

pytest.importorskip("monai", reason="monai is not installed (the Makefile installs it)")


def test_what_is_measured_of_volumes(monkeypatch, tmp_path, capsys):
    measured = []

    def peak(entry, options):
        measured.append(entry.converted)
        return 3 << 20 if entry.converted else (8 - entry.channels_last) << 20

    monkeypatch.setattr(volumes, "LAYERS", (2, 2))
    monkeypatch.setattr(volumes, "peak", peak)
    wanted = ["--sizes", "16", "20", "--dtypes", "fp32", "--repeats", "2", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["volumes.py", *wanted])
    volumes.main()
    with open(next(tmp_path.rglob("volumes.csv"))) as file:
        first, second = csv.DictReader(file)
    assert measured == [False, False, True] * 2
    assert (first["stock_mib"], first["ours_mib"], first["size"], second["size"]) == ("7", "3", "16", "20")
    assert (first["fused"], first["left"]) == ("1 Stem, 2 DenseBlock, 1 Transition", "")
    assert float(first["memory_ratio"]) == pytest.approx(3 / 7, rel=1e-5)
    assert float(first["speed_ratio"]) == pytest.approx(float(first["stock_s"]) / float(first["ours_s"]), rel=1e-4)
    assert all(0 < float(first[f"{name}_error_{what}"]) < 1 for name in ("stock", "ours") for what in volumes.ERRORS)
    assert "| 2 of 20x20x20" in capsys.readouterr().out and next(tmp_path.rglob("volumes.md")).is_file()


def test_the_peak_of_a_step_in_a_process_of_its_own():
    entry = volumes.Entry(32, 2, "bf16", True, True)
    assert 40 << 20 < volumes.peak(entry, volumes.argparse.Namespace(device="cpu", threads=1)) < 200 << 20
