"""Planted failures: each is told on the page as what it is, and stops nothing."""

import time

import pytest

from on_gpu import page, smoke
from on_gpu.checks import DIED, ERROR, HUNG, MEMORY, NOT_RUN, PASSED, WRONG, Journal
from on_gpu.runner import Group, Runner, search_path
from on_gpu.worker import IMPORTING

PLANTED = """
import os, signal, sys, time
import torch
from on_gpu.checks import Check, LeftOut, Wrong

def wrong():
    raise Wrong("1 of 7 results: dW: off by 3.00e-01, stock by 2.00e-03, allowed 1.20e-02", error=0.3)

def raises():
    return {}["no such key"]

def hangs():
    time.sleep(60)

def dies():
    os.kill(os.getpid(), signal.SIGSEGV)

def exits():
    print("the reason is above", flush=True)
    sys.exit(3)

def out_of_memory():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")

def cuda_error():
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

def left_out():
    raise LeftOut("nvcc was not found")

def passes():
    return {"pid": os.getpid()}

def checks(settings):
    found = []
    for run in (wrong, raises, out_of_memory, left_out, hangs, dies, cuda_error, exits):
        found += [Check(run.__name__, run, 2.0), Check(f"after {run.__name__}", passes)]
    return found
"""
ENDS = {
    "wrong": WRONG,
    "raises": ERROR,
    "out_of_memory": MEMORY,
    "left_out": "left out",
    "hangs": HUNG,
    "dies": DIED,
    "cuda_error": "CUDA error",
    "exits": DIED,
}


@pytest.fixture
def group(tmp_path):
    """Makes a group of a module's text."""

    def make(name, text, **options):
        (tmp_path / f"{name}.py").write_text(text)
        return Group(name, name, {"PYTHONPATH": f"{tmp_path}:{search_path()}"}, **options)

    return make


def states(records, name):
    return {record["check"]: record["state"] for record in records if record["group"] == name}


def test_every_failure_is_told_and_stops_nothing(tmp_path, group):
    """A wrong number, an exception, memory that runs out, a hang, a death, a CUDA error; a group that cannot be
    imported, one that dies when it is; and the group after them all."""
    planted = group("planted", PLANTED)
    unusable = group("unusable", "import no_such_module")
    deadly = group("deadly", "import os\nos._exit(7)")
    deaf = group("deaf", f"{PLANTED}    sys.stdin.close()\n    return found[:2]".replace("    return found\n", ""))
    last = group("last", PLANTED.replace("(wrong, raises", "(passes,) or (wrong, raises"), after=("beside",), wait=60.0)
    beside = group("beside", PLANTED.replace("(wrong, raises", "(left_out,) or (wrong, raises"))
    text, records = smoke.run(tmp_path / "out", "dry", 120, [beside], [planted, unusable, deadly, deaf, last])
    found = states(records, "planted")
    assert found == {**ENDS, **{f"after {name}": PASSED for name in ENDS}}
    assert states(records, "unusable") == {IMPORTING: ERROR} and states(records, "deadly") == {IMPORTING: DIED}
    assert states(records, "deaf") == {"wrong": DIED, "after wrong": DIED}
    assert set(states(records, "last").values()) == {PASSED}
    assert text == (tmp_path / "out/page.txt").read_text() and len(list((tmp_path / "out").iterdir())) == 3
    first, *lines = text.splitlines()
    assert first.startswith("11 of 22 checks failed (1 wrong, 2 error, 1 out of memory, 1 CUDA error, 1 hung, 5 died)")
    assert lines[2].startswith("WRONG: planted: wrong") and "allowed 1.20e-02" in lines[3]
    for expected in (
        "ERROR: planted: raises",
        "KeyError: 'no such key'",
        'in raises: return {}["no such key"]',
        "OUT OF MEMORY: planted: out_of_memory",
        "Tried to allocate 80.00 GiB",
        "HUNG: planted: hangs",
        "not done after 2 s",
        "in hangs",
        "DIED: planted: dies",
        "SIGSEGV: its process ended",
        "CUDA ERROR: planted: cuda_error",
        "an illegal memory access",
        "DIED: planted: exits",
        "exit code 3: its process ended",
        "ERROR: unusable",
        "No module named 'no_such_module'",
        "DIED: deadly",
        "planted: left_out (left out, nvcc was not found)",
    ):
        assert expected in text, expected
    pids = [r["result"]["pid"] for r in records if r["group"] == "planted" and r["state"] == PASSED]
    assert len(set(pids)) == 5


def test_the_time_is_up(tmp_path, group):
    """The page comes in time, with what has not run."""
    text = PLANTED.replace("(wrong, raises", "(passes, hangs, passes) or (wrong, raises").replace("2.0", "60.0")
    slow = group("slow", text)
    start = time.monotonic()
    text, records = smoke.run(tmp_path / "out", "dry", smoke.RESERVE + 9, [], [slow, slow._replace(name="later")])
    assert time.monotonic() - start < 9 + 2 * smoke.RESERVE
    assert [record["state"] for record in records if record["group"] == "slow"] == [*2 * [PASSED], *4 * [NOT_RUN]]
    assert records[-1]["group"] == "later" and records[-1]["state"] == NOT_RUN
    assert "== NOT RUN" in text and "(not run, the time is up)" in text


def test_a_fault_of_the_runner_itself_is_a_check_that_failed(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "lines")
    runner = Runner("dry", journal, tmp_path, time.monotonic() + 9)
    monkeypatch.setattr(runner, "run", lambda *_: 1 / 0)
    runner.run_noting(Group("any", "any"))
    (record,) = journal.read()
    assert record["state"] == ERROR and record["error"]["type"] == "ZeroDivisionError"
    journal.path.write_text(journal.path.read_text() + '{"group": "half a li')
    assert len(journal.read()) == 1
    assert "1 of 1 checks failed (1 error), the first: any: its process." in page.build([record], [])
