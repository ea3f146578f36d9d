"""Bodies to plan: a layer of a dense block, forward and backward, by kernels in CUDA C++ and in Triton alone."""

import torch

from backends.triton.cases import Layer
from densenet_fast.backends import cuda_kernels
from densenet_fast.backends import triton as backend
from densenet_fast.backends.affine import Affine, ThroughStatistics, empty_statistics
from densenet_fast.backends.layout import as_output, to_image


def inputs_of(grid, channels, width, outputs, dtype):
    """What :func:`layer` takes."""
    case = Layer(grid, channels, width, outputs, dtype)
    w2 = case.w2.contiguous(memory_format=torch.channels_last)
    grad = case.gradient[:, : channels + outputs].contiguous()
    return [case.features.contiguous(), list(case.affine1), case.w1, list(case.affine2), w2, None, grad, grid]


def layer(x, affine1, w1, affine2, w2, bias, grad, grid):
    """(features, their statistics, gradients) from x [M, C] and the gradient [M, C + k] of the features."""
    affine1, affine2 = Affine(*affine1), Affine(*affine2)
    (rows, channels), outputs, width = x.shape, w2.shape[0], w1.shape[0]
    features = x.new_empty(rows, channels + outputs)
    inputs, new = features[:, :channels], features[:, channels:]
    statistics = empty_statistics(x, channels + outputs, 1e-5)
    cuda_kernels.append_features(x, inputs, statistics.of(slice(0, channels)))
    z = x.new_empty(rows, width)
    of_z = empty_statistics(z, width, 1e-5)
    backend.bn_relu_conv1x1(inputs, affine1, w1, bias, z, of_z)
    own = statistics.of(slice(channels, channels + outputs))
    backend.bn_relu_conv3x3(z, affine2, w2, None, grid, new, statistics=own)
    g = torch.empty_like(grad)
    cuda_kernels.append_features(grad, g, None)
    through = ThroughStatistics(new, own.mean, own.var, own.rstd, rows)
    dy = cuda_kernels.finalise_gradient(g[:, channels:], through, g[:, channels:])
    scaled = torch.empty_like(z)
    grad_w2, (sum_d, sum_dz) = backend.bn_relu_conv3x3_backward(dy, z, affine2, w2, grid, scaled, need_weight=True)
    cuda_kernels.finalise_gradient(scaled, ThroughStatistics(z, *of_z[:3], rows), scaled)
    grad_w1, sums = backend.bn_relu_conv1x1_backward(
        scaled, inputs, affine1, w1, g[:, :channels], need_weight=True, need_sums=True
    )
    image = as_output(to_image(g, grid))
    return to_image(features, grid), statistics.mean, [grad_w1, None, grad_w2], (sum_d, sum_dz, *sums), image


def native(x, mask):
    """Statistics of x, and x appended: kernels in CUDA C++ alone, through a temporary."""
    temporary, out = torch.empty_like(x), torch.empty_like(x)
    statistics = empty_statistics(x, x.shape[1], 1e-5)
    cuda_kernels.append_features(x, temporary, None, mask, 2.0)
    cuda_kernels.append_features(temporary, out, statistics)
    return out, *statistics[:3]


def equal(one, other):
    """Whether two results are so bitwise, and made of views alike."""
    if isinstance(one, torch.Tensor):
        alike = one.shape == other.shape and one.stride() == other.stride() and one._is_view() == other._is_view()
        return alike and torch.equal(*(t.detach().flatten().view(torch.uint8) for t in (one, other)))
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return one is other
