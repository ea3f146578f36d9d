"""Checkpoints: everything a run needs to go on as if it had never stopped."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from densenet_fast.training.data import DataSet
from densenet_fast.training.distributed import Processes
from densenet_fast.training.files import atomic_file
from densenet_fast.training.settings import Settings, UsageError

__all__ = ["CHECKPOINT", "find_checkpoint", "read_checkpoint", "restore", "save"]

CHECKPOINT = "checkpoint.pt"
FORMAT = 1


def find_checkpoint(path: str) -> Path:
    """The checkpoint that ``--resume path`` names: the file itself, or the one in a run directory."""
    file = Path(path) / CHECKPOINT if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UsageError(f"--resume: expected a checkpoint or a run directory with {CHECKPOINT}, got {path}")
    return file


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The contents of ``file``, on the CPU."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"--resume: expected a checkpoint, got {file}, which cannot be read: {error}") from error
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != FORMAT:
        raise UsageError(f"--resume: expected a checkpoint of format {FORMAT}, got {file} with {found}")
    return state


def save(
    directory: Path,
    *,
    settings: Settings,
    data: DataSet,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    metrics: list[dict[str, float]],
    processes: Processes,
    device: torch.device,
) -> None:
    """Replaces the run's checkpoint. Every process calls it. The main process writes; the others wait for it."""
    random_states = processes.gather(_random_state(device))
    with processes.main_first():
        if not processes.is_main:
            return
        state = {
            "format": FORMAT,
            "epoch": len(metrics),
            "settings": asdict(settings),
            "data": data.fingerprint,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "random_states": random_states,
            "metrics": metrics,
        }
        with atomic_file(directory / CHECKPOINT) as file:
            torch.save(state, file)


def restore(
    state: dict[str, Any],
    *,
    data: DataSet,
    model: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    processes: Processes,
    device: torch.device,
) -> list[dict[str, float]]:
    """Brings a run back to where ``state`` was saved and returns its metrics so far."""
    for name, size in data.fingerprint.items():
        if size != state["data"][name]:
            what = name.replace("_", " ")
            raise UsageError(
                f"--resume: expected the data of the checkpoint ({what}: {state['data'][name]}), got {size}"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    if len(state["random_states"]) == processes.count:
        _set_random_state(state["random_states"][processes.rank], device)
    elif processes.is_main:
        print(
            f"note: saved by {len(state['random_states'])} processes and resumed by {processes.count}: "
            "dropout draws other values than it would have"
        )
    return state["metrics"]


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
