"""The kernels in Triton at the shapes of DenseNet-121: results, and the same again when repeated."""

import contextlib
from functools import partial

import torch

from backends.comparison import compare
from backends.triton.cases import TF32_ROUNDING
from backends.triton.cases import Layer as Tensors
from densenet_fast.backends import aten
from densenet_fast.backends import triton as backend
from densenet_fast.backends.affine import Affine, accumulation_dtype, empty_statistics
from densenet_fast.backends.triton import config
from on_gpu.checks import Check, Record
from on_gpu.kernels import Results, numerics, same_again, verdict
from on_gpu.settings import Layer, Settings


def checks(settings: Settings) -> list[Check]:
    """One a layer in the first dtype, what is repeated in it, then the other dtypes."""
    dtype, *others = settings.dtypes
    repeated = [
        Check(f"bitwise the same, {dtype}, {title(layer)}", partial(repeats, settings, layer, dtype))
        for layer in settings.layers
    ]
    product = f"bn_relu_conv1x1 {settings.wide_repeats} times, {dtype}, C = {settings.wide_channels}"
    repeated += [Check(f"{product}, M = {rows}", partial(wide, settings, rows)) for rows in settings.wide]
    return [*every_kernel(settings, dtype), *repeated, *(c for name in others for c in every_kernel(settings, name))]


def every_kernel(settings: Settings, dtype: str) -> list[Check]:
    return [
        Check(f"every kernel, {dtype}, {title(layer)}", partial(against_aten, settings, layer, dtype), 40)
        for layer in settings.layers
    ]


def title(layer: Layer) -> str:
    """What a reader calls it."""
    grid, channels, width, outputs = layer
    return f"{'x'.join(map(str, grid))} pixels, C = {channels}, B = {width}, k = {outputs}"


def against_aten(settings: Settings, layer: Layer, name: str, native: bool = False) -> Record:
    """Every kernel's results; the 3x3 product's by ``native`` kernels in CUDA C++, where they serve, or by Triton."""
    with numerics(name) as dtype, chosen(native):
        tensors = Tensors(*layer, dtype, settings.device)
        return verdict(tensors.against_aten(backend, dtype, TF32_ROUNDING if name == "tf32" else 0.0))


def repeats(settings: Settings, layer: Layer, name: str, native: bool = False) -> Record:
    """Every kernel, many times."""
    with numerics(name) as dtype, chosen(native):
        tensors = Tensors(*layer, dtype, settings.device)
        return same_again(lambda: tensors.run(backend), settings.repeats)


def chosen(native: bool) -> contextlib.AbstractContextManager[None]:
    """The kernels of the 3x3 product."""
    return contextlib.nullcontext() if native else config.convolution_in_triton()


def wide(settings: Settings, rows: int) -> Record:
    """One product with many channels and everything in the L2 cache, many times: where products that are still in
    flight would read what the next step of the loop has overwritten."""
    channels, width = settings.wide_channels, settings.layers[0][2]
    with numerics(settings.dtypes[0]) as dtype:
        x = torch.randn(rows, channels, device=settings.device)
        weight = torch.randn(width, channels, device=settings.device) / channels**0.5
        affine = Affine(*torch.randn(4, channels, device=settings.device).unbind())

        def run(module, dtype: torch.dtype) -> Results:
            own = Affine(*(t.to(accumulation_dtype(dtype)) for t in affine))
            z = torch.empty(rows, width, dtype=dtype, device=settings.device)
            statistics = empty_statistics(z, width, 1e-5)
            module.bn_relu_conv1x1(given.to(dtype), own, factors.to(dtype), None, z, statistics)
            return {"Z": z, "mean": statistics.mean, "var": statistics.var, "rstd": statistics.rstd}

        given, factors = x.to(dtype), weight.to(dtype)
        found = verdict(compare(run(aten, torch.float64), run(aten, dtype), run(backend, dtype), dtype))
        return found | same_again(lambda: run(backend, dtype), settings.wide_repeats)
