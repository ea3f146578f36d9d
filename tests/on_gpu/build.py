"""The library, built for the GPU at hand alone; ``python -m on_gpu.build SETTINGS`` does nothing else."""

import os
import subprocess
import sys
from functools import partial

import torch

from on_gpu.checks import Check, LeftOut, Record
from on_gpu.settings import ROOT, SETTINGS, Settings

TAIL = 3000
"""Characters of the compiler's output that are kept."""
MISSING = ("was not found", "No module named 'setuptools'")
"""What the build says where it cannot be tried."""


def main(name: str) -> None:
    """Builds it and says for what."""
    SETTINGS[name].stand_in()
    print(build(SETTINGS[name]))


def checks(settings: Settings) -> list[Check]:
    """The build."""
    return [Check("the library is built", partial(build, settings), 110)]


def build(settings: Settings) -> Record:
    """Runs the build's command.

    Raises:
        LeftOut: what it needs is not here.
        RuntimeError: it failed, with the last of what it said.
    """
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architecture}
    result = subprocess.run(
        settings.build, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(result.stdout, file=sys.stderr)
    said = result.stdout.strip()[-TAIL:]
    for line in said.splitlines():
        if any(words in line for words in MISSING):
            raise LeftOut(line)
    if result.returncode:
        raise RuntimeError(said)
    return {"architecture": architecture}


if __name__ == "__main__":
    main(*sys.argv[1:])
