"""The pages say of speed and memory what the committed results say."""

import re

import pytest

import fast_where
from figures import rewritten


@pytest.mark.parametrize("name", fast_where.PAGES)
def test_the_pages_are_up_to_date(name):
    """If not: python benchmarks/fast_where.py."""
    text = (fast_where.ROOT / name).read_text()
    assert text == rewritten(text, fast_where.PAGES[name](fast_where.RESULTS), fast_where.MARK)


def test_the_first_words_of_the_readme():
    """Their ranges over the training steps in float32 on CPUs and in bfloat16 on GPUs, and the largest batches."""
    results = fast_where.RESULTS
    paths = [*results.glob("cpu_*/densenet121_train_fp32.csv"), *results.glob("nvidia_*/densenet121_train_bf16.csv")]
    rows = [row for path in paths for row in fast_where.measured(path).values()]
    words = " ".join((fast_where.ROOT / "README.md").read_text().partition("## Install")[0].split())
    parts = {
        4: "a quarter",
        5: "a fifth",
        6: "a sixth",
        8: "an eighth",
        10: "a tenth",
        11: "an eleventh",
        12: "a twelfth",
    }
    for who, memory in (("ours", "needs {} to {}"), ("ours-me", "and {} to {} with")):
        speeds = sorted(row[who]["speed_ratio"] for row in rows)
        assert f"{speeds[0]:.1f} to {speeds[-1]:.1f} times" in words
        kept = sorted(row[who]["memory_ratio"] for row in rows)
        assert memory.format(parts[round(1 / kept[0])], parts[round(1 / kept[-1])]) in words
    for network, line in zip(fast_where.IN_A_BUDGET[1], fast_where.largest(results)):
        times = re.search(r"([\d.]+)x", line[4])[1]
        assert f"{times} times" in words and network.replace("densenet", "DenseNet-") in words


HEADER = "batches,batch,competitor,layout,median_s,images_per_s,speed_ratio,peak_mib,reserved_mib,memory_ratio"
BENCH = f"""{HEADER},dtype,date,device,backend
given,2,torchvision,contiguous,0.04,50,0.5,,,,fp32,2030-01-02,Some CPU,cpu
given,2,torchvision,channels_last,0.02,100,1,200,200,1,fp32,2030-01-02,Some CPU,cpu
given,2,ours,contiguous,0.008,250,2.5,60,60,0.3,fp32,2030-01-02,Some CPU,cpu
given,2,ours,channels_last,0.01,200,2,50,50,0.25,fp32,2030-01-02,Some CPU,cpu
given,2,ours-me,channels_last,0.0125,160,1.6,25,25,0.125,fp32,2030-01-02,Some CPU,cpu
"""
ENGINES = f"""{HEADER},dtype,date,device,backend
given,1,torchvision,contiguous,0.04,25,1,,,,bf16,2030-01-02,Some CPU,cpu
given,1,openvino,contiguous,0.02,50,2,,,,bf16,2030-01-02,Some CPU,cpu
given,1,ours,contiguous,0.01,100,4,,,,bf16,2030-01-02,Some CPU,cpu
"""
LARGEST = """network,competitor,dtype,budget_gib,batch,device
densenet121,torchvision,fp32,1,4,Some CPU
densenet121,ours,fp32,1,10,Some CPU
densenet121,ours-me,fp32,1,30,Some CPU
"""
VOLUMES = """batch,size,dtype,speed_ratio,memory_ratio,date,device,backend
3,16,fp32,1.5,0.5,2030-01-02,Some CPU,cpu
"""
FILES = {
    "densenet121_train_fp32": (BENCH, "python -m densenet_fast bench --out /somewhere"),
    "densenet121_infer_bf16": (ENGINES, "python -m densenet_fast bench --out results --infer"),
    "largest_batch": (LARGEST, "python benchmarks/largest_batch.py"),
    "volumes": (VOLUMES, "python benchmarks/volumes.py"),
}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_of_made_up_results(tmp_path, monkeypatch):
    (tmp_path / "some_cpu").mkdir()
    for name, (rows, command) in FILES.items():
        (tmp_path / f"some_cpu/{name}.csv").write_text(rows)
        (tmp_path / f"some_cpu/{name}.md").write_text(f"# Title\n\n`{command}`\n")
    _, _, inference, training, volumes, _, _, _, engines = fast_where.everything(tmp_path).splitlines()
    assert cells(inference)[2:] == [
        *("inference, 1 image", "`cpu`", "4.00x", "-", "-, -", "2030-01-02"),
        "`python -m densenet_fast bench --infer`",
    ]
    assert cells(training) == [
        *("Some CPU", "float32", "training step, 2 images", "`cpu`", "2.50x", "0.25", "1.60x, 0.12", "2030-01-02"),
        "`python -m densenet_fast bench`",
    ]
    assert cells(volumes)[2:6] == ["training step, 3 volumes of 16x16x16", "`cpu`", "1.50x", "0.50"]
    assert cells(engines) == ["Some CPU", "bfloat16", "1", "40.0", "20.0", "-", "10.0"]

    monkeypatch.setattr(fast_where, "MODES", {"train": "training step"})
    monkeypatch.setattr(fast_where, "SHOWN", (("some_cpu", "fp32", 2),))
    monkeypatch.setattr(fast_where, "IN_A_BUDGET", ("some_cpu", ("densenet121",)))
    _, _, training, largest = fast_where.some(tmp_path).splitlines()
    assert cells(training) == [
        *("training step, 2 images, float32", "Some CPU", "20 ms, 200 MiB"),
        *("8 ms (**2.50x**), 50 MiB (**0.25**)", "12.5 ms (**1.60x**), 25 MiB (**0.12**)"),
        "[`python -m densenet_fast bench --batch 2`](benchmarks/results/some_cpu/densenet121_train_fp32.md)",
    ]
    monkeypatch.setattr(fast_where, "MODES", {"infer": "inference"})
    monkeypatch.setattr(fast_where, "SHOWN", (("some_cpu", "bf16", 1),))
    assert cells(fast_where.some(tmp_path).splitlines()[2])[2:5] == ["40 ms", "10 ms (**4.00x**)", "-"]
    assert cells(largest)[2:5] == ["4 images", "10 images (**2.5x**)", "30 images (**7.5x**)"]
