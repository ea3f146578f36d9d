"""The kernels that the checks and a training step launch, compiled ahead into Triton's cache by all cores at once."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

import densenet_fast
from backends.triton.absent_gpu import AbsentGPU
from backends.triton.cases import Layer
from densenet_fast import operands
from densenet_fast.backends import triton as backend
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.launch import Launch
from densenet_fast.benchmarking.networks import architecture
from densenet_fast.benchmarking.steps import DTYPES
from on_gpu.checks import Check, Record, Wrong
from on_gpu.kernels import numerics
from on_gpu.settings import Settings

WORK: list[tuple[Callable[[Launch], str | None], Launch]] = []
"""What the forked processes do, and with what."""


class Outcome(NamedTuple):
    """Seconds that it took, the fault it found and the error it ended with, or nothing."""

    seconds: float
    fault: str
    error: str


class Compiler(AbsentGPU):
    """A Triton driver for compiling for the device at hand, which it does not touch."""

    def __init__(self) -> None:
        major, minor = torch.cuda.get_device_capability()
        super().__init__(10 * major + minor)
        self.utils = nvidia.CudaUtils()


def checks(settings: Settings) -> list[Check]:
    """Compiling them."""
    return [Check("the kernels compile", partial(compile_all, settings), 110)]


def compile_all(settings: Settings) -> Record:
    """Every distinct launch.

    Raises:
        Wrong: some do not compile.
    """
    start = time.perf_counter()
    launches = planned(settings)
    planning = time.perf_counter() - start
    outcomes = in_parallel(with_launcher, launches, settings)
    raise_if_any([outcome.error for outcome in outcomes.values()])
    slowest = max(outcome.seconds for outcome in outcomes.values())
    return {"kernels": len(outcomes), "planning_s": planning, "slowest_s": slowest}


def with_launcher(item: Launch) -> None:
    """Compiles a launch and what launches it."""
    compiled = launch.compiled(item)
    nvidia.CudaLauncher(compiled.src, compiled.metadata)


def raise_if_any(faults: Sequence[str]) -> None:
    """Raises:
    Wrong: with the first of the faults, if there are any.
    """
    found = [fault for fault in faults if fault]
    if found:
        raise Wrong(f"{len(found)} of {len(faults)} kernels: {'; '.join(found[:3])}")


def in_parallel(
    work: Callable[[Launch], str | None], launches: Iterable[Launch], settings: Settings
) -> dict[Any, Outcome]:
    """What came of ``work`` on each distinct launch, by its variant; a core has one at a time."""
    distinct = list({item.variant: item for item in launches}.values())[: settings.compiled]
    WORK[:] = [(work, item) for item in distinct]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(settings.processes, context, driver.set_active, (Compiler(),)) as pool:
        return dict(zip([item.variant for item in distinct], pool.map(outcome, range(len(WORK)))))


def outcome(number: int) -> Outcome:
    """Does the work of that number."""
    (work, item), start = WORK[number], time.perf_counter()
    try:
        fault, error = work(item), ""
    except Exception as caught:
        fault, error = None, f"{item}: {type(caught).__name__}: {caught}"
    return Outcome(time.perf_counter() - start, f"{item}: {fault}" if fault else "", error)


def planned(settings: Settings) -> list[Launch]:
    """The launches of the training step and of the inference of the network, then those of the checks of kernels."""
    with config.assume(config.device_of(torch.device("cuda"))):
        found = of_the_network(settings)
        for name in settings.dtypes:
            for layer in settings.layers:
                with numerics(name) as dtype, launch.planning() as launches:
                    Layer(*layer, dtype, "meta").run(backend)
                found += launches
    return found


def of_the_network(settings: Settings) -> list[Launch]:
    """A training step, with and without recomputation, and an inference, under autocast: the parameters, which kernels
    read and make gradients of, are in float32. Autocast knows no meta device: torch's own layers are in its dtype."""
    dtype = DTYPES[settings.autocast[0]]
    shape = (max(settings.speed_batches), 3, settings.size, settings.size)
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    with launch.planning() as launches, mock.patch.object(operands, "autocast_dtype", lambda device: dtype):
        for memory_efficient in (False, True):
            with torch.device("meta"):
                model = densenet_fast.DenseNet(**architecture(settings.network), memory_efficient=memory_efficient)
            model.features.conv0.to(dtype), model.classifier.to(dtype)
            model.to(memory_format=torch.channels_last)(x).sum().backward()
        with torch.no_grad():
            model.eval()(x)
    return launches
