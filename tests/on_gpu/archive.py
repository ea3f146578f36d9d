"""Files that come back from a machine that returns few."""

import json
import os
import tarfile
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """At once: a reader finds the old or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    os.replace(new, path)


def write_json(path: Path, value: object) -> None:
    """The same."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def pack(folder: Path, path: Path) -> None:
    """All files of a folder into one archive, at once."""
    new = path.with_name(f".{path.name}.new")
    with tarfile.open(new, "w:gz") as archive:
        archive.add(folder, arcname=path.name.split(".")[0])
    os.replace(new, path)
