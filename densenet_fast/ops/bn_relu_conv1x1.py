"""densenet_fast::bn_relu_conv1x1 and densenet_fast::bn_relu_pool_conv1x1 (the transition): batch normalisation, ReLU,
for the transition a 2x2 mean, and a 1x1 convolution in one op that saves its input alone.

    out = relu(bn(x)) @ W^T   or   mean2x2(relu(bn(x))) @ W^T
    D = (grad @ W  or its unpooling) * (bn(x) > 0);  dW = grad^T @ relu(bn(x))  or its pooled form
    P = -s * sum D;  Q = -s * r^2 * sum D * (x - mu) / 2
    dx = s * D + (P + 2 * Q * (x - mu)) / M                                    (1), (2)
"""

import torch
from torch import Tensor

from densenet_fast.backends.layout import as_output, empty_image, to_image, to_matrix
from densenet_fast.ops import stock
from densenet_fast.ops.single import Input, fake_gradients, fake_statistics, register_autograd
from densenet_fast.ops.stage import Stage, StageGradients, without_autocast

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("densenet_fast::bn_relu_conv1x1", mutates_args=())
@without_autocast
def bn_relu_conv1x1(x: Tensor, tensors: list[Tensor], eps: float, pool: bool, group: str | None) -> Outputs:
    """From x [N, C, *spatial] and one packed stage: out [N, C', *spatial'], mean [C], var [C], count [].

    ``mean`` and ``var`` are the batch's (zeros if the stage is frozen), ``count`` the number of rows they are over.
    With ``pool``, the spatial sizes are halved, rounding down. ``group`` names the process group whose batches are
    normalised together, None for this process's alone.
    """
    given = Input(x, tensors, eps)
    weight, bias = given.convolution()
    own, grid = given.statistics(group), given.grid
    affine = given.affine(own)
    if pool:
        out = given.backend.bn_relu_pool_conv1x1(given.matrix, affine, weight, bias, grid, None)
        grid = (grid[0], *(size // 2 for size in grid[1:]))
    else:
        out = given.matrix.new_empty(given.matrix.shape[0], weight.shape[0])
        given.backend.bn_relu_conv1x1(given.matrix, affine, weight, bias, out, None)
    return as_output(to_image(out, grid)), own.mean, own.var, given.count(group)


@bn_relu_conv1x1.register_fake
def _(x: Tensor, tensors: list[Tensor], eps: float, pool: bool, group: str | None) -> Outputs:
    spatial = [size // 2 for size in x.shape[2:]] if pool else x.shape[2:]
    return empty_image(x, (x.shape[0], *spatial), tensors[4].shape[0]), *fake_statistics(x)


@torch.library.custom_op("densenet_fast::bn_relu_conv1x1_backward", mutates_args=())
@without_autocast
def bn_relu_conv1x1_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    tensors: list[Tensor],
    eps: float,
    pool: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of the packed tensors, empty where ``needs`` (x's, then one per tensor) says so."""
    given = Input(x, tensors, eps)
    gradients = StageGradients(given.stage, needs[1:])
    grad_out = to_matrix(grad)
    weight, _ = given.convolution()
    own = given.saved(mean, var)
    affine = given.affine(own)
    need_d = needs[0] or gradients.needs_norm
    if pool:
        grad_x, grad_weight, sums = given.backend.bn_relu_pool_conv1x1_backward(
            grad_out, given.matrix, affine, weight, given.grid, need_d, gradients.needs_conv_weight
        )
    else:
        grad_x = torch.zeros_like(given.matrix) if needs[0] else None
        grad_weight, sums = given.backend.bn_relu_conv1x1_backward(
            grad_out, given.matrix, affine, weight, grad_x, gradients.needs_conv_weight, need_d
        )
    gradients.convolution(grad_weight, grad_out)
    return given.gradients(grad_x if needs[0] else None, sums, gradients, own, count, group)


@bn_relu_conv1x1_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    tensors: list[Tensor],
    eps: float,
    pool: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    return fake_gradients(x, tensors, needs)


def _stock(x: Tensor, stage: Stage, pool: bool) -> Tensor:
    return stock.bn_relu_conv_pool(x, stage) if pool else stock.bn_relu_conv(x, stage)


register_autograd(bn_relu_conv1x1, bn_relu_conv1x1_backward, _stock)
