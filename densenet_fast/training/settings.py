"""What a training run is defined by, and the defaults of each data set and preset."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from densenet_fast.reference import ARCHITECTURES

__all__ = ["DATA_SETS", "MODELS", "PRESETS", "Settings", "UsageError", "flag", "resolve"]


class UsageError(Exception):
    """Bad input: the message names the argument, what was expected and what came. The command exits with code 2."""


@dataclass(frozen=True)
class Settings:
    """All settings of a run. The defaults here are those that no data set changes."""

    # data
    data: str
    root: str | None = None
    download: bool = False
    image_size: int | None = None
    augment: bool = True
    normalize: bool = True
    # network
    model: str = "densenet"
    growth_rate: int = 12
    block_config: tuple[int, ...] = (16, 16, 16)
    num_init_features: int = 24
    bn_size: int | None = 4
    compression: float = 0.5
    small_inputs: bool = True
    drop_rate: float = 0.0
    bias: bool = False
    initial_weights: str | None = None
    # optimisation
    epochs: int = 300
    batch_size: int = 64
    max_steps: int | None = None
    lr: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 1e-4
    seed: int = 0
    # execution
    device: str = "cpu"
    amp: str = "off"
    memory_efficient: bool = False
    channels_last: bool = False
    compile: bool = False
    sync_bn: bool = False
    workers: int = 0
    threads: int | None = None
    # files
    out: str | None = None
    resume: str | None = None
    compare: str | None = None

    @property
    def is_reference(self) -> bool:
        """Whether the stock implementation is trained."""
        return self.model.startswith("reference")

    @property
    def implementation(self) -> str:
        """The name of the implementation in tables and pictures."""
        return "reference" if self.is_reference else "densenet_fast"

    @property
    def reference_model(self) -> str:
        """The ``--model`` that is the stock implementation of this one."""
        return "reference" if self.model == "densenet" else f"reference-{self.model}"


MODELS = ("densenet", *ARCHITECTURES, "reference", *(f"reference-{name}" for name in ARCHITECTURES))

_NAMED = {"bn_size": 4, "compression": 0.5, "small_inputs": False, "bias": False}  # densenet121 to 264
_PAPER_CIFAR: dict[str, Any] = {}  # DenseNet-BC (L = 100, k = 12) and its training: the defaults of Settings

DATA_SETS: dict[str, dict[str, Any]] = {
    # One thread: two have little to share of 8 x 8 pixels, and wait for each other wherever something else is running.
    "digits": {"block_config": (8, 8, 8), "epochs": 20, "threads": 1},
    "fashion-mnist": {"block_config": (6, 6, 6), "epochs": 40},
    "cifar10": _PAPER_CIFAR,
    "cifar100": _PAPER_CIFAR,
    "imagefolder": {
        **ARCHITECTURES["densenet121"]._asdict(),
        **_NAMED,
        "image_size": 224,
        "epochs": 90,
        "batch_size": 256,
        "milestones": (1 / 3, 2 / 3),
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "d2l": {
        "data": "fashion-mnist",
        "image_size": 96,
        "augment": False,
        "normalize": False,
        "growth_rate": 32,
        "block_config": (4, 4, 4, 4),
        "num_init_features": 64,
        "bn_size": None,
        "small_inputs": False,
        "bias": True,
        "epochs": 10,
        "batch_size": 128,
        "lr": 0.1,
        "milestones": (),
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
    },
    "cifar-bc-100": {
        "data": "cifar10",
        "growth_rate": 12,
        "block_config": (16, 16, 16),
        "num_init_features": 24,
        "bn_size": 4,
        "compression": 0.5,
        "small_inputs": True,
        "epochs": 300,
        "batch_size": 64,
        "lr": 0.1,
        "milestones": (0.5, 0.75),
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
    },
}


# What a resumed run may change: how and where it computes, and how long, but not what.
MAY_CHANGE = {
    "amp",
    "channels_last",
    "compile",
    "device",
    "download",
    "epochs",
    "initial_weights",
    "memory_efficient",
    "out",
    "resume",
    "root",
    "sync_bn",
    "threads",
    "workers",
}


def flag(name: str) -> str:
    """The command-line flag of a field: ``--batch-size`` for ``batch_size``."""
    return "--" + name.replace("_", "-")


def resolve(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Settings:
    """The settings of a run: what was given, else the checkpoint's, else the preset's, else the data set's defaults.

    Args:
        given: fields given on the command line, and ``preset``.
        saved: all fields of the run to be continued.
    """
    given = dict(given)
    if given.get("compare") == "none":
        del given["compare"]
    preset = given.pop("preset", None)
    if saved is not None:
        return _resumed(given, saved, preset)
    values = dict(PRESETS[preset]) if preset else {}
    data = given.get("data", values.get("data"))
    if data is None:
        raise UsageError(f"--data: expected one of {', '.join(DATA_SETS)} (or a --preset), got nothing")
    values = {**DATA_SETS[data], **values, "device": _default_device(), **given, "data": data}
    name = values.get("model", "densenet").removeprefix("reference-")
    if name in ARCHITECTURES:
        fixed = ARCHITECTURES[name]._asdict()
        for field in fixed:
            if field in given:
                raise UsageError(
                    f"{flag(field)}: expected only with --model densenet or reference, got --model {values['model']}"
                )
        values |= fixed | {field: given.get(field, value) for field, value in _NAMED.items()}
    if values.get("momentum") == 0 and "nesterov" not in given:
        values["nesterov"] = False
    return _checked(Settings(**values))


def _resumed(given: dict[str, Any], saved: Mapping[str, Any], preset: str | None) -> Settings:
    if preset:
        raise UsageError(f"--preset: expected none with --resume, which continues with its own settings, got {preset}")
    if given.get("compare"):
        raise UsageError(
            "--resume: expected a run of one model, got --compare as well; resume each of its runs by itself"
        )
    for name in (field.name for field in fields(Settings)):
        if name in given and name not in MAY_CHANGE and given[name] != saved[name]:
            raise UsageError(
                f"{flag(name)}: expected {_shown(saved[name])}, as in the run to be resumed, got {_shown(given[name])}"
            )
    here = {"device": _usable(saved["device"]), "download": False, "initial_weights": None, "out": None}
    return _checked(Settings(**{**saved, **here, **given}))


def _checked(settings: Settings) -> Settings:
    if settings.is_reference and settings.memory_efficient:
        raise UsageError(f"--memory-efficient: expected one of our models, got --model {settings.model}")
    if settings.is_reference and settings.compare:
        raise UsageError(f"--compare: expected one of our models to compare with, got --model {settings.model}")
    if settings.nesterov and not settings.momentum:
        raise UsageError("--nesterov: expected a --momentum above 0, got 0")
    if settings.resume and settings.initial_weights:
        raise UsageError("--resume: expected no --initial-weights, which the checkpoint replaces")
    return settings


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _usable(device: str) -> str:
    index = torch.device(device).index or 0
    return device if device == "cpu" or index < torch.cuda.device_count() else _default_device()


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
