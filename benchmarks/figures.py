"""What the scripts here share: their flags, the files of a figure, and the places of tables in the pages."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from densenet_fast.benchmarking.conditions import conditions, device_name, folder_name
from densenet_fast.benchmarking.results import write_csv, write_page

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def parser_of(script: str, description: str) -> argparse.ArgumentParser:
    """With the flags that every measuring script has."""
    parser = argparse.ArgumentParser(prog=f"python benchmarks/{script}.py", description=description.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="files go to DIR/<device>")
    return parser


class Figure:
    """One figure's files, under the conditions it is made in."""

    def __init__(self, script: str, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self.script, self.conditions = script, conditions(options.device)
        self.device = device_name(options.device)
        self.folder = options.out / folder_name(options.device)
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.script}.{suffix}"

    def write(self, title: str, rows: list[dict[str, Any]], text: str, show: bool = True) -> None:
        """The rows as CSV; ``text`` as Markdown and, with ``show``, on the screen."""
        write_csv(self.path("csv"), [{**row, **self.conditions} for row in rows])
        command = shlex.join([f"python benchmarks/{self.script}.py", *sys.argv[1:]]).replace("'", "")
        heading = f"{title}, on {self.device}"
        if show:
            print(f"{heading}\n\n{text}\n")
        write_page(self.path("md"), heading, command, self.conditions, text)


def rewritten(text: str, between: str, mark: str) -> str:
    """A page's ``text`` with ``between`` between the marks of that name.

    Raises:
        ValueError: the marks are not there.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"expected {begin} and {end}")
    return f"{before}{begin}\n{between}\n{end}{after}"
