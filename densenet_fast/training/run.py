"""One training run, from its settings to its checkpoint, metrics and picture."""

import importlib.util
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from densenet_fast.memory import MemoryUse, PeakMemory
from densenet_fast.training import checkpoint
from densenet_fast.training.architecture import build_model, check_image_size, load_weights
from densenet_fast.training.data import DataSet, load_data
from densenet_fast.training.distributed import join_processes
from densenet_fast.training.files import atomic_file, write_csv
from densenet_fast.training.images import TrainingBatches, evaluation_loader, stream_seed, training_loader
from densenet_fast.training.loop import Execution, evaluate, learning_rate, train_epoch
from densenet_fast.training.plots import plot_run
from densenet_fast.training.settings import Settings, UsageError

__all__ = ["METRICS", "SUMMARY", "Diverged", "check_data", "check_packages", "initial_model", "new_directory", "train"]

CURVES = "curves.png"
SUMMARY = "summary.json"
METRICS = "metrics.csv"
COLUMNS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "lr",
    "seconds_per_step",
    "images_per_second",
)
"""Of the metrics, a row an epoch."""


class Diverged(Exception):
    """The loss is no longer a finite number. The last checkpoint is the one before."""


def train(settings: Settings, state: dict[str, Any] | None = None) -> Path:
    """Trains, from the beginning or from the checkpoint ``state``, and returns the run directory."""
    check_packages()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.backends.cudnn.benchmark = True
    with join_processes(torch.device(settings.device)) as (processes, device):
        with processes.main_first():
            directory = _run_directory(settings) if processes.is_main else None
            data = load_data(settings)
        directory = processes.from_main(directory)
        check_data(settings, data, processes.count)
        execution = Execution(device, processes, settings.amp, settings.channels_last)
        model = initial_model(settings, data).to(device)
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if settings.sync_bn and processes.count > 1:
            from densenet_fast.nn import SyncBatchNorm

            model = SyncBatchNorm.convert_sync_batchnorm(model)
        _fit(directory, settings, state, data, model, execution)
        return directory


