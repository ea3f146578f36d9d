"""densenet_fast::bn_relu_conv1x1 and, with ``pool``, the transition: batch normalisation, ReLU, for the transition a
2x2 mean, and a 1x1 convolution in one op that saves its input alone.

    out = relu(bn(x)) @ W^T   or   mean2x2(relu(bn(x))) @ W^T
    D = (grad @ W  or its unpooling) * (bn(x) > 0);  dW = grad^T @ relu(bn(x))  or its pooled form
    P = -s * sum D;  Q = -s * r^2 * sum D * (x - mu) / 2
    dx = s * D + (P + 2 * Q * (x - mu)) / M                                    (1), (2)
"""

import torch
from torch import Tensor

from densenet_fast.backends.layout import as_output, empty_image, to_image, to_matrix
from densenet_fast.ops import stock
from densenet_fast.ops.op import Parts, define
from densenet_fast.ops.single import (
    Input,
    fake_gradients,
    fake_statistics,
    statistics_of_output,
    with_autograd,
)
from densenet_fast.ops.stage import Stage, StageGradients

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@define("bn_relu_conv1x1")
def _forward(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    tensors: list[Tensor],
    eps: list[float],
    pool: bool,
    describe: bool,
    group: str | None,
) -> Outputs:
    """From x [N, C, *spatial] and one stage: out [N, C', *spatial'], mean [C], var [C], count [], and with ``describe``
    the mean and variance [C'] of out, else empty.

    ``mean`` and ``var`` are the batch's (zeros if the stage is frozen), the given ones if they are known, and ``count``
    the number of rows they are over, empty without a group. With ``pool``, the spatial sizes are halved, rounding
    down. ``group`` names the process group whose batches are normalised together, None for this process's alone.
    """
    given = Input(x, tensors, eps, mean, var, group)
    grid = given.grid
    made, out_mean, out_var = statistics_of_output(x, given.weight.shape[0], describe)
    unit = (given.affine, given.weight, given.bias)
    if pool:
        out = given.backend.bn_relu_pool_conv1x1(given.matrix, *unit, grid, made)
        grid = (grid[0], *(size // 2 for size in grid[1:]))
    else:
        out = given.matrix.new_empty(given.matrix.shape[0], given.weight.shape[0])
        given.backend.bn_relu_conv1x1(given.matrix, *unit, out, made)
    return as_output(to_image(out, grid)), *given.own[:2], given.count(), out_mean, out_var


@_forward.custom_op.register_fake
def _(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    tensors: list[Tensor],
    eps: list[float],
    pool: bool,
    describe: bool,
    group: str | None,
) -> Outputs:
    spatial = [size // 2 for size in x.shape[2:]] if pool else x.shape[2:]
    out = empty_image(x, (x.shape[0], *spatial), tensors[4].shape[0])
    return out, *fake_statistics(x, group), *statistics_of_output(x, out.shape[1], describe)[1:]


@define("bn_relu_conv1x1_backward")
def _backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    tensors: list[Tensor],
    eps: list[float],
    pool: bool,
    describe: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of the stage's tensors, empty where ``needs`` (x's, the statistics', then one per tensor)
    says so, and, if needed, those of mean and var, which x's then leaves out."""
    given = Input(x, tensors, eps, mean, var, group, again=True)
    gradients = StageGradients(given.stage, needs[2:])
    grad_out, need_weight, like = to_matrix(grad), gradients.needs_conv_weight, given.stage.conv_weight
    need_d = needs[0] or needs[1] or gradients.needs_norm
    reader = given.reader(gradients, needs)
    unit = (given.matrix, given.affine, given.weight)
    if pool:
        grad_x, grad_weight, _ = given.backend.bn_relu_pool_conv1x1_backward(
            grad_out, *unit, given.grid, need_input=need_d, need_weight=need_weight, reader=reader, like=like
        )
    else:
        grad_x = torch.zeros_like(given.matrix) if needs[0] else None
        grad_weight, _ = given.backend.bn_relu_conv1x1_backward(
            grad_out, *unit, grad_x, need_weight=need_weight, need_sums=need_d, reader=reader, like=like
        )
    gradients.convolution(grad_weight, grad_out)
    return given.gradients(grad_x, gradients, count, needs)


@_backward.custom_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    tensors: list[Tensor],
    eps: list[float],
    pool: bool,
    describe: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    return fake_gradients(x, mean, tensors, needs)


def _stock(x: Tensor, mean: Tensor | None, var: Tensor | None, stage: Stage, pool: bool, describe: bool) -> Tensor:
    convolve = stock.bn_relu_conv_pool if pool else stock.bn_relu_conv
    return convolve(x, stage, mean, var)


bn_relu_conv1x1 = with_autograd(_forward, _backward, _stock, slice(1, 4))
parts = Parts(_forward, _backward, _stock)
