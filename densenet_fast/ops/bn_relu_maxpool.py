"""densenet_fast::bn_relu_maxpool (the stem): batch normalisation, ReLU and the maximum over windows of 3 at distance 2,
padded by 1, in one op that saves its input and, in a byte each, where the maxima were.

    out = maxpool(relu(bn(x)))
    D = (the gradients of the outputs whose maximum it is) * (bn(x) > 0)
    P = -s * sum D;  Q = -s * r^2 * sum D * (x - mu) / 2
    dx = s * D + (P + 2 * Q * (x - mu)) / M                                    (1), (2)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends.layout import as_output, empty_image, to_image, to_matrix
from densenet_fast.backends.spatial import pooled_sizes
from densenet_fast.ops import stock
from densenet_fast.ops.op import define
from densenet_fast.ops.single import Input, fake_gradients, fake_statistics, statistics_of_output, with_autograd
from densenet_fast.ops.stage import Stage, StageGradients

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Inputs(NamedTuple):
    """The arguments of the op.

    Args:
        x: [N, C, *spatial].
        mean, var: the batch statistics [C] of x if they are known, else None.
        tensors, eps: one stage without convolution, flattened.
        describe: whether the mean and variance of out are wanted.
        group: name of the process group whose batches are normalised together, None for this process's alone.
    """

    x: Tensor
    mean: Tensor | None
    var: Tensor | None
    tensors: list[Tensor]
    eps: list[float]
    describe: bool
    group: str | None


@define("bn_relu_maxpool", Inputs)
def _forward(given: Inputs) -> Outputs:
    """From x [N, C, *spatial] and one stage without convolution: out [N, C, *spatial'], mean [C], var [C], count [],
    argmax [M', C], and with ``describe`` the mean and variance [C] of out, else empty.

    ``mean`` and ``var`` are the batch's (zeros if the stage is frozen), the given ones if they are known; ``count`` is
    the number of rows they are over, empty without a group.
    ``argmax`` holds the positions of the maxima in their windows.
    """
    ready = Input(given)
    made, out_mean, out_var = statistics_of_output(given.x, given.x.shape[1], given.describe)
    out, argmax = ready.backend.bn_relu_maxpool(ready.matrix, ready.affine, ready.grid, made)
    image = as_output(to_image(out, (given.x.shape[0], *pooled_sizes(given.x.shape[2:]))))
    return image, *ready.own[:2], ready.count(), argmax, out_mean, out_var


@_forward.fake
def _(given: Inputs) -> Outputs:
    x = given.x
    grid = (x.shape[0], *pooled_sizes(x.shape[2:]))
    argmax = x.new_empty((math.prod(grid), x.shape[1]), dtype=torch.uint8)
    out = empty_image(x, grid, x.shape[1])
    return out, *fake_statistics(given), argmax, *statistics_of_output(x, x.shape[1], given.describe)[1:]


class BackwardInputs(NamedTuple):
    """The arguments of the op of the backward pass: the gradient of out, what the forward op took and returned, and
    of what a gradient is needed."""

    grad: Tensor
    x: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor
    argmax: Tensor
    tensors: list[Tensor]
    eps: list[float]
    describe: bool
    group: str | None
    needs: list[bool]


@define("bn_relu_maxpool_backward", BackwardInputs)
def _backward(given: BackwardInputs) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of the stage's tensors, empty where ``needs`` (x's, the statistics', then one per tensor)
    says so, and, if needed, those of mean and var, which x's then leaves out."""
    ready = Input(given, again=True)
    gradients = StageGradients(ready.stage, given.needs[2:])
    reader = ready.reader(gradients, given.needs)
    scaled, _ = ready.backend.bn_relu_maxpool_backward(
        to_matrix(given.grad), given.argmax, ready.matrix, ready.affine, ready.grid, reader
    )
    return ready.gradients(scaled, gradients, given.count, given.needs)


@_backward.fake
def _(given: BackwardInputs) -> tuple[Tensor, list[Tensor]]:
    return fake_gradients(given)


def _stock(x: Tensor, mean: Tensor | None, var: Tensor | None, stage: Stage, describe: bool) -> Tensor:
    return stock.bn_relu_maxpool(x, stage, mean, var)


bn_relu_maxpool = with_autograd(_forward, _backward, _stock, slice(1, 5))
