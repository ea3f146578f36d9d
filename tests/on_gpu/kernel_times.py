"""The GPU time of each kernel in a training step, beside the least that bandwidth and products allow."""

from dataclasses import replace
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from densenet_fast.backends.triton import config
from densenet_fast.benchmarking.ceilings import Ceilings, measure_ceilings
from densenet_fast.benchmarking.competitors import Entry
from densenet_fast.benchmarking.floor import summarise
from densenet_fast.benchmarking.networks import architecture
from densenet_fast.benchmarking.profile import kernel_by_kernel
from densenet_fast.benchmarking.steps import DTYPES, step
from densenet_fast.benchmarking.traffic import Call, training_step
from launches.kernel_times import by_function, by_kernel
from on_gpu.checks import Check, Record
from on_gpu.planning import watched, without_plans
from on_gpu.settings import Settings

STEPS = 3
COMPLETED = "sum_partials"
"""The kernel that also completes the gradients of a block's columns."""


def checks(settings: Settings) -> list[Check]:
    """One step's, and the same with Triton's 3x3 kernels in the place of those in CUDA C++."""
    return [
        Check(f"batch {settings.profiled}", partial(kernels_of_a_step, settings), 60),
        Check(f"batch {settings.profiled}, 3x3 by Triton", partial(by_triton, settings), 60),
    ]


def by_triton(settings: Settings) -> Record:
    """Walked: a plan is kept, whatever kernels it was made of."""
    with config.convolution_in_triton(), without_plans():
        return kernels_of_a_step(settings)


def kernels_of_a_step(settings: Settings) -> Record:
    """Of ours: a row a function of the backends, of the time of all its kernels; and one for every other kernel."""
    device, dtype = torch.device(settings.device), DTYPES[settings.autocast[0]]
    entry = Entry("ours", "channels_last", settings.network)
    torch.backends.cudnn.benchmark = True
    model, images = entry.model(device, True), entry.images(settings.profiled, settings.size, device)
    parameters = list(model.parameters())
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with kernel_by_kernel():
        for _ in range(STEPS):
            with watched() as bodies:
                step(model, images, dtype, True, parameters)
        with profile(activities=activities) as profiler:
            for _ in range(STEPS):
                step(model, images, dtype, True, parameters)
    times = by_function(by_kernel(profiler.key_averages(), device.type, STEPS))
    rows: dict[str, Record] = {function: time._asdict() for function, time in times.items()}
    del model, images, parameters
    ceilings = measure_ceilings(device, dtype)
    add_floors(rows, settings, ceilings, dtype)
    total = {key: sum(row[key] for row in rows.values()) for key in ("seconds", "launches")}
    ordered = sorted(rows.items(), key=lambda item: -item[1]["seconds"])
    return bodies.all_planned(settings) | {
        "kernels": [{"kernel": name, **row} for name, row in ordered],
        "total_s": total["seconds"],
        "launches": total["launches"],
        "copied_bytes_per_s": ceilings.bandwidth,
        "products_per_s": ceilings.products,
    }


def completes_a_block(call: Call) -> bool:
    return call.kernel == "finalise_gradient" and call.part.startswith("block")


def add_floors(rows: dict[str, Record], settings: Settings, ceilings: Ceilings, dtype: torch.dtype) -> None:
    """The floor of each function's calls in a step; what a block completes is no call of its own."""
    calls = training_step(architecture(settings.network), settings.profiled, settings.size, dtype.itemsize)
    calls = [replace(c, kernel=COMPLETED) if completes_a_block(c) else c for c in calls]
    for line in summarise(calls, [0.0] * len(calls), ceilings, 1.0):
        if line.kernel in rows:
            rows[line.kernel] |= {"floor": line.floor, "calls": line.calls, "bytes": line.bytes}
