"""``bench --profile``: a trace of training steps of ours, and where their time goes, part by part."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from densenet_fast.backends import cpu
from densenet_fast.benchmarking.competitors import Entry
from densenet_fast.benchmarking.steps import step
from densenet_fast.table import table

__all__ = ["part_of", "profile_step", "profile_table"]

WARM_UPS, STEPS = 2, 3
OPTIMIZER = "Optimizer.step"
OPS = {
    "densenet_fast::dense_block": "blocks",
    "densenet_fast::bn_relu_conv1x1": "transitions",
    "densenet_fast::bn_relu_maxpool": "stem",
    "densenet_fast::bn_relu_global_avgpool": "head",
    "aten::conv2d": "stem",
    "aten::convolution": "stem",
    "aten::convolution_backward": "stem",
    "aten::linear": "head",
    "aten::addmm": "head",
    "aten::mm": "head",
    "aten::cross_entropy_loss": "head",
}
"""The part of the network that an outermost op belongs to, with or without ``_backward`` behind its name."""
REST = "rest"


def profile_step(
    network: str, batch: int, size: int, dtype: torch.dtype, device: torch.device, memory_efficient: bool, trace: Path
) -> dict[str, float]:
    """Milliseconds of a training step and SGD's, by part of the network. The trace goes to ``trace`` (.json.gz, for
    https://ui.perfetto.dev)."""
    entry = Entry("ours-me" if memory_efficient else "ours", "channels_last", network)
    model, images = entry.model(device, True), entry.images(batch, size, device)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def whole_step() -> None:
        step(model, images, dtype, True, parameters)
        optimizer.step()

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with kernel_by_kernel():
        for _ in range(WARM_UPS):
            whole_step()
        with profile(activities=activities) as profiler:
            for _ in range(STEPS):
                whole_step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(trace))
    return by_part(profiler.events(), device.type == "cuda")


@contextmanager
def kernel_by_kernel() -> Iterator[None]:
    """Makes a block's op call its kernels itself on CPUs too, so that the profiler sees each."""
    runs_whole_blocks, cpu.runs_whole_blocks = cpu.runs_whole_blocks, lambda grid: False
    try:
        yield
    finally:
        cpu.runs_whole_blocks = runs_whole_blocks


def by_part(events: Iterable[Any], on_device: bool) -> dict[str, float]:
    """Milliseconds of a step by part, from the profiler's ``events``: of the GPU's kernels, or of the CPU itself."""
    parts: dict[str, float] = {}
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # the op that launched it knows where it belongs
        names = [event.name]
        parent = event.cpu_parent
        while parent is not None:
            names.append(parent.name)
            parent = parent.cpu_parent
        spent = [(k.name, k.duration) for k in event.kernels] if on_device else [("", event.self_cpu_time_total)]
        for kernel, microseconds in spent:
            part = part_of(names, kernel)
            parts[part] = parts.get(part, 0.0) + microseconds / 1e3 / STEPS
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def part_of(names: list[str], kernel: str) -> str:
    """The part that an event belongs to.

    Args:
        names: its own and those of the ops around it, the innermost first.
        kernel: the name of the GPU kernel that it launched, empty on a CPU.
    """
    if any(name.startswith(OPTIMIZER) for name in names):
        return "optimizer"
    for i, name in reversed(list(enumerate(names))):
        part = OPS.get(name) or OPS.get(name.removesuffix("_backward"))
        if part == "blocks":
            return f"blocks: {_kernel_of(names[:i], kernel)}"
        if part is not None:
            return part
    return REST


def _kernel_of(inner: list[str], kernel: str) -> str:
    """The kernel within a block: the outermost of the backend's own ops, else what was launched, else torch's op."""
    own = [name.removeprefix("densenet_fast::") for name in inner if name.startswith("densenet_fast::")]
    if own:
        return own[-1].removeprefix("cpu_").removeprefix("cuda_")
    if kernel and not kernel.startswith(("void ", "at::")):
        return kernel.removesuffix("_kernel")
    return "torch operations" if inner else "Python and allocation"


def profile_table(parts: dict[str, float]) -> str:
    """For a reader."""
    total = sum(parts.values())
    rows = [(part, f"{ms:.2f}", f"{100 * ms / total:.1f}") for part, ms in parts.items() if ms >= total / 1e4]
    return table(["part", "ms a step", "%"], [*rows, ("total", f"{total:.2f}", "100.0")])
