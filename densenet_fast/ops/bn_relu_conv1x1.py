"""densenet_fast::bn_relu_conv1x1 and densenet_fast::bn_relu_pool_conv1x1 (the transition): batch normalisation, ReLU,
for the transition a 2x2 mean, and a 1x1 convolution in one op that saves its input alone.

    out = relu(bn(x)) @ W^T   or   mean2x2(relu(bn(x))) @ W^T
    D = (grad @ W  or its unpooling) * (bn(x) > 0);  dW = grad^T @ relu(bn(x))  or its pooled form
    P = -s * sum D;  Q = -s * r^2 * sum D * (x - mu) / 2
    dx = s * D + (P + 2 * Q * (x - mu)) / M                                    (1), (2)
"""

from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.affine import ThroughStatistics, accumulation_dtype
from densenet_fast.backends.layout import as_output, empty_image, to_image, to_matrix
from densenet_fast.ops import stock
from densenet_fast.ops.batching import register_vmap
from densenet_fast.ops.stage import (
    StageGradients,
    global_count,
    global_statistics,
    global_sum,
    statistics_gradient,
    unpack,
    without_autocast,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("densenet_fast::bn_relu_conv1x1", mutates_args=())
@without_autocast
def bn_relu_conv1x1(x: Tensor, tensors: list[Tensor], eps: float, pool: bool, group: str | None) -> Outputs:
    """From x [N, C, *spatial] and one packed stage: out [N, C', *spatial'], mean [C], var [C], count [].

    ``mean`` and ``var`` are the batch's (zeros if the stage is frozen), ``count`` the number of rows they are over.
    With ``pool``, the spatial sizes are halved, rounding down. ``group`` names the process group whose batches are
    normalised together, None for this process's alone.
    """
    (stage,) = unpack(tensors, [eps])
    backend = select(x.device, x.dtype)
    matrix, grid = to_matrix(x), (x.shape[0], *x.shape[2:])
    weight, bias = stage.convolution(x.dtype)
    weight = weight.flatten(1)
    mean, var = matrix.new_zeros(2, x.shape[1], dtype=accumulation_dtype(x.dtype)).unbind()
    count = global_count(matrix.shape[0], x, group)
    if not stage.frozen:
        mean, var = global_statistics(backend.channel_statistics(matrix), matrix.shape[0], group)
    affine, _ = stage.fold(mean, var)
    if pool:
        out = backend.bn_relu_pool_conv1x1(matrix, affine, weight, bias, grid)
        grid = (grid[0], *(size // 2 for size in grid[1:]))
    else:
        out = matrix.new_empty(matrix.shape[0], weight.shape[0])
        backend.bn_relu_conv1x1(matrix, affine, weight, bias, out, statistics=False)
    return as_output(to_image(out, grid)), mean.clone(), var.clone(), count


@bn_relu_conv1x1.register_fake
def _(x: Tensor, tensors: list[Tensor], eps: float, pool: bool, group: str | None) -> Outputs:
    spatial = [size // 2 for size in x.shape[2:]] if pool else x.shape[2:]
    vector = x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))
    out = empty_image(x, (x.shape[0], *spatial), tensors[4].shape[0])
    return out, vector, torch.empty_like(vector), x.new_empty((), dtype=torch.float64)


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
    (stage,) = unpack(tensors, [eps])
    backend = select(x.device, x.dtype)
    gradients = StageGradients(stage, needs[1:])
    matrix, grid, grad_out = to_matrix(x), (x.shape[0], *x.shape[2:]), to_matrix(grad)
    weight, _ = stage.convolution(x.dtype)
    weight = weight.flatten(1)
    affine, r = stage.fold(mean, var)
    need_d = needs[0] or gradients.needs_norm
    if pool:
        grad_x, grad_weight, sums = backend.bn_relu_pool_conv1x1_backward(
            grad_out, matrix, affine, weight, grid, need_d, gradients.needs_conv_weight
        )
    else:
        grad_x = torch.zeros_like(matrix) if needs[0] else None
        grad_weight, sums = backend.bn_relu_conv1x1_backward(
            grad_out, matrix, affine, weight, grad_x, gradients.needs_conv_weight, need_d
        )
    gradients.convolution(grad_weight, grad_out)
    if need_d:
        gradients.norm(sums, r)
    if not needs[0]:
        return x.new_empty(0), gradients.tensors(x)
    if not stage.frozen:
        p, q = global_sum(*statistics_gradient(sums, affine.scale, r), group)
        backend.finalise_gradient(grad_x, ThroughStatistics(matrix, mean, p, q, count), grad_x)
    return to_image(grad_x, grid), gradients.tensors(x)


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
    grad_x = empty_image(x, (x.shape[0], *x.shape[2:]), x.shape[1]) if needs[0] else x.new_empty(0)
    return grad_x, [torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(tensors, needs[1:])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    x, tensors, ctx.eps, ctx.pool, ctx.group = inputs
    _, mean, var, count = output
    ctx.mark_non_differentiable(mean, var, count)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, mean, var, count, *tensors)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
    x, mean, var, count, *tensors = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    if grad is None:
        return None, [None] * len(tensors), None, None, None
    if stock.needed_in_backward(grad):
        run = stock.bn_relu_conv_pool if ctx.pool else stock.bn_relu_conv
        grad_x, *grads = stock.differentiable_gradients(
            lambda x, tensors: run(x, *unpack(tensors, [ctx.eps])), x, tensors, grad, ctx.group
        )
    else:
        grad_x, grads = bn_relu_conv1x1_backward(
            grad, x, mean, var, count, tensors, ctx.eps, ctx.pool, ctx.group, needs
        )
    gradients = [g if need else None for g, need in zip([grad_x, *grads], needs)]
    return gradients[0], gradients[1:], None, None, None


register_vmap(bn_relu_conv1x1_backward)
bn_relu_conv1x1.register_autograd(_backward, setup_context=_setup_context)
