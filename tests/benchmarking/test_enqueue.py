"""The time to enqueue a step beside the time to finish it, over what stands in for a GPU's clock."""

import pytest
import torch

from densenet_fast.benchmarking import times
from densenet_fast.benchmarking.competitors import Entry
from densenet_fast.benchmarking.results import bench_rows, bench_table, best_rows, write_csv
from densenet_fast.benchmarking.times import Timing, measure_times

NETWORK, SIZE = "densenet_bc10", 16
SETTING = {"network": NETWORK, "batches": "given"}
HOST, DEVICE = 0.25, 4.0
"""Seconds that the host takes to enqueue a step, and the device to do it."""


class StandIn:
    """A clock that the host and the device move on, and a device that has its work to do until somebody waits."""

    def __init__(self):
        self.now, self.busy, self.log = 0.0, 0.0, []

    def enqueue(self, run, images, dtype, train, parameters):
        self.log.append("enqueue")
        self.now += HOST
        self.busy = DEVICE

    def synchronize(self, device):
        assert device.type == "cuda"
        self.log.append("wait")
        self.now, self.busy = self.now + self.busy, 0.0


@pytest.fixture
def gpu(monkeypatch):
    """Its models and images are on the CPU."""
    made, model, images = StandIn(), Entry.model, Entry.images
    cpu = torch.device("cpu")
    monkeypatch.setattr(Entry, "model", lambda self, device, train: model(self, cpu, train))
    monkeypatch.setattr(Entry, "images", lambda self, batch, size, device: images(self, batch, size, cpu))
    monkeypatch.setattr(times, "enqueue", made.enqueue)
    monkeypatch.setattr(times.time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return made


def test_a_step_is_timed_until_it_is_enqueued_and_until_it_is_done(gpu):
    turns = [(Entry(name, "channels_last", NETWORK), 2) for name in ("reference", "ours")]
    timings = measure_times(turns, SIZE, torch.bfloat16, True, torch.device("cuda"), repeats=3)
    for timing in timings:
        assert timing.enqueued == [HOST] * 3 and timing.seconds == [HOST + DEVICE] * 3
        assert timing.enqueue_seconds == HOST
    steps = len(timings) * (times.WARM_UPS["cuda"] + 3)
    assert gpu.log == ["wait", "enqueue", "wait"] * steps


def test_a_column_of_it_for_each_competitor(gpu, tmp_path):
    turns = [(Entry(name, "channels_last", NETWORK), 2) for name in ("reference", "ours")]
    timings = measure_times(turns, SIZE, torch.bfloat16, True, torch.device("cuda"), repeats=3)
    timings.append(Timing(Entry("timm", "channels_last", NETWORK), 2, failure="out of memory"))
    rows = bench_rows(timings, [None] * 3, SETTING, "reference", {})
    assert [row["enqueue_s"] for row in rows] == [HOST, HOST, None]
    header, _, *lines = bench_table(best_rows(rows), "reference").splitlines()
    columns = [[cell.strip() for cell in line.split("|")] for line in (header, *lines)]
    place = columns[0].index("ms to enqueue")
    assert [row[place] for row in columns[1:]] == ["250.0", "250.0", "-"]
    assert [row[columns[0].index("ms")] for row in columns[1:]] == ["4250.0", "4250.0", "out of memory"]
    write_csv(tmp_path / "rows.csv", rows)
    assert "p80_s,enqueue_s,repeats" in (tmp_path / "rows.csv").read_text()


def test_on_a_cpu_a_step_is_done_when_the_call_returns():
    """And there is no such column."""
    turns = [(Entry("ours", "channels_last", NETWORK), 2)]
    timings = measure_times(turns, SIZE, torch.float32, True, torch.device("cpu"), repeats=2)
    assert timings[0].enqueued == [] and timings[0].enqueue_seconds is None and len(timings[0].seconds) == 2
    rows = bench_rows(timings, [None], SETTING, "ours", {})
    assert "enqueue_s" not in rows[0] and "enqueue" not in bench_table(rows, "ours")
