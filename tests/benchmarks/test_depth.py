"""Depth: what does not fit is said, what does is not left out, and a kill loses no depth that was done."""

import csv

import pytest

import depth
from densenet_fast.benchmarking.memory import OUT_OF_MEMORY, Memory
from densenet_fast.benchmarking.times import Timing

GIB = 1 << 30


def quadratic(depth):
    return 0.02 * depth**2 + 0.1 * depth


def test_a_quadratic_is_continued_exactly():
    rows = [{"depth": L, "peak_mib": 1024 * quadratic(L)} for L in (10, 16, 22)]
    assert depth.expected_gib(rows, 28) == pytest.approx(quadratic(28))
    assert depth.expected_gib(rows[:1], 28) == pytest.approx(2.8 * quadratic(10))
    assert depth.expected_gib([], 28) == 0


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script with simulated memories and times; returns the CSV's rows, and the batches that were tried."""

    def runs(limit, most=100.0, last=28):
        tried = []

        def measure(job):
            layers = int(job.network.removeprefix("densenet_bc"))
            if layers > last:
                raise KeyboardInterrupt
            tried.append((job.competitor, layers))
            need = quadratic(layers) if job.competitor == "torchvision" else 0.05 * layers
            return Memory(failure=OUT_OF_MEMORY) if need > most else Memory(added=int(need * GIB))

        def measure_times(turns, *place):
            return [Timing(entry, batch, [0.01]) for entry, batch in turns]

        monkeypatch.setattr(depth, "measure", measure)
        monkeypatch.setattr(depth, "measure_times", measure_times)
        flags = ["--depths", "10", "16", "22", "28", "--memory-limit", str(limit), "--out", str(tmp_path)]
        monkeypatch.setattr("sys.argv", ["depth.py", *flags])
        try:
            depth.main()
        except KeyboardInterrupt:
            pass
        with open(next(tmp_path.rglob("depth.csv"))) as file:
            return list(csv.DictReader(file)), tried, tmp_path

    return runs


def test_what_would_not_fit_is_a_row_that_says_so(run, capsys):
    rows, tried, folder = run(limit=15)
    stock = {row["depth"]: row for row in rows if row["competitor"] == "torchvision"}
    assert ("torchvision", 22) in tried and ("torchvision", 28) not in tried and ("ours", 28) in tried
    assert stock["22"]["failure"] == "" and stock["28"]["peak_mib"] == stock["28"]["median_s"] == ""
    assert stock["28"]["failure"] == "does not fit in 15.0 GiB, about 18.5 GiB expected"
    streams = capsys.readouterr()
    assert stock["28"]["failure"] in streams.out and stock["28"]["failure"] in streams.err
    assert stock["28"]["failure"] in next(folder.rglob("depth.md")).read_text()
    assert "depth 22, ours: memory" in streams.err and "densenet_bc22: times of torchvision," in streams.err


def test_what_did_not_fit_is_not_tried_deeper(run):
    rows, tried, _ = run(limit=1000, most=10)
    stock = [row["failure"] for row in rows if row["competitor"] == "torchvision"]
    assert stock[:3] == ["", "", "does not fit: out of memory"] and stock[3].startswith("does not fit in")
    assert ("torchvision", 22) in tried and ("torchvision", 28) not in tried


def test_an_end_in_between_loses_nothing(run):
    rows, _, folder = run(limit=1000, last=16)
    assert [row["depth"] for row in rows] == ["10", "16"] * 4 and all(row["median_s"] for row in rows)
    assert next(folder.rglob("depth.png")).read_bytes().startswith(b"\x89PNG")


def test_the_curve_says_from_where_on_it_is_missing():
    failed = {"depth": 28, "competitor": "torchvision", "peak_mib": None, "failure": "does not fit: out of memory"}
    known = {"depth": 22, "competitor": "torchvision", "peak_mib": 1.0, "failure": "", "mib_per_layer": None}
    (line,) = depth.lines_of([known, failed], "peak_mib", 1, "mib_per_layer", "MiB")
    assert line.xs == [22] and line.label == "torchvision\nL = 28 does not fit"
