"""The benchmark command, on something tiny."""

import argparse
import csv
import functools
import importlib.util
import os
import shutil

import pytest
import torch

from densenet_fast.__main__ import main
from densenet_fast.benchmarking import command, competitors, memory, steps, times
from densenet_fast.benchmarking.command import measured_memories
from densenet_fast.benchmarking.competitors import COMPETITORS, Competitor, Entry, layouts_of
from densenet_fast.benchmarking.memory import Memory
from densenet_fast.benchmarking.steps import Disagreement, agree
from densenet_fast.benchmarking.times import Timing

TINY = ["bench", "--model", "densenet_bc10", "--batch", "3", "--size", "16", "--repeats", "2", "--threads", "1"]
ENGINES = [name for name in COMPETITORS if COMPETITORS[name].engine is not None]
INSTALLED = [
    name for name in COMPETITORS if name not in ENGINES and (name != "timm" or importlib.util.find_spec("timm"))
]
COLUMNS = """
    network mode batches size dtype batch competitor layout median_s p20_s p80_s repeats images_per_s speed_ratio
    peak_mib reserved_mib memory_ratio failure date commit device driver threads backend os python torch cuda
    torchvision timm triton densenet_fast
""".split()


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder for results; nothing is compiled but traced, and memory is not measured but 1 MiB."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(memory, "measure", lambda job, limit=None: Memory(added=1 << 20, reserved=1 << 20))
    return tmp_path


def rows_of(out):
    (path,) = out.rglob("*.csv")
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("mode", [["--train"], ["--infer", "--dtype", "bf16"]])
def test_every_competitor_end_to_end(mode, out, capsys):
    assert main([*TINY, *mode, "--against", ",".join(INSTALLED), "--out", str(out)]) == 0
    rows = rows_of(out)
    assert list(rows[0]) == COLUMNS
    assert [(row["competitor"], row["layout"]) for row in rows] == [
        (n, layout) for n in INSTALLED for layout in layouts_of(n)
    ]
    for row in rows:
        assert row["failure"] == "" and row["mode"] == mode[0][2:] and int(row["repeats"]) == 2
        assert 0 < float(row["p20_s"]) <= float(row["median_s"]) <= float(row["p80_s"])
        assert float(row["images_per_s"]) == pytest.approx(3 / float(row["median_s"]), rel=1e-4)
        assert float(row["peak_mib"]) == 1 and float(row["memory_ratio"]) == 1
        assert row["torch"] == torch.__version__ and row["device"] and row["date"]
    assert max(float(row["speed_ratio"]) for row in rows if row["competitor"] == "torchvision") == 1
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table[1:]] == [COMPETITORS[name].label for name in INSTALLED]
    (markdown,), (picture,) = out.rglob("*.md"), out.rglob("*.png")
    assert table[-1] in markdown.read_text() and "commit" in markdown.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ENGINES)
