"""The kernels in CUDA C++ at the shapes of DenseNet-121: results, and the same again when repeated."""

import itertools
from functools import partial

import torch

from backends.comparison import compare
from densenet_fast.backends import aten
from densenet_fast.backends import cuda_kernels as backend
from densenet_fast.backends.affine import Affine, ThroughStatistics, empty_statistics
from densenet_fast.backends.layout import to_image
from on_gpu.checks import Check, LeftOut, Record
from on_gpu.kernels import Results, numerics, same_again, verdict
from on_gpu.settings import Layer, Settings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def checks(settings: Settings) -> list[Check]:
    """One a dtype and part of the network, then what is repeated."""
    parts = {"a block's columns": settings.layers[0], "the stem": settings.stem, "the head": settings.head}
    return [
        *(
            Check(f"every kernel, {dtype}, {part}", partial(against_aten, settings, layer, dtype))
            for dtype, (part, layer) in itertools.product(DTYPES, parts.items())
        ),
        *(Check(f"bitwise the same, bf16, {part}", partial(repeats, settings, layer)) for part, layer in parts.items()),
    ]


class Matrices:
    """Columns of a feature map, of its gradient and of what is appended to it; vectors beside them."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: str) -> None:
        self.grid, self.columns, _, self.new = layer
        rows = torch.Size(self.grid).numel()

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device)

        self.buffer, self.grad = normal(rows, self.columns + self.new).to(dtype), normal(rows, self.columns).to(dtype)
        self.appended = normal(rows, self.new).to(dtype)
        self.vectors = normal(5, self.columns)
        self.mask = normal(self.grid[0], self.new, *self.grid[1:]) > 0
        self.of_images = normal(self.grid[0], self.columns).to(dtype)

    def run(self, module, dtype: torch.dtype) -> Results:
        """Every kernel's results, of buffers the whole buffer, on the same values in ``dtype``."""
        results: Results = {}

        def keep(name: str, *values: torch.Tensor) -> None:
            results.update({f"{name}.{i}": value for i, value in enumerate(values)})

        buffer, grad = self.buffer.to(dtype, copy=True), self.grad.to(dtype)
        mean, scale, shift, p, q = self.vectors.to(torch.promote_types(dtype, torch.float32)).unbind()
        x, affine = buffer[:, : self.columns], Affine(mean, scale, shift)
        own, new, pooled = (empty_statistics(x, n, 1e-3) for n in (self.columns, self.new, self.columns))
        module.channel_statistics(x, own)
        keep("channel_statistics", *own[:3])
        module.append_features(to_image(self.appended.to(dtype), self.grid), buffer[:, self.columns :], new)
        keep("append_features", buffer.clone(), *new[:3])
        module.append_features(
            to_image(self.appended.to(dtype), self.grid), buffer[:, self.columns :], None, self.mask, 2.0
        )
        keep("append_features, dropout", buffer.clone())
        through = ThroughStatistics(x, mean, p, q, len(x))
        keep("finalise_gradient", module.finalise_gradient(grad, through, torch.empty_like(grad)))
        maxima, argmax = module.bn_relu_maxpool(x, affine, self.grid, pooled)
        keep("bn_relu_maxpool", maxima, *pooled[:3])
        scaled, sums = module.bn_relu_maxpool_backward(grad[: len(maxima)], argmax, x, affine, self.grid)
        keep("bn_relu_maxpool_backward", scaled, *sums)
        keep("bn_relu_global_avgpool", module.bn_relu_global_avgpool(x, affine, self.grid))
        scaled, sums = module.bn_relu_global_avgpool_backward(self.of_images.to(dtype), x, affine, self.grid)
        keep("bn_relu_global_avgpool_backward", scaled, *sums)
        return results


def needed() -> None:
    """Raises:
    LeftOut: the library does not serve these kernels.
    """
    if backend.unavailable() is not None:
        raise LeftOut(backend.unavailable())


def against_aten(settings: Settings, layer: Layer, name: str) -> Record:
    """Every kernel's results."""
    needed()
    with numerics("fp32"):
        dtype = DTYPES[name]
        matrices = Matrices(layer, dtype, settings.device)
        truth, stock = matrices.run(aten, torch.float64), matrices.run(aten, dtype)
        return verdict(compare(truth, stock, matrices.run(backend, dtype), dtype))


def repeats(settings: Settings, layer: Layer) -> Record:
    """Every kernel, many times."""
    needed()
    with numerics("bf16") as dtype:
        matrices = Matrices(layer, dtype, settings.device)
        return same_again(lambda: matrices.run(backend, dtype), settings.repeats)
