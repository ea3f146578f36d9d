"""The pages say of GPUs what the committed results say."""

import json

import pytest

import gpu_tables
from figures import rewritten


@pytest.mark.parametrize("name", gpu_tables.PAGES)
def test_the_pages_are_up_to_date(name):
    """If not: python benchmarks/gpu_tables.py."""
    text = (gpu_tables.ROOT / name).read_text()
    assert text == rewritten(text, gpu_tables.PAGES[name](gpu_tables.load()), gpu_tables.MARK)


def row(batch, competitor, **values):
    return {"batch": batch, "competitor": competitor, "failure": "", **values}


RESULTS = {
    "conditions": {
        "device": "NVIDIA Some 9000",
        "driver": "580.1",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "commit": "abc1234",
        "date": "2030-01-02",
    },
    "steps": [
        {"name": "one", "tests": {"passed": 20, "failed": 1}},
        {"name": "two", "tests": {"passed": 3}},
        {"name": "three"},
    ],
    "training": [
        row(32.0, "torchvision", median_s=0.02, speed_ratio=1.0, memory_ratio=1.0),
        row(32.0, "ours", median_s=0.01, speed_ratio=2.0, memory_ratio=0.25),
        row(32.0, "ours-me", median_s=0.0125, speed_ratio=1.6, memory_ratio=0.125),
        row(256.0, "torchvision", failure="out of memory", median_s=""),
        row(256.0, "ours", median_s=0.08, speed_ratio="", memory_ratio=""),
    ],
    "inference": [row(32.0, "ours", median_s=0.004, speed_ratio="", memory_ratio="")],
    "compiled": [row(32.0, "compile", median_s=0.016, speed_ratio=1.25)],
}


def test_tables_of_made_up_results(tmp_path):
    (tmp_path / "some_gpu").mkdir()
    (tmp_path / "some_gpu/results.json").write_text(json.dumps(RESULTS))
    loaded = gpu_tables.load(tmp_path)
    heading, _, _, _, small, large, inference = gpu_tables.speeds(loaded).splitlines()
    assert "NVIDIA Some 9000, driver 580.1, torch 2.11.0, Triton 3.6.0, commit abc1234, 2030-01-02" in heading

    def cells(line):
        return [cell.strip() for cell in line.strip("|").split("|")]

    assert cells(small) == ["training step", "32", "20.0 ms", "10.0 ms", "2.00x", "0.25", "1.60x, 0.12", "1.25x"]
    assert cells(large) == ["training step", "256", "out of memory", "80.0 ms", "-", "-", "-, -", "-"]
    assert cells(inference) == ["inference", "32", "-", "4.0 ms", "-", "-", "-, -", "-"]
    assert gpu_tables.tests(loaded).endswith("2030-01-02: tests 23 passed, 1 failed")


def test_the_command_writes_the_pages(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for name in gpu_tables.PAGES:
        (tmp_path / name).write_text("before <!-- gpu table -->old<!-- end of gpu table --> after")
    monkeypatch.setattr(gpu_tables, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_tables, "load", lambda: [RESULTS])
    gpu_tables.main()
    for name, render in gpu_tables.PAGES.items():
        expected = f"before <!-- gpu table -->\n{render([RESULTS])}\n<!-- end of gpu table --> after"
        assert (tmp_path / name).read_text() == expected


def test_without_results(tmp_path):
    assert gpu_tables.speeds(gpu_tables.load(tmp_path)) == gpu_tables.tests([]) == gpu_tables.NONE


def test_without_marks():
    with pytest.raises(ValueError, match="expected <!-- gpu table -->"):
        rewritten("no marks", "text", gpu_tables.MARK)
