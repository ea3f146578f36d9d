"""``python -m densenet_fast bench``: time and peak memory of ours beside torchvision's and the reference.

All run the same weights on the same batch. Times are interleaved in one process; the memory of each is measured in a
process of its own, beyond what the process held after the model was built and had run a small step.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import densenet_fast
from densenet_fast import reference
from densenet_fast.memory import PeakMemory
from densenet_fast.reference import ARCHITECTURES
from densenet_fast.table import table
from densenet_fast.thirdparty import import_torchvision

MIB = 1 << 20
MODELS = {name: architecture._asdict() for name, architecture in ARCHITECTURES.items()}
MODELS["densenet_bc100"] = {
    "growth_rate": 12,
    "block_config": (16, 16, 16),
    "num_init_features": 24,
    "num_classes": 10,
    "small_inputs": True,
}
"""What the constructors are given; the last is the paper's DenseNet-BC (L = 100, k = 12) for images of 32x32."""
NOT_IN_TORCHVISION = ("densenet264", "densenet_bc100")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Competitor:
    """An implementation in one memory layout."""

    name: str
    build: Callable[[str], nn.Module]
    channels_last: bool

    def model(self, architecture: str, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return self.build(architecture).to(device=device, memory_format=memory_format)

    def images(self, batch: int, size: int, device: torch.device) -> Tensor:
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
        return images.to(device).to(memory_format=torch.channels_last) if self.channels_last else images.to(device)


def competitors() -> dict[str, Competitor]:
    """By name; torchvision's only where it is installed, which a line on stderr says otherwise."""
    builds: dict[str, Callable[[str], nn.Module]] = {}
    try:
        models = import_torchvision().models
        builds["torchvision"] = lambda name: getattr(models, name)()
    except ModuleNotFoundError:
        print("torchvision is not installed: left out", file=sys.stderr)
    builds["reference"] = lambda name: reference.DenseNet(**MODELS[name])
    builds["densenet_fast"] = lambda name: densenet_fast.DenseNet(**MODELS[name])
    builds["densenet_fast memory_efficient"] = lambda name: densenet_fast.DenseNet(
        **MODELS[name], memory_efficient=True
    )
    layouts = {"contiguous": False, "channels_last": True}
    return {
        f"{name}, {layout}": Competitor(f"{name}, {layout}", build, channels_last)
        for name, build in builds.items()
        for layout, channels_last in layouts.items()
    }


def step(model: nn.Module, images: Tensor, dtype: torch.dtype, train: bool) -> Tensor:
    """A training step without the optimizer's, or inference; returns the logits."""
    with (
        torch.set_grad_enabled(train),
        torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32),
    ):
        logits = model(images)
    if train:
        model.zero_grad()
        labels = torch.arange(len(images), device=images.device) % logits.shape[1]
        F.cross_entropy(logits.float(), labels).backward()
    if images.is_cuda:
        torch.cuda.synchronize()
    return logits


def check_agreement(entries: list[Competitor], options: argparse.Namespace, device: torch.device) -> None:
    """Raises unless all make the same logits and gradients on a small batch in float32."""
    expected = None
    for entry in entries:
        model = entry.model(options.model, device).train(not options.infer)
        logits = step(model, entry.images(4, 64, device), torch.float32, not options.infer)
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        got = (logits.detach(), torch.cat(gradients) if gradients else logits.new_zeros(0))
        expected = expected or got
        for what, a, b in zip(("logits", "gradients"), got, expected):
            error = ((a - b).norm() / b.norm().clamp_min(1e-30)).item() if b.numel() else 0.0
            if not error < 1e-2:
                raise RuntimeError(f"{entry.name}: its {what} differ from those of {entries[0].name} by {error:.1e}")


def measured_times(
    entries: list[Competitor], options: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each step, interleaved."""
    runs = {}
    for entry in entries:
        model = entry.model(options.model, device).train(not options.infer)
        runs[entry.name] = (model, entry.images(options.batch, options.size, device))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in tqdm(range(options.repeats + 1), unit="round", leave=False):
        for name, (model, images) in runs.items():
            start = time.perf_counter()
            step(model, images, DTYPES[options.dtype], not options.infer)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def measured_memory(name: str, options: argparse.Namespace) -> float:
    """MiB that a step of ``name`` adds, in a process of its own."""
    flags = [f"--{key}={getattr(options, key)}" for key in ("model", "batch", "size", "dtype", "device", "threads")]
    mode = ["--infer"] if options.infer else []
    command = [sys.executable, "-m", "densenet_fast", "bench", *flags, *mode, "--memory-of", name]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def own_memory(entry: Competitor, options: argparse.Namespace, device: torch.device) -> float:
    """MiB that a step of ``entry`` adds in this process."""
    model = entry.model(options.model, device).train(not options.infer)
    step(model, entry.images(2, 64, device), DTYPES[options.dtype], not options.infer)
    images = entry.images(options.batch, options.size, device)
    memory = PeakMemory(device)
    step(model, images, DTYPES[options.dtype], not options.infer)
    return memory.read().added / MIB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    parser.description = __doc__.split("\n\n")[1].replace("\n", " ")
    parser.add_argument("--model", choices=MODELS, default="densenet121")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="images per step (16)")
    parser.add_argument("--size", type=int, default=224, metavar="N", help="height and width of the images (224)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16 is autocast")
    parser.add_argument("--infer", action="store_true", help="inference in eval mode instead of a training step")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed rounds after one of warming up (5)")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="CPU threads")
    parser.add_argument("--memory-of", metavar="NAME", help="print only the MiB that a step of NAME adds")


def execute(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Runs the command and returns its exit code."""
    for name, least in (("batch", 1), ("size", 32), ("repeats", 1), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    torch.set_num_threads(options.threads)
    entries = competitors()
    if options.model in NOT_IN_TORCHVISION:
        entries = {name: entry for name, entry in entries.items() if "torchvision" not in name}
    if options.memory_of is not None:
        if options.memory_of not in entries:
            parser.error(f"--memory-of: expected one of {', '.join(entries)}, got {options.memory_of}")
        print(own_memory(entries[options.memory_of], options, options.device))
        return 0
    check_agreement(list(entries.values()), options, options.device)
    memory = {name: measured_memory(name, options) for name in tqdm(entries, desc="memory", leave=False)}
    times = measured_times(list(entries.values()), options, options.device)
    what = "inference" if options.infer else "training step"
    print(
        f"{options.model}, {what}, {options.batch} images of {options.size} x {options.size}, {options.dtype}, "
        f"{options.device}, {options.threads} threads, torch {torch.__version__}\n"
    )
    print(_table(times, memory))
    return 0


def _table(times: dict[str, list[float]], memory: dict[str, float]) -> str:
    medians = {name: statistics.median(values) for name, values in times.items()}
    stock = "torchvision" if any("torchvision" in name for name in times) else "reference"
    best_time = min(value for name, value in medians.items() if stock in name)
    best_memory = min(value for name, value in memory.items() if stock in name)
    rows = []
    for name, values in times.items():
        low, high = (sorted(values)[round(q * (len(values) - 1))] for q in (0.2, 0.8))
        speed, saved = best_time / medians[name], memory[name] / best_memory if best_memory else float("nan")
        rows.append(
            (
                name,
                f"{medians[name]:.3f}",
                f"{low:.3f} - {high:.3f}",
                f"{speed:.2f}x",
                f"{memory[name]:.0f}",
                f"{saved:.2f}",
            )
        )
    header = ("implementation", "seconds", "20 - 80 %", f"speed, {stock} 1", "peak MiB", f"memory, {stock} 1")
    return table(header, rows)
