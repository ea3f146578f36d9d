"""densenet_fast::bn_relu_maxpool (the stem): batch normalisation, ReLU and the maximum over windows of 3 at distance 2,
padded by 1, in one op that saves its input and, in a byte each, where the maxima were.

    out = maxpool(relu(bn(x)))
    D = (the gradients of the outputs whose maximum it is) * (bn(x) > 0)
    P = -s * sum D;  Q = -s * r^2 * sum D * (x - mu) / 2
    dx = s * D + (P + 2 * Q * (x - mu)) / M                                    (1), (2)
"""

import math

import torch
from torch import Tensor

from densenet_fast.backends.layout import as_output, empty_image, to_image, to_matrix
from densenet_fast.backends.spatial import pooled_sizes
from densenet_fast.ops import stock
from densenet_fast.ops.op import define
from densenet_fast.ops.single import Input, fake_gradients, fake_statistics, statistics_of_output, with_autograd
from densenet_fast.ops.stage import Stage, StageGradients

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@define("bn_relu_maxpool")
def _forward(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    tensors: list[Tensor],
    eps: list[float],
    describe: bool,
    group: str | None,
) -> Outputs:
    """From x [N, C, *spatial] and one stage without convolution: out [N, C, *spatial'], mean [C], var [C], count [],
    argmax [M', C], and with ``describe`` the mean and variance [C] of out, else empty.

    ``argmax`` holds the maxima's positions in their windows, ``mean`` and ``var`` are the batch's (zeros if the stage
    is frozen), the given ones if they are known, ``count`` the number of rows they are over, empty without a group.
    ``group`` names the process group whose batches are normalised together, None for this process's alone.
    """
    given = Input(x, tensors, eps, mean, var, group)
    made, out_mean, out_var = statistics_of_output(x, x.shape[1], describe)
    out, argmax = given.backend.bn_relu_maxpool(given.matrix, given.affine, given.grid, made)
    image = as_output(to_image(out, (x.shape[0], *pooled_sizes(x.shape[2:]))))
    return image, *given.own[:2], given.count(), argmax, out_mean, out_var


@_forward.custom_op.register_fake
def _(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    tensors: list[Tensor],
    eps: list[float],
    describe: bool,
    group: str | None,
) -> Outputs:
    grid = (x.shape[0], *pooled_sizes(x.shape[2:]))
    argmax = x.new_empty((math.prod(grid), x.shape[1]), dtype=torch.uint8)
    out = empty_image(x, grid, x.shape[1])
    return out, *fake_statistics(x, group), argmax, *statistics_of_output(x, x.shape[1], describe)[1:]


@define("bn_relu_maxpool_backward")
def _backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    argmax: Tensor,
    tensors: list[Tensor],
    eps: list[float],
    describe: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of the stage's tensors, empty where ``needs`` (x's, the statistics', then one per tensor)
    says so, and, if needed, those of mean and var, which x's then leaves out."""
    given = Input(x, tensors, eps, mean, var, group, again=True)
    gradients = StageGradients(given.stage, needs[2:])
    reader = given.reader(gradients, needs)
    scaled, _ = given.backend.bn_relu_maxpool_backward(
        to_matrix(grad), argmax, given.matrix, given.affine, given.grid, reader
    )
    return given.gradients(scaled, gradients, count, needs)


@_backward.custom_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    argmax: Tensor,
    tensors: list[Tensor],
    eps: list[float],
    describe: bool,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    return fake_gradients(x, mean, tensors, needs)


def _stock(x: Tensor, mean: Tensor | None, var: Tensor | None, stage: Stage, describe: bool) -> Tensor:
    return stock.bn_relu_maxpool(x, stage, mean, var)


bn_relu_maxpool = with_autograd(_forward, _backward, _stock, slice(1, 5))
