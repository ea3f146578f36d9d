"""A dense layer's and a transition's tensors, and every kernel run on them."""

import torch

from backends.comparison import Comparison, compare
from densenet_fast.backends import aten
from densenet_fast.backends.affine import (
    Affine,
    Completion,
    Reader,
    ThroughStatistics,
    Unfinished,
    empty_statistics,
)

LAYERS = [
    # grid, C, B, k
    ((2, 5, 7), 33, 20, 12),
    ((1, 9, 4), 24, 48, 12),
    ((3, 2, 1), 5, 1, 3),
    ((1, 5, 8), 17, 33, 17),
]

TF32_ROUNDING = 2.0**-9
"""Relative, of operands."""


class Layer:
    """A buffer F [M, C + k + 5] whose columns beyond the layer's inputs are NaN, G beside it, and random weights."""

    def __init__(self, grid, channels, width, outputs, dtype, device="cpu", extra=5):
        def normal(*shape):
            return torch.randn(*shape, device=device)

        self.grid, self.channels, self.width, self.outputs = grid, channels, width, outputs
        self.rows = torch.Size(grid).numel()
        self.buffer = torch.full((self.rows, channels + outputs + extra), torch.nan, dtype=dtype, device=device)
        self.buffer[:, :channels] = normal(self.rows, channels).to(dtype)
        self.gradient = torch.full_like(self.buffer, torch.nan)
        self.gradient[:, : channels + outputs] = normal(self.rows, channels + outputs).to(dtype)
        self.affine1, self.affine2 = Affine(*normal(4, channels).unbind()), Affine(*normal(3, width).unbind())
        self.w1, self.bias1 = (normal(width, channels) / channels**0.5).to(dtype), normal(width).to(dtype)
        self.w2, self.bias2 = (normal(outputs, width, 3, 3) / (3 * width**0.5)).to(dtype), normal(outputs).to(dtype)
        self.mask = normal(grid[0], outputs, *grid[1:]) > 0
        self.transition = (normal(outputs, channels) / channels**0.5).to(dtype)
        self.z, self.dz = normal(self.rows, width).to(dtype), normal(self.rows, width).to(dtype)
        self.dt = normal(grid[0] * (grid[1] // 2) * (grid[2] // 2), outputs).to(dtype)

    def to(self, dtype):
        """The same values in ``dtype``."""
        other = object.__new__(type(self))
        for name, value in vars(self).items():
            if isinstance(value, Affine):
                wide = torch.promote_types(dtype, torch.float32)
                value = Affine(*(t if t is None else t.to(wide) for t in value))
            elif isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
                value = value.to(dtype)
            setattr(other, name, value)
        return other

    def empty_bottleneck(self):
        """[M, B + 5] of NaN. The bottleneck's columns are all but the first three and the last two."""
        return self.z.new_full((self.rows, self.width + 5), torch.nan)

    @property
    def features(self):
        return self.buffer[:, : self.channels]

    @property
    def new(self):
        return slice(self.channels, self.channels + self.outputs)

    def run(self, backend):
        """Every kernel's results by name. Of a buffer it is the whole one."""
        results = {}

        def keep(name, *values):
            for i, value in enumerate(values):
                values = value if isinstance(value, tuple) else (value,)
                results.update({f"{name}.{i}.{j}": v for j, v in enumerate(values) if v is not None})

        buffer, gradient = self.buffer.clone(), self.gradient.clone()
        f, g = buffer[:, : self.channels], gradient[:, : self.channels]
        z = self.empty_bottleneck()
        statistics = empty_statistics(z, self.width, 1e-5)
        backend.bn_relu_conv1x1(f, self.affine1, self.w1, None, z[:, 3:-2], statistics)
        keep("1x1", z.clone(), statistics[:3])
        backend.bn_relu_conv1x1(f, self.affine1, self.w1, self.bias1, z[:, 3:-2], None)
        keep("1x1 with bias", z.clone())
        backend.bn_relu_conv1x1(f, self.affine1, self.w1, self.bias1, z[:, 3:-2], None, then=self.affine2)
        keep("1x1 normalised again", z)
        first = (self.dz, f, self.affine1, self.w1)
        keep("1x1 backward", *backend.bn_relu_conv1x1_backward(*first, g, need_weight=True, need_sums=True))
        keep("1x1 backward, sums", *backend.bn_relu_conv1x1_backward(*first, None, need_weight=False, need_sums=True))
        keep("1x1 backward, weight", *backend.bn_relu_conv1x1_backward(*first, None, need_weight=True, need_sums=False))
        second = (self.z, self.affine2, self.w2)
        statistics = empty_statistics(buffer, self.outputs, 1e-5)
        backend.bn_relu_conv3x3(*second, None, self.grid, buffer[:, self.new], statistics=statistics)
        keep("3x3", buffer.clone(), statistics[:3])
        rectified = (self.z.relu(), None, self.w2, None, self.grid)
        backend.bn_relu_conv3x3(*rectified, buffer[:, self.new])
        keep("3x3 of what is rectified", buffer.clone())
        backend.bn_relu_conv3x3(*second, self.bias2, self.grid, buffer[:, self.new], mask=self.mask, keep_scale=2.0)
        keep("3x3 with bias and mask", buffer)
        dy = gradient[:, self.new]
        scaled = self.empty_bottleneck()
        gradients = backend.bn_relu_conv3x3_backward(dy, *second, self.grid, scaled[:, 3:-2], need_weight=True)
        keep("3x3 backward", scaled, *gradients)
        keep("3x3 backward, weight", *backend.bn_relu_conv3x3_backward(dy, *second, self.grid, None, need_weight=True))
        keep("G", gradient)
        keep("layer backward", *self.backward(backend, parameter=torch.float32))
        keep("layer backward, of halves", *self.backward(backend, parameter=self.w2.dtype, channels_last=True))
        if min(self.grid[1:]) > 1:
            third = (f, self.affine1, self.transition)
            statistics = empty_statistics(f, self.outputs, 1e-5)
            keep("transition", backend.bn_relu_pool_conv1x1(*third, None, self.grid, statistics), statistics[:3])
            bias = self.bias2
            keep("transition with bias", backend.bn_relu_pool_conv1x1(*third, bias, self.grid, None))
            third, both = (self.dt, *third, self.grid), dict(need_input=True, need_weight=True)
            keep("transition backward", *backend.bn_relu_pool_conv1x1_backward(*third, **both))
            reader, like = self.reader(self.affine1, torch.float32), self.transition.float()[:, :, None, None]
            scaled, grad, _ = backend.bn_relu_pool_conv1x1_backward(*third, **both, reader=reader, like=like)
            keep("transition backward, read", scaled, grad.float().flatten(1), *reader.after, *reader[2:])
            only_weight = backend.bn_relu_pool_conv1x1_backward(*third, need_input=False, need_weight=True)
            keep("transition backward, weight", *only_weight)
        return results

    @staticmethod
    def reader(affine, dtype, before=None):
        """A reader that asks for everything. The normalisation's weight and bias are of ``dtype``."""
        return Reader(
            before,
            tuple(torch.full_like(affine.mean, torch.nan) for _ in range(2)),
            *(torch.full_like(affine.mean, torch.nan, dtype=dtype) for _ in range(2)),
        )

    def backward(self, backend, parameter, channels_last=False):
        """A layer's backward pass in one piece, as a block does it: from dY to G and all gradients of parameters. The
        last three of the inputs' columns of G are completed in place."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        like1 = self.w1.to(parameter)[:, :, None, None]
        like2 = self.w2.to(parameter).contiguous(memory_format=memory_format)
        gradient, wide = self.gradient.clone(), self.affine1.mean.dtype
        g, last = gradient[:, : self.channels], slice(self.channels - 3, self.channels)
        before = tuple((self.affine1.rstd * i).to(wide) for i in (2, 3))
        inner, outer = self.reader(self.affine2, parameter), self.reader(self.affine1, parameter, before)
        unfinished = Unfinished(ThroughStatistics(self.z, self.affine2.mean, *inner.after, self.rows))
        dz = self.empty_bottleneck()
        given = (gradient[:, self.new].clone(), self.z, self.affine2, self.w2, self.grid, dz[:, 3:-2])
        options = dict(need_weight=True, reader=inner, unfinished=unfinished, like=like2)
        grad_w2, _ = backend.bn_relu_conv3x3_backward(*given, **options)
        through = ThroughStatistics(
            self.features[:, last], self.affine1.mean[last], *(v[last] for v in outer.after), self.rows
        )
        options = dict(need_weight=True, need_sums=True, source=2 * self.features, reader=outer, like=like1)
        options |= dict(completion=Completion(last, through, g[:, last]), unfinished=unfinished)
        given = (dz[:, 3:-2], self.features, self.affine1, self.w1, g)
        grad_w1, _ = backend.bn_relu_conv1x1_backward(*given, **options)
        grads = (grad.to(parameter).reshape(like.shape) for grad, like in ((grad_w1, like1), (grad_w2, like2)))
        return gradient, dz, *grads, *outer.after, *outer[2:], *inner.after, *inner[2:]

    def in_tf32(self):
        """The same values. Matrices are rounded towards zero to TF32's ten bits, as products in TF32 may read them."""
        other = self.to(torch.float32)
        for name, value in vars(other).items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                setattr(other, name, (value.view(torch.int32) & ~0x1FFF).view(torch.float32))
        return other

    def against_aten(self, backend, dtype, rounding=0.0) -> list[Comparison]:
        """Every kernel's results beside those of ``aten`` in ``dtype``, the layer's. With ``rounding`` the operands of
        products are rounded to TF32. That changes a result more where its terms cancel."""
        exact = self.to(torch.float64).run(aten)
        rounded = self.in_tf32().to(torch.float64).run(aten) if rounding else exact
        return compare(exact, self.run(aten), self.run(backend), dtype, rounding, rounded)
