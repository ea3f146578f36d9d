"""densenet_fast::bn_relu_conv1x1: batch normalisation, ReLU and a 1x1 convolution in one op.

With ``pool`` it is the transition, which takes 2x2 means before it convolves. The op keeps its input alone for the
backward pass.

    out = relu(bn(x)) @ W^T   or   mean2x2(relu(bn(x))) @ W^T
    D = (grad @ W  or its unpooling) * (bn(x) > 0);  dW = grad^T @ relu(bn(x))  or its pooled form
    P = -s * sum D;  Q = -s * r^2 * sum D * (x - mu) / 2
    dx = s * D + (P + 2 * Q * (x - mu)) / M                                    (1), (2)
"""

from typing import NamedTuple

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


class Inputs(NamedTuple):
    """The arguments of the op.

    Args:
        x: [N, C, *spatial].
        mean, var: the batch statistics [C] of x, or None to compute them.
        tensors, eps: one stage, flattened.
        pool: whether to halve the spatial sizes, rounding down.
        return_statistics: whether to return the mean and variance of out.
        group: name of the process group whose batches are normalised together, None for this process's alone.
    """

    x: Tensor
    mean: Tensor | None
    var: Tensor | None
    tensors: list[Tensor]
    eps: list[float]
    pool: bool
    return_statistics: bool
    group: str | None


@define("bn_relu_conv1x1", Inputs)
def _forward(given: Inputs) -> Outputs:
    """Returns out [N, C', *spatial'], mean [C], var [C], count [], and the mean and variance of out [C'].

    ``mean`` and ``var`` are those that were given, else the batch's; zeros if the stage is frozen. ``count`` is the
    number of rows they are computed over, and empty without a group. Without ``return_statistics`` the mean and
    variance of out are empty.
    """
    ready = Input(given)
    grid = ready.grid
    made, out_mean, out_var = statistics_of_output(given.x, ready.weight.shape[0], given.return_statistics)
    unit = (ready.affine, ready.weight, ready.bias)
    if given.pool:
        out = ready.backend.bn_relu_pool_conv1x1(ready.matrix, *unit, grid, made)
        grid = (grid[0], *(size // 2 for size in grid[1:]))
    else:
        out = ready.matrix.new_empty(ready.matrix.shape[0], ready.weight.shape[0])
        ready.backend.bn_relu_conv1x1(ready.matrix, *unit, out, made)
    return as_output(to_image(out, grid)), *ready.own[:2], ready.count(), out_mean, out_var


@_forward.fake
def _(given: Inputs) -> Outputs:
    x = given.x
    spatial = [size // 2 for size in x.shape[2:]] if given.pool else x.shape[2:]
    out = empty_image(x, (x.shape[0], *spatial), given.tensors[4].shape[0])
    return out, *fake_statistics(given), *statistics_of_output(x, out.shape[1], given.return_statistics)[1:]


class BackwardInputs(NamedTuple):
    """The arguments of the backward op: the gradient of out, the forward op's arguments and results, and ``needs``.

    ``needs`` says whether a gradient is needed: of x, of its statistics, and then of each tensor of the stage.
    """

    grad: Tensor
    x: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor
    tensors: list[Tensor]
    eps: list[float]
    pool: bool
    return_statistics: bool
    group: str | None
    needs: list[bool]


@define("bn_relu_conv1x1_backward", BackwardInputs)
def _backward(given: BackwardInputs) -> tuple[Tensor, list[Tensor]]:
    """Returns the gradient of x and those of the stage's tensors, empty where they are not needed.

    If the gradients of mean and var are needed, they follow those of the tensors, and the gradient of x leaves them
    out.
    """
    ready = Input(given, again=True)
    gradients = StageGradients(ready.stage, given.needs[2:])
    grad_out, need_weight, like = to_matrix(given.grad), gradients.needs_conv_weight, ready.stage.conv_weight
    need_d = given.needs[0] or given.needs[1] or gradients.needs_norm
    reader = ready.reader(gradients, given.needs)
    unit = (ready.matrix, ready.affine, ready.weight)
    if given.pool:
        grad_x, grad_weight, _ = ready.backend.bn_relu_pool_conv1x1_backward(
            grad_out, *unit, ready.grid, need_input=need_d, need_weight=need_weight, reader=reader, like=like
        )
    else:
        grad_x = zeros = None
        if given.needs[0]:
            rows, columns = ready.matrix.shape
            grad_x = ready.backend.empty(ready.matrix, (rows, columns), (columns, 1))
            zeros = ready.matrix.new_zeros(columns).expand(rows, columns)
        grad_weight, _ = ready.backend.bn_relu_conv1x1_backward(
            grad_out,
            *unit,
            grad_x,
            need_weight=need_weight,
            need_sums=need_d,
            source=zeros,
            reader=reader,
            like=like,
        )
    gradients.convolution(grad_weight, grad_out)
    return ready.gradients(grad_x, gradients, given.count, given.needs)


@_backward.fake
def _(given: BackwardInputs) -> tuple[Tensor, list[Tensor]]:
    return fake_gradients(given)


def _stock(
    x: Tensor, mean: Tensor | None, var: Tensor | None, stage: Stage, pool: bool, return_statistics: bool
) -> Tensor:
    convolve = stock.bn_relu_conv_pool if pool else stock.bn_relu_conv
    return convolve(x, stage, mean, var)


bn_relu_conv1x1 = with_autograd(_forward, _backward, _stock, slice(1, 4))
parts = Parts(_forward, _backward, _stock)
