"""One thing to find out on a GPU, and the line of JSON that says what came of it."""

import json
import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

Record = dict[str, Any]

PASSED, WRONG, ERROR, MEMORY, CUDA = "passed", "wrong", "error", "out of memory", "CUDA error"
HUNG, DIED, LEFT_OUT, NOT_RUN = "hung", "died", "left out", "not run"
FAILURES = (WRONG, ERROR, MEMORY, CUDA, HUNG, DIED)
"""How a check ends that has found something; those that are left out or not run have not been tried."""

FRAMES = 6
EVERY = tuple(str(Path(__file__).with_name(name)) for name in ("checks.py", "worker.py"))
CUDA_ERROR = re.compile(r"CUDA error|Error \[CUDA\]|CUDNN_STATUS|CUBLAS_STATUS")
"""After one of these every later call on the device may fail, whoever makes it."""


class Check(NamedTuple):
    """``run`` returns what it measured, which is to be found in the journal, or raises; it may take ``limit``
    seconds."""

    name: str
    run: Callable[[], Record | None]
    limit: float = 30.0


class Wrong(Exception):
    """A number is not what it should be."""

    def __init__(self, message: str, **measured: Any) -> None:
        super().__init__(message)
        self.measured = measured


class LeftOut(Exception):
    """What the check needs is not here."""


class Journal:
    """A file of JSON lines to which several processes append."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, record: Record) -> None:
        """Appends it in one piece."""
        line = json.dumps(record, default=str) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self, group: str | None = None) -> list[Record]:
        """What is there so far, of one group if asked for; a line that a dying process left unfinished is skipped."""
        records = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if group in (None, record["group"]):
                records.append(record)
        return records


def carry_out(check: Check) -> Record:
    """Runs it and waits for the device, so that what fails there is known as this check's; how it ended."""
    start = time.perf_counter()
    state, result, error = PASSED, None, None
    try:
        result = check.run()
        torch.cuda.synchronize()
    except Exception as caught:
        state, result, error = state_of(caught), getattr(caught, "measured", None), describe(caught)
    record = {"check": check.name, "state": state, "seconds": round(time.perf_counter() - start, 3)}
    return record | {key: value for key, value in (("result", result), ("error", error)) if value}


def state_of(error: Exception) -> str:
    """What a check has ended with that raised ``error``."""
    if isinstance(error, Wrong):
        return WRONG
    if isinstance(error, LeftOut):
        return LEFT_OUT
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return MEMORY
    if isinstance(error, torch.AcceleratorError) or CUDA_ERROR.search(str(error)):
        return CUDA
    return ERROR


def describe(error: Exception) -> Record:
    """Its type and message, and the frames that led to it, the last one last."""
    frames = [f"{f.filename}:{f.lineno} in {f.name}: {f.line}" for f in traceback.extract_tb(error.__traceback__)]
    return {"type": type(error).__name__, "message": str(error), "frames": shortened(frames)[-FRAMES:]}


def shortened(frames: list[str]) -> list[str]:
    """Without the frames that every check has, and the folders that say nothing of where in the code it is."""
    root = str(Path(__file__).parents[2])
    told = [frame for frame in frames if not frame.startswith((*EVERY, "<frozen"))]
    return [re.sub(r"^\S*/(site-packages|lib/python[\d.]+)/", "", f.replace(f"{root}/", "")) for f in told]


def end_of(code: int) -> str:
    """How a process ended, of its exit code."""
    names = {-known: known.name for known in signal.Signals}
    return names.get(code, f"exit code {code}")
