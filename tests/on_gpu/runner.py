"""Runs groups of checks in processes of their own, and notes of each check how it ended, whatever it did."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from on_gpu.checks import DIED, ERROR, HUNG, NOT_RUN, Journal, Record, describe, end_of, shortened
from on_gpu.worker import IMPORTING

ROOT = Path(__file__).parents[2]
START_LIMIT = 60.0
"""Seconds until a group must be imported."""
POLL = 0.05
GRACE = 5.0
FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')
"""As faulthandler prints it."""
TAIL = 1500
"""Characters of what a process printed last that are kept where it could not say itself what happened."""


class Group(NamedTuple):
    """The checks of ``module``, in a process with ``environment``; it runs when those of ``after`` have ended, or have
    not within ``wait`` seconds."""

    name: str
    module: str
    environment: dict[str, str] = {}
    after: tuple[str, ...] = ()
    wait: float = 0.0


def search_path() -> str:
    """Where processes find this package, the one it tests and what the benchmarks share."""
    folders = [ROOT, ROOT / "tests", ROOT / "benchmarks"]
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])


def kill(process: subprocess.Popen) -> None:
    """Kills it with all that it started; one that the device holds is left behind after a while."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)


class Worker:
    """The process of a group; it imports at once and begins when told to."""

    def __init__(self, group: Group, settings: str, journal: Journal, logs: Path) -> None:
        self.log = logs / f"{group.name.replace(' ', '_')}.txt"
        self.logged = self.log.stat().st_size if self.log.exists() else 0
        self.lines = len(journal.read(group.name))
        command = [sys.executable, "-m", "on_gpu.worker", group.name, group.module, settings, str(journal.path)]
        with open(self.log, "ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": search_path(), **group.environment},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def begin(self, first: int) -> None:
        """With the check of that number."""
        with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
            pipe.write(f"{first}\n".encode())

    def end(self, where: bool = False) -> None:
        """Kills it with all that it started; if asked, it first prints where it is."""
        if where:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)
        kill(self.process)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def frames(self) -> list[str]:
        """Where it was when it was asked or died, the innermost last; the last of what it printed if it did not say."""
        with open(self.log, "rb") as file:
            file.seek(self.logged)
            said = file.read().decode(errors="replace").strip()
        own = said.rpartition("Current thread")[2].split("\n\n")[0]
        found = [frame for frame in FRAME.findall(own) if "runpy" not in frame[0]]
        return [f"{file}:{line} in {name}" for file, line, name in reversed(found)] or said[-TAIL:].splitlines()


class Runner:
    """All groups of one run, which is to end at ``deadline``, a time of ``time.monotonic``."""

    def __init__(self, settings: str, journal: Journal, logs: Path, deadline: float) -> None:
        self.settings, self.journal, self.logs, self.deadline = settings, journal, logs, deadline

    def worker(self, group: Group) -> Worker:
        """A process that imports the group and waits."""
        return Worker(group, self.settings, self.journal, self.logs)

    def run(self, group: Group, worker: Worker | None = None) -> None:
        """Every check of the group, in ``worker`` and, where it ends before they do, in others after it."""
        first = 0
        while first is not None:
            worker = worker or self.worker(group)
            worker.begin(first)
            try:
                first = self.watch(group, worker, first)
            finally:
                worker.end()
            worker = None

    def watch(self, group: Group, worker: Worker, first: int) -> int | None:
        """Follows the worker to its end, or ends it; the check to go on with in another, None if none."""
        known = worker.lines
        plan: list[list] | None = None
        begun, since, limit, start = None, time.monotonic(), START_LIMIT, first
        while True:
            code = worker.process.poll()  # before the lines are read: what it wrote is complete then
            for record in self.journal.read(group.name)[known:]:
                known += 1
                if "plan" in record:
                    plan = record["plan"]
                elif "begun" in record:
                    begun, since = record["begun"], time.monotonic()
                    limit = plan[begun][1]
                elif record["check"] == IMPORTING:
                    return None
                else:
                    first, begun, since, limit = record["number"] + 1, None, time.monotonic(), START_LIMIT
            if plan is not None and first == len(plan):
                return None
            now = time.monotonic()
            over = now >= self.deadline
            if code is None and not over and now < since + limit:
                time.sleep(POLL)
                continue
            if code is None:
                worker.end(where=True)
            if plan is None:
                self.note(group, IMPORTING, worker, code, now - since, over)
                return None
            if begun is not None:
                self.note(group, plan[begun][0], worker, code, now - since, over, begun)
                first = begun + 1
            elif first == start and not over:
                self.note(group, plan[first][0], worker, code, now - since, over, first)
                first += 1
            if over:
                for name, _ in plan[first:]:
                    self.write(group, name, NOT_RUN, {"message": "the time is up"})
                return None
            return first if first < len(plan) else None

    def note(
        self, group: Group, check: str, worker: Worker, code: int | None, seconds: float, over: bool, number: int = -1
    ) -> None:
        """Writes of a check what its process could not."""
        if code is None:
            state = NOT_RUN if over else HUNG
            error = {"type": "TimeLimit", "message": "the time is up" if over else f"not done after {seconds:.0f} s"}
        else:
            state, error = DIED, {"type": end_of(code), "message": "its process ended"}
        self.write(group, check, state, error | {"frames": shortened(worker.frames())}, number, seconds)

    def write(
        self, group: Group, check: str, state: str, error: Record, number: int = -1, seconds: float = 0.0
    ) -> None:
        record: Record = {"group": group.name, "number": number, "check": check, "state": state}
        self.journal.write(record | {"seconds": round(seconds, 3), "error": error})

    def run_noting(self, group: Group, worker: Worker | None = None) -> None:
        """:meth:`run`, if there is time, after which the next group can run whatever happened."""
        try:
            if time.monotonic() < self.deadline:
                self.run(group, worker)
            else:
                self.write(group, "all of its checks", NOT_RUN, {"message": "the time is up"})
        except Exception as error:
            self.write(group, "its process", ERROR, describe(error))
        finally:
            if worker is not None:
                worker.end()
