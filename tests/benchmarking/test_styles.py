"""``benchmarks/styles.py`` on tiny networks."""

import csv

import pytest

import styles


def test_what_is_measured_of_a_style(monkeypatch, tmp_path, capsys):
    tiny, measured = styles.Setting(4, (2, 2), 16, 4), []

    def peak(entry, options):
        measured.append(entry.converted)
        return 3 << 20 if entry.converted else (8 - entry.channels_last) << 20

    monkeypatch.setattr(styles, "SETTINGS", {"transition behind units": tiny, "fully convolutional": tiny})
    monkeypatch.setattr(styles, "peak", peak)
    wanted = ["--styles", *styles.SETTINGS, "--repeats", "2", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["styles.py", *wanted])
    styles.main()
    with open(next(tmp_path.rglob("styles.csv"))) as file:
        first, second = csv.DictReader(file)
    assert measured == [False, False, True] * 2
    assert (first["stock_mib"], first["ours_mib"]) == ("7", "3")
    assert float(first["memory_ratio"]) == pytest.approx(3 / 7, rel=1e-5)
    assert (first["fused"], first["left"], first["layers"]) == ("2 DenseBlock, 1 Transition", "", "2 2")
    assert second["style"] == "fully convolutional" and "3 DenseBlock" in second["fused"]
    assert float(first["speed_ratio"]) == pytest.approx(float(first["stock_s"]) / float(first["ours_s"]), rel=1e-4)
    assert "| fully convolutional" in capsys.readouterr().out and next(tmp_path.rglob("styles.md")).is_file()


def test_the_peak_of_a_step_in_a_process_of_its_own():
    options = styles.argparse.Namespace(device="cpu", threads=1)
    entry = styles.Entry("U-Net", styles.Setting(8, (2, 2, 2, 2), 64, 8), False, True)
    assert 10 << 20 < styles.peak(entry, options) < 200 << 20
