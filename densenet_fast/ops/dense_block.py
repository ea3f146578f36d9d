"""densenet_fast::dense_block: a whole dense block as one op that never concatenates.

The block owns one matrix F [M, C_total]. Layer l reads its first C columns and writes k new columns behind them. The
statistics of a column are computed once, when the column is written. To prepend new features, F is filled from its end:
layer l reads the last C columns and writes its new columns before them.

    Z = relu(bn1(F[:, :C])) @ W1^T;  Y = conv3x3(relu(bn2(Z)), W2) -> F[:, C:C+k]

The backward pass goes through the layers in reverse. G starts as the incoming gradient, P and Q as zero:

    dY = finalise(columns C..C+k)                                              G + (P + 2Q(F - mu)) / M      (1)
    D' = conv3x3_input_grad(dY, W2) * (bn2(Z) > 0);   dZ = finalise(s' * D')
    D  = (dZ @ W1) * (bn1(F) > 0)
    G[:, :C] += s * D;   P[:C] -= s * sum D;   Q[:C] -= s * r^2 * sum D * (F - mu) / 2                       (2)
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.affine import (
    Affine,
    accumulation_dtype,
    empty_statistics,
)
from densenet_fast.backends.layout import empty_image, to_image, to_matrix
from densenet_fast.backends.optional import Block
from densenet_fast.ops import stock
from densenet_fast.ops.block_plan import Plan, for_each_layer, own_features, plan_of
from densenet_fast.ops.dense_block_backward import backward
from densenet_fast.ops.op import Gradients, Parts, define, with_autograd
from densenet_fast.ops.single import fake_count
from densenet_fast.ops.stage import (
    Prepared,
    global_count,
    save_stages,
    saved_stages,
    synchronise,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]


class Inputs(NamedTuple):
    """The arguments of the op.

    Args:
        x: the block's input [N, C0, *spatial], in any memory format.
        x_mean, x_var: its batch statistics [C0], or None to compute them. The gradient of x is complete in either case.
        tensors, eps: the flattened stages. A layer with a bottleneck has two (1x1, 3x3), one without has one (3x3).
        masks: one [N, channels, *spatial] bool per drop rate, empty where the rate is 0. The list is empty if all are
            0.
        drop_rates: one per layer, for its new features, or one per stage, for what its convolution makes.
        bottleneck: whether the layers have a bottleneck.
        saved: for each layer, whether to return its Z [M, B] for the backward pass, which otherwise recomputes it.
        return_statistics: whether to return the statistics of all features, not only of those that a layer normalises.
        group: name of the process group whose batches are normalised together, None for this process's alone.
        x_stand_in: a tensor with the shape and the gradient of x, but without its memory. Second derivatives reach x
            through it.
        prepend: whether new features come before those that a layer reads, instead of behind them.
    """

    x: Tensor
    x_mean: Tensor | None
    x_var: Tensor | None
    tensors: list[Tensor]
    eps: list[float]
    masks: list[Tensor]
    drop_rates: list[float]
    bottleneck: bool
    saved: list[bool]
    return_statistics: bool
    group: str | None
    x_stand_in: Tensor | None
    prepend: bool = False


@define("dense_block", Inputs)
def _forward(given: Inputs) -> Outputs:
    """Returns features [N, C_total, *spatial], mean, var, count and the saved bottlenecks.

    ``mean`` and ``var`` hold the batch statistics as :class:`Plan` packs them, and zeros where none are computed. The
    statistics of the features are differentiable. ``count`` is the number of rows they are computed over, and empty
    without a group.
    """
    x, saved, group = given.x, given.saved, given.group
    plan = plan_of(
        x, given.tensors, given.eps, given.bottleneck, given.drop_rates, given.return_statistics, given.prepend
    )
    backend = select(x.device, x.dtype)
    image = empty_image(x, plan.grid, plan.columns, functools.partial(backend.empty, kept=True))
    features = to_matrix(image)
    rows = features.shape[0]
    if plan.runs_whole_on(backend, x.dtype, group):
        bottlenecks = [plan.bottleneck_in(backend, i, features) for i in range(len(plan.layers)) if saved[i]]
        mean, var = (features.new_zeros(plan.packed, dtype=torch.float32) for _ in range(2))
        kept = for_each_layer(bottlenecks, saved, features)
        block = Block(features, plan.block_tensors.tensors, given.eps, plan.grid, kept, mean, var, given.prepend)
        own = {"x": to_matrix(x), "x_mean": given.x_mean, "x_var": given.x_var}
        backend.dense_block(block, plan.widths[0], return_statistics=given.return_statistics, **own)
        return image, mean, var, global_count(rows, x, group), bottlenecks
    packed = empty_statistics(features, plan.packed, plan.eps)
    prepared = Prepared(plan.stages, backend, x)
    for columns in plan.without_statistics():
        prepared.zero(packed.mean[columns]), prepared.zero(packed.var[columns])
    own = packed.of(plan.read(0)) if plan.normalised_by_batch(0) else None
    if own is not None and given.x_mean is not None:
        prepared.copy(own.mean, given.x_mean), prepared.copy(own.var, given.x_var)
        prepared.rstd(own.rstd, given.x_var, plan.eps)
        own = None
    prepared.done()
    backend.append_features(x, features[:, plan.read(0)], own)
    synchronise(own, rows, group)
    bottlenecks = []

    def affine(j: int) -> Affine:
        return prepared.affine(j, packed.of(plan.ranges[j]))

    shared = None if all(saved) else plan.bottleneck_buffer(features, backend)
    masks = plan.masks(given.masks)
    for i, layer in enumerate(plan.layers):
        j, inputs = i * len(layer), features[:, plan.read(i)]
        normalise: Affine | None = affine(j)
        if given.bottleneck:
            (weight, bias), mask, keep_scale = prepared.weights[j], masks[j], plan.keep_scales[j]
            j += 1
            z = plan.bottleneck_in(backend if saved[i] else shared, i, features)
            own = None if layer[1].frozen else packed.of(plan.bottlenecks[i])
            then = affine(j) if layer[1].frozen and not saved[i] and mask is None else None
            made = own if mask is None else None
            backend.bn_relu_conv1x1(inputs, normalise, weight.flatten(1), bias, z, made, then=then)
            if mask is not None:
                backend.append_features(to_image(z, plan.grid), z, own, mask, keep_scale)
            synchronise(own, rows, group)
            inputs, normalise = z, affine(j) if then is None else None
            if saved[i]:
                bottlenecks.append(z)
        weight, bias = prepared.weights[j]
        own = packed.of(plan.new(i)) if plan.normalised_by_batch(i + 1) else None
        out = features[:, plan.new(i)]
        mask, keep_scale = masks[j], plan.keep_scales[j]
        backend.bn_relu_conv3x3(
            inputs, normalise, weight, bias, plan.grid, out, mask=mask, keep_scale=keep_scale, statistics=own
        )
        synchronise(own, rows, group)
    return image, *packed[:2], global_count(rows, x, group), bottlenecks


@_forward.fake
def _(given: Inputs) -> Outputs:
    x = given.x
    plan = Plan(x, given.tensors, given.eps, given.bottleneck, given.drop_rates)
    image = empty_image(x, plan.grid, plan.columns)
    rows = x.numel() // x.shape[1]
    bottlenecks = [x.new_empty(rows, c.stop - c.start) for c, kept in zip(plan.bottlenecks, given.saved) if kept]
    mean = x.new_empty(plan.packed, dtype=accumulation_dtype(x.dtype))
    return image, mean, torch.empty_like(mean), fake_count(x, given.group), bottlenecks


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: Outputs) -> None:
    given = Inputs(*inputs)
    ctx.eps, ctx.drop_rates, ctx.bottleneck, ctx.saved = given.eps, given.drop_rates, given.bottleneck, given.saved
    ctx.group, ctx.prepend, ctx.in_channels = given.group, given.prepend, given.x.shape[1]
    *kept, count, bottlenecks = outputs
    ctx.mark_non_differentiable(count, *bottlenecks)
    ctx.set_materialize_grads(False)
    stages = save_stages(ctx, given.tensors)
    ctx.sizes = [len(stages), len(given.masks), len(bottlenecks)]
    ctx.save_for_backward(*kept, count, given.x_stand_in, *stages, *given.masks, *bottlenecks)


def _shown(outputs: Outputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    features, mean, var, count, _ = outputs
    columns = features.shape[1]
    return (features, mean[:columns], var[:columns]), (count, mean, var)


def _gradients(
    ctx: Any, needs: list[bool], grad: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, *_: Any
) -> Gradients:
    features, mean, var, count, x_stand_in, *rest = ctx.saved_tensors
    stages, masks, bottlenecks = (rest[sum(ctx.sizes[:i]) :][:n] for i, n in enumerate(ctx.sizes))
    tensors = saved_stages(ctx, stages)
    if grad is None and grad_mean is None and grad_var is None:
        return None, None, None, [None] * len(tensors)
    grads = (grad, grad_mean, grad_var)
    if any(g is not None and stock.needed_in_backward(g) for g in grads):
        grad_x, *gradients = _differentiable_gradients(ctx, grads, features, x_stand_in, tensors, masks)
    else:
        grad = torch.zeros_like(features) if grad is None else grad
        if grad_mean is not grad_var:  # one of them may be None
            grad_mean, grad_var = (torch.zeros_like(mean) if g is None else g for g in (grad_mean, grad_var))
        saved = (features, mean, var, count, bottlenecks, ctx.saved, tensors)
        options = (ctx.eps, masks, ctx.drop_rates, ctx.bottleneck, ctx.in_channels, ctx.group)
        options += ([needs[0], *needs[2:]], ctx.prepend)
        grad_x, gradients = backward(grad, grad_mean, grad_var, *saved, *options)
    return grad_x if needs[0] else None, None, None, gradients


def _differentiable_gradients(
    ctx: Any,
    grads: tuple[Tensor | None, ...],
    features: Tensor,
    x_stand_in: Tensor | None,
    tensors: list[Tensor | None],
    masks: list[Tensor],
) -> list[Tensor | None]:
    value = own_features(features.detach(), ctx.in_channels, ctx.prepend)

    def block(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x = value if x_stand_in is None else value + x
        plan = Plan(x, tensors, ctx.eps, ctx.bottleneck, ctx.drop_rates)
        made = stock.dense_block(x, plan.layers, masks, ctx.drop_rates, ctx.prepend)
        return made, *stock.batch_statistics(made)

    grads = (grads[0], *(None if g is None else g[: features.shape[1]] for g in grads[1:]))
    return stock.differentiable_gradients(
        block, [value if x_stand_in is None else x_stand_in, *tensors], grads, ctx.group
    )


parts = Parts(_forward, backward, stock.dense_block)
dense_block = with_autograd(_forward, _save, _gradients, _shown)
"""Returns (features, their mean and variance, count, mean, var). The last two are packed as in :class:`Plan`."""
