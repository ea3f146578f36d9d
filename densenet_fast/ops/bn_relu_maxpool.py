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
from densenet_fast.ops.single import Input, fake_gradients, fake_statistics, register_autograd
from densenet_fast.ops.stage import StageGradients, without_autocast

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("densenet_fast::bn_relu_maxpool", mutates_args=())
@without_autocast
def bn_relu_maxpool(x: Tensor, tensors: list[Tensor], eps: float, group: str | None) -> Outputs:
    """From x [N, C, *spatial] and one packed stage without convolution: out [N, C, *spatial'], argmax [M', C],
    mean [C], var [C], count [].

    ``argmax`` holds the maxima's positions in their windows, ``mean`` and ``var`` are the batch's (zeros if the stage
    is frozen), ``count`` the number of rows they are over. ``group`` names the process group whose batches are
    normalised together, None for this process's alone.
    """
    given = Input(x, tensors, eps)
    own = given.statistics(group)
    out, argmax = given.backend.bn_relu_maxpool(given.matrix, given.affine(own), given.grid, None)
    return (
        as_output(to_image(out, (x.shape[0], *pooled_sizes(x.shape[2:])))),
        argmax,
        own.mean,
        own.var,
        given.count(group),
    )


@bn_relu_maxpool.register_fake
def _(x: Tensor, tensors: list[Tensor], eps: float, group: str | None) -> Outputs:
    grid = (x.shape[0], *pooled_sizes(x.shape[2:]))
    argmax = x.new_empty((math.prod(grid), x.shape[1]), dtype=torch.uint8)
    return empty_image(x, grid, x.shape[1]), argmax, *fake_statistics(x)


@torch.library.custom_op("densenet_fast::bn_relu_maxpool_backward", mutates_args=())
@without_autocast
def bn_relu_maxpool_backward(
    grad: Tensor,
    x: Tensor,
    argmax: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    tensors: list[Tensor],
    eps: float,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of the packed tensors, empty where ``needs`` (x's, then one per tensor) says so."""
    given = Input(x, tensors, eps)
    own = given.saved(mean, var)
    affine = given.affine(own)
    scaled, sums = given.backend.bn_relu_maxpool_backward(to_matrix(grad), argmax, given.matrix, affine, given.grid)
    gradients = StageGradients(given.stage, needs[1:])
    return given.gradients(scaled if needs[0] else None, sums, gradients, own, count, group)


@bn_relu_maxpool_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    argmax: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    tensors: list[Tensor],
    eps: float,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    return fake_gradients(x, tensors, needs)


register_autograd(bn_relu_maxpool, bn_relu_maxpool_backward, stock.bn_relu_maxpool)
