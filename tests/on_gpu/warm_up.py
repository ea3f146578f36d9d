"""The kernels that the checks and a training step launch, compiled ahead into Triton's cache by all cores at once."""

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

import densenet_fast
from backends.triton.absent_gpu import AbsentGPU
from backends.triton.cases import Layer
from densenet_fast.backends import triton as backend
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.launch import Launch
from densenet_fast.benchmarking.networks import architecture
from densenet_fast.benchmarking.steps import DTYPES
from on_gpu.checks import Check, Record, Wrong
from on_gpu.kernels import numerics
from on_gpu.settings import Settings

LAUNCHES: list[Launch] = []
"""What the forked processes compile."""


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
    with config.assume(config.device_of(torch.device("cuda"))):
        launches = list(planned(settings))
    planning = time.perf_counter() - start
    outcomes = compile_ahead(launches, settings)
    failures = [outcome for outcome in outcomes if isinstance(outcome, str)]
    if failures:
        raise Wrong(f"{len(failures)} of {len(outcomes)} kernels: {'; '.join(failures[:3])}")
    return {"kernels": len(outcomes), "planning_s": planning, "slowest_s": max(outcomes)}


def compile_ahead(launches: Iterable[Launch], settings: Settings) -> list[float | str]:
    """Compiles what is distinct of ``launches``, one at a time on each core: how each ended."""
    LAUNCHES[:] = list({item.variant: item for item in launches}.values())[: settings.compiled]
    compiler = Compiler()
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(settings.processes, context, driver.set_active, (compiler,)) as pool:
        return list(pool.map(compile_one, range(len(LAUNCHES))))


def planned(settings: Settings) -> Iterator[Launch]:
    """The launches of the training step and of the inference of the network, then those of the checks of kernels."""
    yield from of_the_network(settings)
    for name in settings.dtypes:
        for layer in settings.layers:
            with numerics(name) as dtype, launch.planning() as launches:
                Layer(*layer, dtype, "meta").run(backend)
            yield from launches


def of_the_network(settings: Settings) -> list[Launch]:
    """A training step, with and without recomputation, and an inference."""
    dtype = DTYPES[settings.autocast[0]]
    shape = (max(settings.speed_batches), 3, settings.size, settings.size)
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    with launch.planning() as launches:
        for memory_efficient in (False, True):
            with torch.device("meta"):
                model = densenet_fast.DenseNet(**architecture(settings.network), memory_efficient=memory_efficient)
            model.to(dtype=dtype, memory_format=torch.channels_last)(x).sum().backward()
        with torch.no_grad():
            model.eval()(x)
    return launches


def compile_one(number: int) -> float | str:
    """Seconds that the launch of that number took to compile, with its launcher; or what went wrong."""
    item, start = LAUNCHES[number], time.perf_counter()
    try:
        compiled = launch.compiled(item)
        nvidia.CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:
        return f"{item}: {type(error).__name__}: {error}"
    return time.perf_counter() - start