def test_inference_engines(name, out, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setattr(times, "PAUSE", 0.0)
    assert main([*TINY, "--infer", "--against", f"torchvision,{name}", "--out", str(out)]) == 0
    (row,) = (row for row in rows_of(out) if row["competitor"] == name)
    assert row["failure"] == "" and row["layout"] == "contiguous" and float(row["median_s"]) > 0
    job = memory.Job(name, "contiguous", "densenet_bc10", 2, 16, "fp32", False, "cpu", 1)
    assert memory.measure_here(job).failure == ""
    entry, images = job.entry, job.entry.images(2, 16, torch.device("cpu"))
    model = entry.model(torch.device("cpu"), False)
    with torch.no_grad():
        assert model(images).shape == (2, 10) and model.prepare(images) is model.prepare(images)
        assert model(images[:1]).shape == (1, 10)


def test_engines_are_left_out_of_what_they_do_not_do(out, capsys):
    assert main([*TINY, "--train", "--against", ",".join(ENGINES), "--out", str(out)]) == 0
    assert main([*TINY, "--infer", "--dtype", "fp16", "--against", "onnxruntime", "--out", str(out)]) == 0
    lines = capsys.readouterr().err
    assert all(f"{name} is left out: it is for inference on CPUs" in lines for name in ENGINES)
    assert "onnxruntime is left out: " in lines.rpartition("inference on CPUs")[2]


def test_several_batches_and_the_faster_layouts_memory(out):
    flags = ["--batch", "1,2", "--against", "reference", "--memory", "faster", "--out", str(out)]
    assert main([*TINY, *flags]) == 0
    rows = rows_of(out)
    assert [row["batch"] for row in rows] == ["1"] * 6 + ["2"] * 6
    with_memory = [row for row in rows if row["peak_mib"]]
    assert {(row["competitor"], row["batch"]) for row in with_memory} == {
        (name, batch) for name in ("reference", "ours", "ours-me") for batch in "12"
    }


def test_the_largest_batch_of_each(out, monkeypatch):
    needs = {"reference": 4, "ours": 2, "ours-me": 1}

    def measure(job):
        return Memory(added=job.batch * needs[job.competitor] << 20)

    monkeypatch.setattr(command, "measure", measure)
    flags = ["--batch", "max", "--memory-budget", str(12 / 1024), "--against", "reference", "--memory", "none"]
    assert main([*TINY, *flags, "--out", str(out)]) == 0
    assert {row["competitor"]: row["batch"] for row in rows_of(out)} == {"reference": "3", "ours": "6", "ours-me": "12"}


def test_a_competitor_that_cannot_be_imported_is_named(out, monkeypatch, capsys):
    def missing(arguments):
        raise ModuleNotFoundError("No module named 'timm'")

    monkeypatch.setitem(competitors.COMPETITORS, "timm", Competitor(missing, "timm"))
    assert main([*TINY, "--against", "reference,timm", "--memory", "none", "--out", str(out)]) == 0
    streams = capsys.readouterr()
    assert "timm is left out: ModuleNotFoundError: No module named 'timm'" in streams.err
    assert "timm is left out" in streams.out and {row["competitor"] for row in rows_of(out)} == {
        "reference",
        "ours",
        "ours-me",
    }


def test_a_competitor_that_cannot_be_compiled_is_named(out, monkeypatch):
    def broken(model, dynamic):
        def run(images):
            raise RuntimeError("no compiler")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    assert main([*TINY, "--against", "torchvision,compile", "--out", str(out)]) == 0
    for row in rows_of(out):
        failed = row["competitor"] == "compile"
        assert row["failure"] == ("cannot be compiled: no compiler" if failed else "")
        assert (row["median_s"] == "") == failed


def wrong_logits(model):
    model.features.denseblock1.denselayer1.norm1.eps = 1.0


def wrong_gradients(model):
    layer = model.features.denseblock1.denselayer1.conv1
    layer.register_forward_hook(lambda module, inputs, output: 2 * output - output.detach())


@pytest.mark.parametrize("spoil, what", [(wrong_logits, "logits"), (wrong_gradients, "gradients")])
def test_disagreement_is_not_timed(spoil, what, out, monkeypatch, capsys):
    def wrong(arguments):
        model = COMPETITORS["reference"].build(arguments)
        spoil(model)
        return model

    monkeypatch.setitem(competitors.COMPETITORS, "timm", Competitor(wrong, "timm"))
    with pytest.raises(Disagreement, match=f"timm, contiguous: its {what} are off by"):
        main([*TINY, "--against", "reference,timm", "--out", str(out)])
    assert "|" not in capsys.readouterr().out and not list(out.rglob("*.*"))


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_compiled_by_the_compiler_and_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = ["--infer", "--against", "torchvision,ours-compile", "--memory", "faster", "--out", str(tmp_path / "out")]
    assert main([*TINY, *flags]) == 0
    rows = rows_of(tmp_path / "out")
    assert list(rows[0]) == COLUMNS and {row["failure"] for row in rows} == {""}
    for name in ("torchvision", "ours", "ours-me", "ours-compile"):
        own = [row for row in rows if row["competitor"] == name]
        assert len(own) == len(layouts_of(name)) and all(float(row["median_s"]) > 0 for row in own)
        assert [float(row["peak_mib"]) > 0 for row in own if row["peak_mib"]] == [True]


def test_what_takes_too_long_to_compile_is_named(out, monkeypatch, capsys):
    limits = []

    def slow(job, limit=None):
        limits.append((job.competitor, limit))
        return Memory(failure="not done within 5 s") if job.competitor == "compile" else Memory(added=1 << 20)

    monkeypatch.setattr(memory, "measure", slow)
    flags = ["--against", "torchvision,compile,ours-compile", "--compile-limit", "5", "--memory", "none"]
    assert main([*TINY, *flags, "--out", str(out)]) == 0
    assert limits == [("compile", 5), ("ours-compile", 5)]
    streams = capsys.readouterr()
    assert "compile, batch 3 is left out: not done within 5 s" in streams.err and "is left out" in streams.out
    assert {row["competitor"] for row in rows_of(out)} == {"torchvision", "ours", "ours-me", "ours-compile"}


def test_no_minutes_leave_two_rounds_and_no_memory(out, capsys):
    assert main([*TINY, "--against", "reference", "--repeats", "9", "--minutes", "0", "--out", str(out)]) == 0
    assert "memory is left out, for the --minutes are over: reference" in capsys.readouterr().err
    for row in rows_of(out):
        assert (row["repeats"], row["peak_mib"], row["failure"]) == ("2", "", "")


def test_memory_of_the_faster_layouts_comes_first_as_far_as_the_time_goes(monkeypatch):
    clock, ran = [0.0], []

    def measure(job, limit):
        assert limit == 100 - clock[0] + memory.GRACE
        ran.append((job.competitor, job.layout))
        clock[0] += 40
        return Memory(added=1)

    monkeypatch.setattr(memory, "measure", measure)
    monkeypatch.setattr(memory.time, "perf_counter", lambda: clock[0])
    seconds = {("ours", "contiguous"): 2, ("ours", "channels_last"): 1, ("reference", "contiguous"): 3}
    seconds |= {("reference", "channels_last"): 4, ("timm", "contiguous"): 1}
    timings = [Timing(Entry(*who, "densenet_bc10"), 3, [time]) for who, time in seconds.items()]
    timings.append(Timing(Entry("timm", "channels_last", "densenet_bc10"), 3, failure="out of memory"))
    options = argparse.Namespace(
        memory="all", device=torch.device("cpu"), size=16, dtype="fp32", infer=False, threads=1
    )
    memories = measured_memories(options, timings, until=100)
    assert ran == [("ours", "channels_last"), ("reference", "contiguous"), ("timm", "contiguous")]
    assert [found is not None for found in memories] == [False, True, True, False, True, False]


def test_what_compiling_made_is_compared_on_the_batch_that_is_timed(out, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: lambda images: model(images) * 1.1)
    with pytest.raises(Disagreement, match="ours-compile, channels_last: its logits are off by 1.0e-01"):
        main([*TINY, "--against", "ours-compile", "--out", str(out)])


def test_tf32_is_off_while_results_are_compared_and_as_it_was_behind(monkeypatch):
    seen = []

    def spy(*args, **kwargs):
        seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return original(*args, **kwargs)

    original = steps.step
    monkeypatch.setattr(steps, "step", spy)
    before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        agree([Entry("reference", "contiguous", "densenet_bc10")], False, torch.device("cpu"), 16)
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == before[1]
    finally:
        torch.backends.cudnn.conv.fp32_precision = before[0]
    assert set(seen) == {("ieee", "ieee")}


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--batch", "0"], "--batch"),
        (["--size", "7"], "--size"),
        (["--model", "densenet_bc41"], "--model"),
        (["--against", "nobody"], "--against"),
        (["--dtype", "int8"], "--dtype"),
        (["--minutes", "-1"], "--minutes"),
        (["--compile-limit", "0"], "--compile-limit"),
        (["--floor", "--infer"], "--floor"),
        (["--profile", "--batch", "max"], "--profile"),
    ],
)
def test_bad_arguments(flags, named, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main([*TINY, "--out", str(tmp_path), *flags])
    assert caught.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]