def _fit(
    directory: Path,
    settings: Settings,
    state: dict[str, Any] | None,
    data: DataSet,
    model: nn.Module,
    execution: Execution,
) -> None:
    processes, device = execution.processes, execution.device
    optimizer = torch.optim.SGD(
        model.parameters(),
        settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
    torch.manual_seed(stream_seed(settings.seed, "dropout", processes.rank))
    parts = {"data": data, "model": model, "optimizer": optimizer, "scaler": scaler}
    parts |= {"processes": processes, "device": device}
    rows = checkpoint.restore(state, **parts) if state else []
    if len(rows) >= settings.epochs:
        raise UsageError(f"--epochs: expected more than the {len(rows)} epochs already trained, got {settings.epochs}")

    batches = TrainingBatches(
        len(data.train), settings.batch_size, settings.max_steps, settings.seed, processes.rank, processes.count
    )
    loading = {"workers": settings.workers, "pin_memory": device.type == "cuda"}
    training = training_loader(data.train, batches, **loading)
    test_batch = settings.batch_size // processes.count
    testing = evaluation_loader(data.test, test_batch, rank=processes.rank, processes=processes.count, **loading)
    memory = PeakMemory(device)  # not before the optimizer, whose construction imports much of torch
    trained = _wrapped(model, settings, execution)

    if processes.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        what = f"{settings.implementation} on {settings.data}: {_described(model)}"
        print(f"{what}; {device}, writing to {directory}", flush=True)
    try:
        for epoch in range(len(rows), settings.epochs):
            lr = learning_rate(settings.lr, settings.milestones, epoch, settings.epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            data.train.set_epoch(epoch)
            batches.epoch = epoch
            label = f"{settings.implementation} epoch {epoch + 1}/{settings.epochs}"
            train_score, timing = train_epoch(trained, training, optimizer, scaler, execution, f"{label} train")
            if not math.isfinite(train_score.loss):
                raise Diverged(
                    f"the training loss of epoch {epoch + 1} is {train_score.loss}; try a --lr below {settings.lr:g}"
                )
            test_score = evaluate(model, testing, execution, f"{label} test")
            rows.append(dict(zip(COLUMNS, (epoch + 1, *train_score, *test_score, lr, *timing), strict=True)))
            checkpoint.save(directory, settings=settings, metrics=rows, **parts)
            if processes.is_main:
                write_csv(directory / METRICS, COLUMNS, rows)
                print(_epoch_line(rows[-1], settings.epochs), flush=True)
    finally:
        if processes.is_main and rows:
            _report(directory, settings, rows, memory.read())


def check_packages() -> None:
    """Raises if what the training needs besides torch is missing, before any time is spent."""
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"train: expected {' and '.join(missing)} to be installed: pip install {' '.join(missing)}")


def check_data(settings: Settings, data: DataSet, processes: int) -> None:
    """Raises where the settings do not fit the data or the number of processes."""
    check_image_size(settings, data.image_size)
    if settings.batch_size > len(data.train):
        raise UsageError(
            f"--batch-size: expected at most the {len(data.train)} training images, got {settings.batch_size}"
        )
    if settings.batch_size % processes or settings.batch_size < 2 * processes:
        raise UsageError(
            f"--batch-size: expected a multiple of the {processes} processes with two images each, "
            f"got {settings.batch_size}"
        )


def initial_model(settings: Settings, data: DataSet) -> nn.Module:
    """The model before training: initialised from the seed or from ``--initial-weights``."""
    torch.manual_seed(settings.seed)
    model = build_model(settings, in_channels=data.channels, num_classes=data.classes)
    if settings.initial_weights:
        load_weights(model, settings.initial_weights)
    return model


def new_directory(settings: Settings) -> Path:
    """Where a new run goes: ``--out``, which must not hold anything yet, or a directory below runs/."""
    if settings.out is not None:
        directory = Path(settings.out)
        if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
            raise UsageError(f"--out: expected a new or empty directory, got {directory}; --resume continues a run")
        return directory
    directory = Path("runs") / settings.data
    number = 1
    while directory.exists():
        number += 1
        directory = Path("runs") / f"{settings.data}-{number}"
    return directory


def _run_directory(settings: Settings) -> Path:
    if settings.resume is None:
        return new_directory(settings)
    own = checkpoint.find_checkpoint(settings.resume).parent
    if settings.out is None or Path(settings.out).resolve() == own.resolve():
        return own
    return new_directory(settings)


def _wrapped(model: nn.Module, settings: Settings, execution: Execution) -> nn.Module:
    """What the training step calls; it shares its parameters and buffers with ``model``."""
    wrapped = model
    if execution.processes.count > 1:
        devices = [execution.device] if execution.device.type == "cuda" else None
        wrapped = DistributedDataParallel(model, device_ids=devices)
    return torch.compile(wrapped) if settings.compile else wrapped


def _described(model: nn.Module) -> str:
    from densenet_fast import explain

    size = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"
    parts = explain(model)
    if not parts:
        return size
    reasons = sorted({part.reason for part in parts if not part.fused})
    why = f" (the others: {'; '.join(reasons)})" if reasons else ""
    return f"{size}, {sum(part.fused for part in parts)} of {len(parts)} parts fused{why}"


def _epoch_line(row: Mapping[str, float], epochs: int) -> str:
    """One line of a run's report."""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"
        f"  train loss {row['train_loss']:.4f}  accuracy {100 * row['train_accuracy']:6.2f} %"
        f"  |  test loss {row['test_loss']:.4f}  accuracy {100 * row['test_accuracy']:6.2f} %"
        f"  |  lr {row['lr']:g}  {row['seconds_per_step']:.4f} s/step  {row['images_per_second']:.0f} images/s"
    )


def _report(directory: Path, settings: Settings, rows: list[dict[str, float]], memory: MemoryUse) -> None:
    last = rows[-1]
    summary = {
        "implementation": settings.implementation,
        "epochs": last["epoch"],
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "seconds_per_step": statistics.median(row["seconds_per_step"] for row in rows),
        "peak_memory_bytes": memory.peak,
        "added_memory_bytes": memory.added,
    }
    with atomic_file(directory / SUMMARY) as file:
        file.write(json.dumps(summary, indent=2).encode())
    plot_run(directory / CURVES, f"{settings.implementation} on {settings.data}", rows)
