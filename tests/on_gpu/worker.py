"""``python -m on_gpu.worker GROUP MODULE SETTINGS JOURNAL``: the process in which a group's checks run.

It imports the group at once, then waits for a line on its standard input that says with which check to begin. Before
and after each check it writes a line to the journal. After a CUDA error it ends: another goes on.
"""

import faulthandler
import gc
import importlib
import signal
import sys
from pathlib import Path

import torch

from on_gpu.checks import CUDA, ERROR, Check, Journal, carry_out, describe
from on_gpu.settings import SETTINGS

IMPORTING = "the checks can be imported"


def main(group: str, module: str, settings: str, journal: str) -> None:
    """Carries out the group's checks from the one asked for on."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    lines = Journal(Path(journal))
    try:
        chosen = SETTINGS[settings]
        chosen.stand_in()
        checks: list[Check] = importlib.import_module(module).checks(chosen)
    except Exception as error:
        lines.write({"group": group, "check": IMPORTING, "state": ERROR, "seconds": 0, "error": describe(error)})
        return
    lines.write({"group": group, "plan": [(check.name, check.limit) for check in checks]})
    first = sys.stdin.readline()
    for i, check in enumerate(checks[int(first) :] if first else (), start=int(first or 0)):
        print(f"== {check.name}", flush=True)
        lines.write({"group": group, "begun": i})
        record = carry_out(check)
        lines.write({"group": group, "number": i, **record})
        if record["state"] == CUDA:
            return
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
