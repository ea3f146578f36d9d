"""The time of each kernel in a training step, by the profiler, or from the page that a run on a GPU left."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["FUNCTIONS", "Time", "by_function", "measure", "read_page", "short"]

WARM_UPS, STEPS = 3, 3
SELF_TIME = {"cuda": "self_device_time_total", "cpu": "self_cpu_time_total"}
TYPES = {"cuda": torch.autograd.DeviceType.CUDA, "cpu": torch.autograd.DeviceType.CPU}
FUNCTIONS = {
    "bn_relu": "bn_relu_conv3x3",
    "bn_relu_conv3x3_grad_input": "bn_relu_conv3x3_backward",
    "bn_relu_conv3x3_grad_weight": "bn_relu_conv3x3_backward",
    "bn_relu_conv3x3_kernel": "bn_relu_conv3x3",
    "bn_relu_conv3x3_grad_input_kernel": "bn_relu_conv3x3_backward",
    "bn_relu_conv3x3_grad_weight_kernel": "bn_relu_conv3x3_backward",
    "append_kernel": "append_features",
    "finalise_kernel": "finalise_gradient",
    "bn_relu_maxpool_kernel": "bn_relu_maxpool",
    "bn_relu_global_avgpool_kernel": "bn_relu_global_avgpool",
}
"""The backends' function of each kernel on the GPU, where their names differ."""
OP = re.compile(r"densenet_fast::(?!cpu_|cuda_)")
"""What an op calls itself, beside its kernels."""
HEAD = re.compile(r"^batch (\d+): [\d.]+ ms in \d+ launches")
LINE = re.compile(r"^(\S+) +([\d.]+) +\S+ +\S+ +(\d+)$")


class Time(NamedTuple):
    """Of all launches of a kernel, or of a function's kernels, in a step."""

    seconds: float = 0.0
    launches: float = 0.0

    def plus(self, seconds: float, launches: float) -> "Time":
        return Time(self.seconds + seconds, self.launches + launches)


def measure(run: Callable[[], object], device: torch.device) -> dict[str, Time]:
    """By the kernel's name, of one call of ``run``, which returns when the device is done."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for _ in range(WARM_UPS):
        run()
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            run()
    return by_kernel(profiler.key_averages(), device.type, STEPS)


def by_kernel(averages: Iterable[Any], device: str, steps: int) -> dict[str, Time]:
    """A step's, of what the profiler saw on ``device`` in ``steps``."""
    times: dict[str, Time] = {}
    for event in averages:
        seconds = getattr(event, SELF_TIME[device]) * 1e-6 / steps
        shown = not getattr(event, "is_user_annotation", False) and not OP.match(event.key)
        if event.device_type == TYPES[device] and shown and seconds:
            name = short(event.key)
            times[name] = times.get(name, Time()).plus(seconds, event.count / steps)
    return times


def by_function(times: dict[str, Time]) -> dict[str, Time]:
    """The kernels of each function of the backends added up."""
    found: dict[str, Time] = {}
    for kernel, time in times.items():
        function = FUNCTIONS.get(kernel, kernel)
        found[function] = found.get(function, Time()).plus(*time)
    return found


def short(name: str) -> str:
    """A kernel's name without what its types and templates add."""
    name = re.sub(r"^void |\(anonymous namespace\)::", "", name).split("(")[0].split("<")[0]
    return name.split("::")[-1].removeprefix("cpu_")


def read_page(path: Path) -> tuple[int, dict[str, Time]]:
    """The batch, and the times by function, on the page of kernels that ``tests/gpu.py`` printed.

    Raises:
        ValueError: the page has no such table.
    """
    batch, times = None, {}
    for line in path.read_text().splitlines():
        if head := HEAD.match(line):
            batch = int(head[1])
        elif batch is not None and (found := LINE.match(line)):
            times[found[1]] = Time(float(found[2]) * 1e-3, float(found[3]))
    if batch is None or not times:
        raise ValueError(f"{path}: expected a table of kernels, found none")
    return batch, times
