"""The backends' functions on scratch tensors of a call's shape."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.affine import (
    Affine,
    Statistics,
    ThroughStatistics,
    Unfinished,
    accumulation_dtype,
    empty_statistics,
)
from densenet_fast.backends.layout import to_image
from densenet_fast.benchmarking.traffic import Call

__all__ = ["Kernels"]


class Kernels:
    """Makes calls of the backend that serves ``dtype`` on ``device``."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.backend = select(device, dtype)
        self._matrices: dict[tuple[str, int, int], Tensor] = {}

    def prepare(self, call: Call) -> Callable[[], object]:
        """A function that runs ``call`` once, on tensors made now."""
        return getattr(self, f"_{call.kernel}")(call)

    def release(self) -> None:
        """Drops the scratch tensors."""
        self._matrices.clear()

    def _matrix(self, role: str, rows: int, columns: int) -> Tensor:
        """A matrix [rows, columns] for each role and shape."""
        key = role, rows, columns
        if key not in self._matrices:
            self._matrices[key] = torch.randn(rows, columns, device=self.device, dtype=self.dtype)
        return self._matrices[key]

    def _vectors(self, count: int, columns: int) -> tuple[Tensor, ...]:
        dtype = accumulation_dtype(self.dtype)
        return torch.rand(count, columns, device=self.device, dtype=dtype).add_(0.5).unbind()

    def _affine(self, columns: int) -> Affine:
        return Affine(*self._vectors(3, columns))

    def _weight(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype) * 0.01

    def _through(self, x: Tensor) -> ThroughStatistics:
        return ThroughStatistics(x, *self._vectors(3, x.shape[1]), x.shape[0])

    def _statistics(self, columns: int) -> Statistics:
        return empty_statistics(self._weight(0), columns, 1e-5)

    @staticmethod
    def _rows(call: Call) -> int:
        return call.grid[0] * call.grid[1] * call.grid[2]

    def _features(self, call: Call, role: str = "F") -> Tensor:
        """The columns that ``call`` reads of its buffer."""
        return self._matrix(role, self._rows(call), call.columns)[:, : call.inputs]

    def _append_features(self, call: Call) -> Callable[[], object]:
        new = to_image(self._matrix("x", self._rows(call), call.inputs), call.grid)
        out, statistics = self._features(call), self._statistics(call.inputs)
        return lambda: self.backend.append_features(new, out, statistics)

    def _channel_statistics(self, call: Call) -> Callable[[], object]:
        x, out = self._features(call), self._statistics(call.inputs)
        return lambda: self.backend.channel_statistics(x, out)

    def _bn_relu_conv1x1(self, call: Call) -> Callable[[], object]:
        x, affine, weight = self._features(call), self._affine(call.inputs), self._weight(call.outputs, call.inputs)
        z, statistics = self._matrix("Z", self._rows(call), call.outputs), self._statistics(call.outputs)
        return lambda: self.backend.bn_relu_conv1x1(x, affine, weight, None, z, statistics)

    def _bn_relu_conv1x1_backward(self, call: Call) -> Callable[[], object]:
        x, affine, weight = self._features(call), self._affine(call.inputs), self._weight(call.outputs, call.inputs)
        grad, grad_x = self._matrix("dZ", self._rows(call), call.outputs), self._features(call, "G")
        unfinished = Unfinished(self._through(self._matrix("Z", self._rows(call), call.outputs)))
        return lambda: self.backend.bn_relu_conv1x1_backward(
            grad, x, affine, weight, grad_x, need_weight=True, need_sums=True, unfinished=unfinished
        )

    def _bn_relu_conv3x3(self, call: Call) -> Callable[[], object]:
        z, affine = self._matrix("Z", self._rows(call), call.inputs), self._affine(call.inputs)
        weight, out = self._weight(call.outputs, call.inputs, 3, 3), self._new_columns(call, "F")
        own = self._statistics(call.outputs)
        return lambda: self.backend.bn_relu_conv3x3(z, affine, weight, None, call.grid, out, statistics=own)

    def _bn_relu_conv3x3_backward(self, call: Call) -> Callable[[], object]:
        z, affine = self._matrix("Z", self._rows(call), call.inputs), self._affine(call.inputs)
        weight, grad = self._weight(call.outputs, call.inputs, 3, 3), self._new_columns(call, "G")
        dz = self._matrix("dZ", self._rows(call), call.inputs)
        return lambda: self.backend.bn_relu_conv3x3_backward(grad, z, affine, weight, call.grid, dz, need_weight=True)

    def _new_columns(self, call: Call, role: str) -> Tensor:
        return self._matrix(role, self._rows(call), call.columns)[:, -call.outputs :]

    def _finalise_gradient(self, call: Call) -> Callable[[], object]:
        x, grad = self._features(call), self._features(call, "G")
        through = self._through(x)
        return lambda: self.backend.finalise_gradient(grad, through, grad)

    def _bn_relu_pool_conv1x1(self, call: Call) -> Callable[[], object]:
        x, affine, weight = self._features(call), self._affine(call.inputs), self._weight(call.outputs, call.inputs)
        return lambda: self.backend.bn_relu_pool_conv1x1(x, affine, weight, None, call.grid, None)

    def _bn_relu_pool_conv1x1_backward(self, call: Call) -> Callable[[], object]:
        x, affine, weight = self._features(call), self._affine(call.inputs), self._weight(call.outputs, call.inputs)
        grad = torch.randn_like(self.backend.bn_relu_pool_conv1x1(x, affine, weight, None, call.grid, None))
        need = dict(need_input=True, need_weight=True)
        return lambda: self.backend.bn_relu_pool_conv1x1_backward(grad, x, affine, weight, call.grid, **need)

    def _bn_relu_maxpool(self, call: Call) -> Callable[[], object]:
        x, affine = self._features(call), self._affine(call.inputs)
        return lambda: self.backend.bn_relu_maxpool(x, affine, call.grid, None)

    def _bn_relu_maxpool_backward(self, call: Call) -> Callable[[], object]:
        x, affine = self._features(call), self._affine(call.inputs)
        out, argmax = self.backend.bn_relu_maxpool(x, affine, call.grid, None)
        return lambda: self.backend.bn_relu_maxpool_backward(out, argmax, x, affine, call.grid)

    def _bn_relu_global_avgpool(self, call: Call) -> Callable[[], object]:
        x, affine = self._features(call), self._affine(call.inputs)
        return lambda: self.backend.bn_relu_global_avgpool(x, affine, call.grid)

    def _bn_relu_global_avgpool_backward(self, call: Call) -> Callable[[], object]:
        x, affine = self._features(call), self._affine(call.inputs)
        grad = self._weight(call.grid[0], call.inputs)
        return lambda: self.backend.bn_relu_global_avgpool_backward(grad, x, affine, call.grid)

    def _conv0(self, call: Call) -> Callable[[], object]:
        image, weight, options = self._stem(call)
        return lambda: F.conv2d(image, weight, **options)

    def _conv0_backward(self, call: Call) -> Callable[[], object]:
        image, weight, options = self._stem(call)
        grad, pair = (
            torch.ones_like(F.conv2d(image, weight, **options)),
            [(options[k],) * 2 for k in ("stride", "padding")],
        )
        return lambda: torch.ops.aten.convolution_backward(
            grad, image, weight, None, *pair, (1, 1), False, (0, 0), 1, (False, True, False)
        )

    def _stem(self, call: Call) -> tuple[Tensor, Tensor, dict[str, int]]:
        n, h, w = call.grid
        image = torch.randn(n, 3, h, w, device=self.device, dtype=self.dtype).to(memory_format=torch.channels_last)
        small = call.products == n * h * w * 27 * call.outputs
        weight = self._weight(call.outputs, 3, *((3, 3) if small else (7, 7)))
        return image, weight, {"stride": 1, "padding": 1} if small else {"stride": 2, "padding": 3}

    def _classifier(self, call: Call) -> Callable[[], object]:
        x, weight = self._weight(call.grid[0], call.inputs), self._weight(call.outputs, call.inputs)
        return lambda: x @ weight.t()

    def _classifier_backward(self, call: Call) -> Callable[[], object]:
        x, weight = self._weight(call.grid[0], call.inputs), self._weight(call.outputs, call.inputs)
        grad = self._weight(call.grid[0], call.outputs)
        return lambda: (grad @ weight, grad.t() @ x)
