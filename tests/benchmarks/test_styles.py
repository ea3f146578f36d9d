"""``benchmarks/styles.py`` on tiny networks."""

import csv
import re
from pathlib import Path

import pytest

import styles

DOCUMENT = Path(__file__).parents[2] / "docs" / "conversion-styles.md"


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


def test_the_figures_of_the_document_are_the_results():
    text = DOCUMENT.read_text()
    results = DOCUMENT.parent / re.search(r"\((\S+/styles)\.md\)", text)[1]
    with open(f"{results}.csv") as file:
        measured = {
            row["style"]: (f"{float(row['speed_ratio']):.2f}x", f"{float(row['memory_ratio']):.2f}")
            for row in csv.DictReader(file)
        }
    table = text[text.index("<!-- style table -->") : text.index("<!-- end of style table -->")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[3:]]
    assert {style: (speed, memory) for style, *_, speed, memory in rows} == measured
    assert measured.keys() == styles.STYLES.keys()
