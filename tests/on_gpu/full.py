"""``python3 tests/gpu.py``: how good is it? Builds, tests and measures as far as nine minutes go; a page at the end.

To ``--out`` go, anew after each step, ``results.json``, ``page.txt`` and ``rest.tar.gz`` with what the steps printed,
tables and pictures.
"""

import csv
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from densenet_fast.benchmarking.conditions import conditions, sentence
from on_gpu.archive import pack, write_json, write_text
from on_gpu.checks import ERROR, HUNG, LEFT_OUT, NOT_RUN, PASSED, Record
from on_gpu.page import Section, build
from on_gpu.runner import ROOT, kill, search_path
from on_gpu.steps import Step, steps

SECONDS = 550.0
RESERVE = 8.0
"""Seconds at the end for the page."""
TAIL = 40
"""Lines of what a step that failed has printed last that are looked through for the reason."""
TABLES = ("training", "inference", "floor", "profile", "tuning", "densenet201", "compiled")
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


def main(out: Path, dry: bool, seconds: float, only: str) -> int:
    """Runs the steps whose name matches ``only``, prints the page, and returns 0 if none failed."""
    deadline = time.monotonic() + seconds - RESERVE
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp())
    records: list[Record] = []
    chosen = [step for step in steps(work) if re.search(only, step.name)]
    for step in chosen:
        records.append(carry_out(step, work, dry, deadline))
        left = [{"group": "steps", "check": s.name, **not_tried(NOT_RUN, "not reached")} for s in chosen]
        page = keep(out, work, [*records, *left[len(records) :]], "cpu" if dry else "cuda")
    shutil.rmtree(work)
    print(f"\n{page}", end="", flush=True)
    return int(any(r["state"] not in (PASSED, LEFT_OUT) for r in records))


def carry_out(step: Step, work: Path, dry: bool, deadline: float) -> Record:
    """Runs a step; how it ended."""
    start = time.monotonic()
    command = step.dry if dry else step.made(work) if step.made else step.command
    environment = {**os.environ, "PYTHONPATH": search_path(), "PYTEST_ADDOPTS": ""}
    if dry:
        environment |= step.environment
    else:
        environment |= {"DENSENET_FAST_TEST_DEVICE": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    log = work / f"{step.name.replace(' ', '_').replace(':', '').replace('/', '_')}.txt"
    print(f"== {step.name}: {' '.join(command)}", flush=True)
    if importlib.util.find_spec(step.needs) is None:
        ended = not_tried(LEFT_OUT, f"{step.needs} is not installed")
    elif not dry and shutil.which(step.program) is None:
        ended = not_tried(LEFT_OUT, f"{step.program} was not found")
    elif deadline <= start:
        ended = not_tried(NOT_RUN, "the time is up")
    else:
        ended = run(command, environment, log, min(step.seconds, deadline - start))
    print(f"   {ended['state']}, {ended['seconds']:.1f} s", flush=True)
    return {"group": "steps", "check": step.name, **ended}


def not_tried(state: str, why: str) -> Record:
    return {"state": state, "seconds": 0.0, "error": {"type": "", "message": why, "frames": []}}


def run(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> Record:
    """Runs a command, its output in ``log``; how it ended. At its time, and when it has ended, its whole process group
    is killed."""
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    state = ERROR
    try:
        if process.wait(seconds) == 0:
            state = PASSED
    except subprocess.TimeoutExpired:
        state = HUNG
    finally:
        kill(process)
    text = log.read_text(errors="replace")
    record: Record = {"state": state, "seconds": round(time.monotonic() - start, 1)}
    counts = {kind: int(count) for count, kind in COUNTS.findall(text.rstrip().rpartition("\n")[2])}
    if counts:
        record["tests"] = counts
    if state != PASSED:
        why = f"not done after {seconds:.0f} s" if state == HUNG else f"exit code {process.returncode}"
        record["error"] = {"type": "step", "message": f"{why}; {reasons(text)}", "frames": text.splitlines()[-6:]}
    return record


def reasons(text: str) -> str:
    """The lines of a step's output that say what was wrong: pytest's summary, else those with an error's name."""
    lines = text.splitlines()
    found = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    found = found or [line for line in lines[-TAIL:] if re.search(r"Error\b|error:", line)]
    return "; ".join(dict.fromkeys(found[:6]))


def keep(out: Path, work: Path, records: Sequence[Record], device: str) -> str:
    """Writes everything that is known; the page."""
    tables = {name: read(work / name) for name in TABLES}
    under = under_which(device)
    ended = [{"name": r["check"], **{k: v for k, v in r.items() if k not in ("group", "check")}} for r in records]
    write_json(out / "results.json", {"conditions": under, "steps": ended, **tables})
    page = build(records, [*sections(tables), steps_section(records), Section("VERSIONS", [sentence(under)])])
    write_text(out / "page.txt", page)
    pack(work, out / "rest.tar.gz")
    return page


@functools.cache
def under_which(device: str) -> dict[str, str]:
    """The conditions, asked for when the build is over."""
    return conditions(torch.device(device))


def read(folder: Path) -> list[Record]:
    """The rows of a folder's CSV files, numbers as numbers."""
    rows = [row for path in sorted(folder.rglob("*.csv")) for row in csv.DictReader(path.open())]
    return [{key: number(value) for key, value in row.items()} for row in rows]


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def sections(tables: dict[str, list[Record]]) -> list[Section]:
    """What was measured."""
    floor = [
        f"{r['kernel'][:40]:40} {1e3 * r['measured_s']:8.2f} {1e3 * r['floor_s']:8.2f} {r['ratio'] or '-':>8}"
        for r in tables["floor"]
    ]
    return [
        *(speed(name, tables[name]) for name in ("training", "compiled", "inference", "densenet201")),
        Section("EVERY KERNEL: ms, its floor, ratio", floor),
        Section("WHERE THE TIME GOES: ms", [f"{r['part'][:60]:60} {r['ms']:8.2f}" for r in tables["profile"]]),
        Section(
            "TUNING: ms", [f"{r['kernel']}: {r['tile']} {r['ms']}: {r['best']}" for r in tables["tuning"] if r["best"]]
        ),
    ]


def speed(name: str, rows: Sequence[Record]) -> Section:
    """A row a competitor and batch."""
    lines = []
    for r in rows:
        if r["failure"]:
            lines.append(f"batch {r['batch']:4.0f}  {r['competitor']:16} {r['failure']}")
            continue
        peak = f"{r['peak_mib']:8.0f} MiB {r['memory_ratio']:.2f}" if r["peak_mib"] != "" else ""
        times = f"{1e3 * r['median_s']:8.2f} ms {r['images_per_s']:8.0f} images/s {r['speed_ratio']:5.2f}x"
        times += f" enqueued in {1e3 * r['enqueue_s']:.2f} ms" if "enqueue_s" in r else ""
        lines.append(f"batch {r['batch']:4.0f}  {r['competitor']:16} {times} {peak}")
    return Section(f"{name.upper()}, channels_last, bfloat16; torchvision 1", lines)


def steps_section(records: Sequence[Record]) -> Section:
    """How each ended."""
    lines = []
    for r in records:
        counted = ", ".join(f"{count} {kind}" for kind, count in r.get("tests", {}).items())
        lines.append(f"{r['check'][:44]:44} {r['seconds']:7.1f} s  {r['state']} {counted}")
    return Section("STEPS", lines)
