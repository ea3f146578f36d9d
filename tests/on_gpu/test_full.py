"""The steps of the long command: how each ends, what is kept of it, and what the page tells."""

import argparse
import json
import os
import runpy
import signal
import sys
import time

import pytest
import torch

from densenet_fast.benchmarking import command
from on_gpu import full, steps
from on_gpu.checks import ERROR, HUNG, LEFT_OUT, NOT_RUN, PASSED
from on_gpu.runner import ROOT
from on_gpu.steps import Step

FAILING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session="leaves" in sys.argv)
print("child", child.pid, flush=True)
time.sleep(60 if "late" in sys.argv else 0)
print("FAILED tests/test_some.py::test_one - AssertionError\\n1 failed, 2 passed in 0.1s")
sys.exit("fails" in sys.argv)
"""


def python(text, *arguments):
    return [sys.executable, "-c", text, *arguments]


@pytest.mark.parametrize("how, state", [("", PASSED), ("fails", ERROR), ("late", HUNG), ("late leaves", HUNG)])
def test_a_step_ends_in_time(tmp_path, how, state):
    """Whatever a child of it does that holds its output; what it printed is kept."""
    start, log = time.monotonic(), tmp_path / "log.txt"
    record = full.run(python(FAILING, *how.split()), dict(os.environ), log, 3)
    assert record["state"] == state and time.monotonic() - start < 20
    child = log.read_text().splitlines()[0]
    if state != HUNG:
        assert record["tests"] == {"failed": 1, "passed": 2}
    if state == ERROR:
        assert record["error"]["message"] == "exit code 1; FAILED tests/test_some.py::test_one - AssertionError"
    if "leaves" in how:
        os.kill(int(child.split()[1]), signal.SIGKILL)


def test_a_failure_stops_nothing_and_everything_is_kept_after_each_step(tmp_path, monkeypatch, capsys):
    seen = []
    made = [
        Step("passes", [], python("print('fine')"), 20),
        Step("raises", [], python("1 / 0"), 20),
        Step("needs", [], python(""), 20, needs="no_such_module"),
        Step("last", [], python("print(1)"), 20),
    ]
    monkeypatch.setattr(full, "steps", lambda work: made)
    monkeypatch.setattr(full, "pack", lambda work, path: seen.append(sorted(p.name for p in work.iterdir())))
    assert full.main(tmp_path / "out", True, 60, "") == 1
    assert seen == [["passes.txt"], *2 * [["passes.txt", "raises.txt"]], ["last.txt", "passes.txt", "raises.txt"]]
    page = (tmp_path / "out/page.txt").read_text()
    assert page.startswith("1 of 3 checks failed (1 error), the first: steps: raises; 1 not run.")
    assert "exit code 1; ZeroDivisionError: division by zero" in page and page in capsys.readouterr().out
    assert "needs (left out, no_such_module is not installed)" in page
    kept = json.loads((tmp_path / "out/results.json").read_text())
    assert [step["state"] for step in kept["steps"]] == [PASSED, ERROR, LEFT_OUT, PASSED]
    assert set(kept) == {"conditions", "steps", *full.TABLES}


def test_what_is_not_there_or_not_reached(tmp_path):
    step = Step("some", python("print(1)"), [], 20, program="no_such_program")
    record = full.carry_out(step, tmp_path, False, time.monotonic() + 9)
    assert record["state"] == LEFT_OUT and record["error"]["message"] == "no_such_program was not found"
    step = step._replace(program=sys.executable)
    assert full.carry_out(step, tmp_path, False, time.monotonic() - 1)["state"] == NOT_RUN
    made = step._replace(made=lambda work: python("import os; print(os.environ['DENSENET_FAST_TEST_DEVICE'])"))
    assert full.carry_out(made, tmp_path, False, time.monotonic() + 9)["state"] == PASSED
    assert (tmp_path / "some.txt").read_text() == "cuda\n"


def test_failures_of_a_benchmark_are_in_its_table():
    row = {"batch": 32.0, "competitor": "ours", "failure": "out of memory"}
    assert full.speed("training", [row]).lines == ["batch   32  ours             out of memory"]


def test_the_best_configurations_are_told():
    rows = [
        {"kernel": "bn_relu", "tile": "(1, 2)", "ms": 0.5, "fault": "", "best": ""},
        {"kernel": "bn_relu", "tile": "(1, 2)", "ms": 0.5, "fault": "", "best": "1.20 times as fast as the table's"},
    ]
    tuning = full.sections(dict.fromkeys(full.TABLES, []) | {"tuning": rows})[-1]
    assert tuning.lines == ["bn_relu: (1, 2) 0.5: 1.20 times as fast as the table's"]


def test_the_benchmarks_know_their_flags(tmp_path):
    """Also those that a dry run does without."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    found = [step for step in steps.steps(tmp_path) if step.command[: len(steps.BENCH)] == steps.BENCH]
    assert {step.name for step in found} == set(full.TABLES) - {"tuning"}
    for step in found:
        for arguments in (step.dry, step.command):
            options = parser.parse_args(arguments[len(steps.BENCH) :])
            assert options.out == tmp_path / step.name
        assert step.seconds > 60 * options.minutes or "--minutes" not in step.command


def test_the_worst_kernels_are_tuned(tmp_path):
    assert steps.worst(tmp_path) == steps.USUAL
    (tmp_path / "floor").mkdir()
    rows = ["kernel,gap_s", "bn_relu_conv1x1,0.1", "outside the kernels,9", "bn_relu_conv3x3_backward,0.2"]
    (tmp_path / "floor/floor.csv").write_text("\n".join(rows))
    names = ["bn_relu_conv3x3_grad_input", "bn_relu_conv3x3_grad_weight", "bn_relu_conv1x1"]
    assert steps.worst(tmp_path) == names
    (tuning,) = (step for step in steps.steps(tmp_path) if step.made)
    assert tuning.made(tmp_path)[-6:] == [word for name in names for word in ("--kernel", name)]


@pytest.mark.parametrize("flags", [[], ["--smoke"]])
def test_the_commands_want_a_gpu(flags, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tests/gpu.py"), run_name="__main__")
    assert ended.value.code == 1 and "no CUDA device; --dry-run" in capsys.readouterr().err
