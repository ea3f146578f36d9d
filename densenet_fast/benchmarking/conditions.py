"""The conditions that a figure was measured in: device, driver, versions, commit, date. They stand beside every row."""

import datetime
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

from densenet_fast.backends import select
from densenet_fast.info import processor
from densenet_fast.version import __version__

__all__ = ["conditions", "folder_name", "sentence"]

PACKAGES = ("torchvision", "timm", "triton")


def device_name(device: torch.device) -> str:
    """The name that the device's maker gives it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def folder_name(device: torch.device) -> str:
    """The device's name as a folder: ``nvidia_h100_80gb_hbm3``, ``cpu_amd_epyc_avx2``."""
    name = device_name(device) if device.type == "cuda" else f"cpu_{processor().split(',')[0]}"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def conditions(device: torch.device) -> dict[str, str]:
    """Column name to value."""
    found = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "device": device_name(device),
        "driver": _driver() if device.type == "cuda" else "",
        "threads": str(torch.get_num_threads()),
        "backend": select(device, torch.float32).name,
        "os": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return {**found, "densenet_fast": __version__}


def sentence(found: dict[str, str]) -> str:
    """:func:`conditions` for a reader."""
    names = {"driver": "driver ", "cuda": "CUDA ", "commit": "commit ", "threads": ""}
    parts = [f"{names.get(key, key + ' ')}{value}" for key, value in found.items() if value]
    return ", ".join(parts).replace(f"{found['threads']},", f"{found['threads']} CPU threads,", 1)


def commit() -> str:
    """The commit of the checkout that this package runs from, else empty. A ``+`` says that files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        status = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", ":/densenet_fast", ":/csrc"], capture_output=True
        )
    except OSError:
        return ""
    return head.stdout.strip() + ("+" if status.stdout else "") if head.returncode == 0 else ""


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"the driver's version is unknown: {error}", file=sys.stderr)
        return ""
