"""densenet_fast::bn_relu_maxpool, the stem: batch normalisation, ReLU and max pooling in one op.

The windows are 3 wide, 2 apart and padded by 1. For the backward pass the op keeps its input and, in a byte each, the
positions of the maxima.

    out = maxpool(relu(bn(x)))
    D = (the gradients of the outputs whose maximum it is) * (bn(x) > 0)
    P = -s * sum D;  Q = -s * r^2 * sum D * (x - mu) / 2
    dx = s * D + (P + 2 * Q * (x - mu)) / M                                    (1), (2)
"""

import math
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.layout import as_output, empty_image, to_image, to_matrix
from densenet_fast.backends.optional import OneStage
from densenet_fast.backends.spatial import pooled_sizes
from densenet_fast.ops import stock
from densenet_fast.ops.block_plan import BlockTensors
from densenet_fast.ops.op import define
from densenet_fast.ops.single import Input, fake_gradients, fake_statistics, statistics_of_output, with_autograd
from densenet_fast.ops.stage import Stage, StageGradients, global_count

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Inputs(NamedTuple):
    """The arguments of the op.

    Args:
        x: [N, C, *spatial].
        mean, var: the batch statistics [C] of x, or None to compute them.
        tensors, eps: one stage without convolution, flattened.
        return_statistics: whether to return the mean and variance of out.
        group: name of the process group whose batches are normalised together, None for this process's alone.
    """

    x: Tensor
    mean: Tensor | None
    var: Tensor | None
    tensors: list[Tensor]
    eps: list[float]
    return_statistics: bool
    group: str | None


def _run_whole(given: Any) -> BlockTensors | None:
    """The stage's tensors, if the backend runs the whole op on them in one call."""
    x = given.x
    if given.group is not None or not select(x.device, x.dtype).RUNS_STAGES:
        return None
    tensors = BlockTensors.of(given.tensors, given.eps)
    return tensors if tensors.fits(x.dtype) else None


def _stage(given: Any, tensors: BlockTensors) -> OneStage:
    return OneStage(tensors.tensors, *given.eps, (given.x.shape[0], *given.x.shape[2:]))


@define("bn_relu_maxpool", Inputs)
def _forward(given: Inputs) -> Outputs:
    """Returns out [N, C, *spatial'], mean [C], var [C], count [], argmax [M', C], and the mean and variance of out [C].

    ``mean`` and ``var`` are those that were given, else the batch's; zeros if the stage is frozen. ``count`` is the
    number of rows they are computed over, and empty without a group. ``argmax`` holds the position of each maximum in
    its window. Without ``return_statistics`` the mean and variance of out are empty.
    """
    tensors = _run_whole(given)
    if tensors is not None:
        x, known = given.x, (given.mean, given.var)
        image, argmax, mean, var, *own = select(x.device, x.dtype).bn_relu_maxpool_stage(
            to_matrix(x), *known, _stage(given, tensors), return_statistics=given.return_statistics
        )
        return image, mean, var, global_count(0, x, None), argmax, *own
    ready = Input(given)
    made, out_mean, out_var = statistics_of_output(given.x, given.x.shape[1], given.return_statistics)
    out, argmax = ready.backend.bn_relu_maxpool(ready.matrix, ready.affine, ready.grid, made)
    image = as_output(to_image(out, (given.x.shape[0], *pooled_sizes(given.x.shape[2:]))))
    return image, *ready.own[:2], ready.count(), argmax, out_mean, out_var


@_forward.fake
def _(given: Inputs) -> Outputs:
    x = given.x
    grid = (x.shape[0], *pooled_sizes(x.shape[2:]))
    argmax = x.new_empty((math.prod(grid), x.shape[1]), dtype=torch.uint8)
    out = empty_image(x, grid, x.shape[1])
    return out, *fake_statistics(given), argmax, *statistics_of_output(x, x.shape[1], given.return_statistics)[1:]


class BackwardInputs(NamedTuple):
    """The arguments of the backward op: the gradient of out, the forward op's arguments and results, and ``needs``.

    ``needs`` says whether a gradient is needed: of x, of its statistics, and then of each tensor of the stage.
    """

    grad: Tensor
    x: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor
    argmax: Tensor
    tensors: list[Tensor]
    eps: list[float]
    return_statistics: bool
    group: str | None
    needs: list[bool]


@define("bn_relu_maxpool_backward", BackwardInputs)
def _backward(given: BackwardInputs) -> tuple[Tensor, list[Tensor]]:
    """Returns the gradient of x and those of the stage's tensors, empty where they are not needed.

    If the gradients of mean and var are needed, they follow those of the tensors, and the gradient of x leaves them
    out.
    """
    tensors, needs = _run_whole(given), given.needs
    if tensors is not None and needs[0] and not needs[1] and all(compress(needs[2:], tensors.is_trained)):
        x, known = given.x, (given.mean, given.var)
        grad_x, made = select(x.device, x.dtype).bn_relu_maxpool_stage_backward(
            to_matrix(given.grad), given.argmax, to_matrix(x), *known, _stage(given, tensors)
        )
        return grad_x, tensors.gradients(made)
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


def _stock(x: Tensor, mean: Tensor | None, var: Tensor | None, stage: Stage, return_statistics: bool) -> Tensor:
    return stock.bn_relu_maxpool(x, stage, mean, var)


bn_relu_maxpool = with_autograd(_forward, _backward, _stock, slice(1, 5))
