"""densenet_fast::bn_relu_global_avgpool (the head): batch normalisation, ReLU and the mean over all pixels of an image
in one op that saves its input alone.

    out = mean over pixels of relu(bn(x))
    D = grad / pixels * (bn(x) > 0)
    P = -s * sum D;  Q = -s * r^2 * sum D * (x - mu) / 2
    dx = s * D + (P + 2 * Q * (x - mu)) / M                                    (1), (2)
"""

import torch
from torch import Tensor

from densenet_fast.backends.layout import to_matrix
from densenet_fast.ops import stock
from densenet_fast.ops.single import Input, fake_gradients, fake_statistics, register_autograd
from densenet_fast.ops.stage import StageGradients, without_autocast

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("densenet_fast::bn_relu_global_avgpool", mutates_args=())
@without_autocast
def bn_relu_global_avgpool(x: Tensor, tensors: list[Tensor], eps: float, group: str | None) -> Outputs:
    """From x [N, C, *spatial] and one packed stage without convolution: out [N, C], mean [C], var [C], count [].

    ``mean`` and ``var`` are the batch's (zeros if the stage is frozen), ``count`` the number of rows they are over.
    ``group`` names the process group whose batches are normalised together, None for this process's alone.
    """
    given = Input(x, tensors, eps)
    own = given.statistics(group)
    out = given.backend.bn_relu_global_avgpool(given.matrix, given.affine(own), given.grid)
    return out, own.mean, own.var, given.count(group)


@bn_relu_global_avgpool.register_fake
def _(x: Tensor, tensors: list[Tensor], eps: float, group: str | None) -> Outputs:
    return x.new_empty(x.shape[:2]), *fake_statistics(x)


@torch.library.custom_op("densenet_fast::bn_relu_global_avgpool_backward", mutates_args=())
@without_autocast
def bn_relu_global_avgpool_backward(
    grad: Tensor,
    x: Tensor,
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
    scaled, sums = given.backend.bn_relu_global_avgpool_backward(to_matrix(grad), given.matrix, affine, given.grid)
    gradients = StageGradients(given.stage, needs[1:])
    return given.gradients(scaled if needs[0] else None, sums, gradients, own, count, group)


@bn_relu_global_avgpool_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    tensors: list[Tensor],
    eps: float,
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    return fake_gradients(x, tensors, needs)


register_autograd(bn_relu_global_avgpool, bn_relu_global_avgpool_backward, stock.bn_relu_global_avgpool)
