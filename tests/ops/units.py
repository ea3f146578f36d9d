"""Units and layers for the tests of the ops, and the same in stock operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_fast.functional import BNReLUConv
from helpers import make_norm

SPATIAL = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}


def make_unit(channels, out, kernel, dims, *, bias=False, dtype=torch.float64, **norm):
    weight = torch.randn(out, channels, *[kernel] * dims, dtype=dtype) / channels**0.5
    b = torch.randn(out, dtype=dtype).requires_grad_() if bias else None
    return BNReLUConv(make_norm(channels, dtype=dtype, **norm), weight.requires_grad_(), b)


def make_layers(c0, k=2, width=3, depth=2, dims=2, bottleneck=True, prepend=False, **options):
    layers = []
    for i in range(depth):
        channels = c0 + i * k
        if bottleneck:
            layers.append((make_unit(channels, width, 1, dims, **options), make_unit(width, k, 3, dims, **options)))
        else:
            layers.append((make_unit(channels, k, 3, dims, **options),))
    return layers


def leaves(units):
    return [t for u in units for t in (u.norm.weight, u.norm.bias, u.weight, u.bias) if t is not None]


def untracked(unit):
    """The unit without side effects, for gradcheck's many evaluations."""
    norm = unit.norm
    if norm.frozen:
        return unit
    return unit._replace(norm=norm._replace(running_mean=None, running_var=None, num_batches_tracked=None))


def stock(x: Tensor, unit: BNReLUConv) -> Tensor:
    n = unit.norm
    x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, not n.frozen, n.momentum or 0.0, n.eps)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return convolve(F.relu(x), unit.weight, unit.bias, padding=unit.weight.shape[-1] // 2)


def stock_block(x: Tensor, layers) -> Tensor:
    for layer in layers:
        new = x
        for unit in layer:
            new = stock(new, unit)
        x = torch.cat([x, new], 1)
    return x


BLOCKS = [
    dict(),
    dict(bias=True),
    dict(bottleneck=False),
    dict(bottleneck=False, bias=True),
    dict(affine=False),
    dict(tracked=False, training=False),
    dict(training=False),
    dict(training=False, bottleneck=False, affine=False),
    dict(eps=0.3),
    dict(dims=1),
    dict(dims=3),
    dict(dims=1, bottleneck=False),
    dict(dims=3, bottleneck=False),
    dict(prepend=True),
    dict(prepend=True, bottleneck=False, training=False),
]
