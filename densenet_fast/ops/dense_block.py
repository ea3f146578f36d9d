"""densenet_fast::dense_block: a whole dense block as one op that never concatenates.

The block owns one matrix F of M x C_total. Layer l reads its first C columns and writes its k new ones behind them; the
statistics of a column are computed once, when it is written. To prepend new features, F is filled from its end: layer l
reads the last C columns and writes its new ones before them.

    Z = relu(bn1(F[:, :C])) @ W1^T;  Y = conv3x3(relu(bn2(Z)), W2) -> F[:, C:C+k]

Backward, layers in reverse; G starts as the incoming gradient, P and Q at zero:

    dY = finalise(columns C..C+k)                                              G + (P + 2Q(F - mu)) / M      (1)
    D' = conv3x3_input_grad(dY, W2) * (bn2(Z) > 0);   dZ = finalise(s' * D')
    D  = (dZ @ W1) * (bn1(F) > 0)
    G[:, :C] += s * D;   P[:C] -= s * sum D;   Q[:C] -= s * r^2 * sum D * (F - mu) / 2                       (2)
"""

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.affine import (
    Affine,
    Completion,
    Statistics,
    ThroughStatistics,
    Unfinished,
    accumulation_dtype,
    empty_statistics,
)
from densenet_fast.backends.layout import empty_image, to_image, to_matrix
from densenet_fast.backends.optional import Block
from densenet_fast.ops import stock
from densenet_fast.ops.batching import register_vmap
from densenet_fast.ops.block_plan import Plan, own_features, plan_of
from densenet_fast.ops.op import Gradients, Parts, define, with_autograd
from densenet_fast.ops.single import fake_count
from densenet_fast.ops.stage import (
    STAGE_TENSORS,
    Pair,
    Prepared,
    StageGradients,
    global_count,
    global_sum,
    rows_of,
    save_stages,
    saved_stages,
    synchronise,
    without_autocast,
)

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]


@define("dense_block")
def _forward(
    x: Tensor,
    x_mean: Tensor | None,
    x_var: Tensor | None,
    tensors: list[Tensor],
    eps: list[float],
    masks: list[Tensor],
    drop_rates: list[float],
    bottleneck: bool,
    saved: list[bool],
    describe: bool,
    group: str | None,
    link: Tensor | None,
    prepend: bool = False,
) -> Outputs:
    """From x [N, C0, *spatial] to (features [N, C_total, *spatial], mean, var, count, bottlenecks).

    Args:
        x: the block's input, any memory format.
        x_mean, x_var: its batch statistics [C0], if they are known; the gradient of x is whole all the same.
        tensors, eps: the flattened stages, two a layer with a bottleneck (1x1, 3x3), else one (3x3).
        masks: one [N, channels, *spatial] bool per drop rate, empty where that is 0; none where all are.
        drop_rates: one per layer, of its new features, or one per stage, of what its convolution makes.
        bottleneck: whether the layers have one.
        saved: of each layer, whether to return its Z [M, B] for the backward pass, which else recomputes it.
        describe: whether the statistics of all features are wanted, and not of those alone that a layer normalises.
        group: name of the process group whose batches are normalised together, None for this process's alone.
        link: a tensor of x's shape and gradient but without its memory, through which second derivatives reach x.
        prepend: whether new features come before those that are read, instead of behind them.

    ``mean`` and ``var`` hold the batch statistics as :class:`Plan` packs them, zero where they are not wanted; those of
    the features are differentiable. ``count`` is the number of rows they are over, empty without a group.
    """
    plan = plan_of(x, tensors, eps, bottleneck, drop_rates, describe, prepend)
    backend = select(x.device, x.dtype)
    image = empty_image(x, plan.grid, plan.columns)
    features = to_matrix(image)
    rows = features.shape[0]
    if plan.walked_by(backend, x.dtype, group):
        bottlenecks = [plan.bottleneck_in(None, i, features) for i in range(len(plan.layers)) if saved[i]]
        mean, var = (features.new_zeros(plan.packed, dtype=torch.float32) for _ in range(2))
        kept = for_each_layer(bottlenecks, saved, features)
        block = Block(features, plan.walk.tensors, eps, plan.grid, kept, mean, var, prepend)
        backend.dense_block(block, plan.widths[0], describe=describe, x=to_matrix(x), x_mean=x_mean, x_var=x_var)
        return image, mean, var, global_count(rows, x, group), bottlenecks
    packed = empty_statistics(features, plan.packed, plan.eps)
    prepared = Prepared(plan.stages, backend, x)
    for columns in plan.without_statistics():
        prepared.zero(packed.mean[columns]), prepared.zero(packed.var[columns])
    own = packed.of(plan.read(0)) if plan.normalised_by_batch(0) else None
    if own is not None and x_mean is not None:
        prepared.copy(own.mean, x_mean), prepared.copy(own.var, x_var), prepared.rstd(own.rstd, x_var, plan.eps)
        own = None
    prepared.done()
    backend.append_features(x, features[:, plan.read(0)], own)
    synchronise(own, rows, group)
    bottlenecks = []

    def affine(j: int) -> Affine:
        return prepared.affine(j, packed.of(plan.ranges[j]))

    shared = None if all(saved) else plan.bottleneck_buffer(features)
    masks = plan.masks(masks)
    for i, layer in enumerate(plan.layers):
        j, inputs = i * len(layer), features[:, plan.read(i)]
        normalise: Affine | None = affine(j)
        if bottleneck:
            (weight, bias), mask, keep_scale = prepared.weights[j], masks[j], plan.keep_scales[j]
            j += 1
            z = plan.bottleneck_in(None if saved[i] else shared, i, features)
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


@_forward.custom_op.register_fake
def _(
    x: Tensor,
    x_mean: Tensor | None,
    x_var: Tensor | None,
    tensors: list[Tensor],
    eps: list[float],
    masks: list[Tensor],
    drop_rates: list[float],
    bottleneck: bool,
    saved: list[bool],
    describe: bool,
    group: str | None,
    link: Tensor | None,
    prepend: bool = False,
) -> Outputs:
    plan = Plan(x, tensors, eps, bottleneck, drop_rates)
    image = empty_image(x, plan.grid, plan.columns)
    rows = x.numel() // x.shape[1]
    bottlenecks = [x.new_empty(rows, c.stop - c.start) for c, kept in zip(plan.bottlenecks, saved) if kept]
    mean = x.new_empty(plan.packed, dtype=accumulation_dtype(x.dtype))
    return image, mean, torch.empty_like(mean), fake_count(x, group), bottlenecks


class BlockGradients:
    """The backward pass: G, P and Q, and the gradients of the stages. ``behind`` are P and Q of the packed statistics
    as they came from behind the block, if they did."""

    def __init__(
        self,
        plan: Plan,
        features: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        behind: Pair | None,
        group: str | None,
    ) -> None:
        self.plan, self.mean, self.group = plan, mean, group
        self.backend = select(features.device, features.dtype)
        self.features = to_matrix(features)
        self.count = rows_of(count, self.features.shape[0])
        packed = Statistics(mean, var, torch.empty_like(var), plan.eps)
        prepared = Prepared(plan.stages, self.backend, features)
        prepared.rstd(packed.rstd, var, plan.eps)
        self.weights = prepared.weights
        self.affines = [prepared.affine(j, packed.of(columns)) for j, columns in enumerate(plan.ranges)]
        prepared.done()
        self.pair = behind
        """P and Q of F's columns so far; None for zero."""
        self.spare = [mean.new_empty(2, plan.columns).unbind() for _ in range(2)]
        self.bottleneck_pair = mean.new_empty(2, plan.packed - plan.columns).unbind()

    def run(
        self,
        grad: Tensor,
        consumed: bool,
        bottlenecks: list[Tensor],
        saved: list[bool],
        masks: list[Tensor],
        needs: list[bool],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of x [N, C0, *spatial] and of the stages' tensors, as far as ``needs`` says so. Where grad is
        ``consumed``, its memory becomes G's."""
        plan, need_x = self.plan, needs[0]
        self.gradients = [
            StageGradients(stage, needs[1 + j * STAGE_TENSORS : 1 + (j + 1) * STAGE_TENSORS])
            for j, stage in enumerate(plan.stages)
        ]
        per_layer = len(plan.layers[0])
        by_layer = (self.gradients[j : j + per_layer] for j in range(0, len(self.gradients), per_layer))
        asked = [any(g.needs_any for g in layer) for layer in by_layer]
        first = 0 if need_x else asked.index(True) if any(asked) else len(asked)
        self.source = to_matrix(grad)
        """Where the gradient of F stands: the incoming one until the last layer has written G, then G."""
        self.grad = self.source if consumed else self.features.new_empty(self.features.shape)
        self.z = None if all(saved) else plan.bottleneck_buffer(self.features)
        self.dz = plan.bottleneck_buffer(self.features)
        image = empty_image(self.features, plan.grid, plan.widths[0]) if need_x else self.features.new_empty(0)
        self.masks = plan.masks(masks)

        kept, completed = iter(reversed(bottlenecks)), None
        for i in reversed(range(first, len(plan.layers))):
            dy = self.finalise(plan.new(i), i + 1) if completed is None else completed
            j = (i + 1) * per_layer - 1
            self.drop(dy, j)
            z = next(kept) if plan.bottleneck and saved[i] else None
            if i > first:
                completed = self.layer(i, dy, z, self.grad[:, plan.new(i - 1)])
            else:
                completed = self.layer(i, dy, z, to_matrix(image) if need_x else None)
            self.source = self.grad
        if need_x and completed is None:
            self.finalise(plan.read(0), 0, to_matrix(image))
        return image, [t for g in self.gradients for t in g.tensors()]

    def finalise(self, columns: slice, reader: int, out: Tensor | None = None) -> Tensor:
        """(1) on columns of F that layer ``reader`` is the first to read, in G or into ``out``; nothing to add where no
        reader normalises by the batch."""
        grad = self.source[:, columns]
        target = self.grad[:, columns] if out is None else out
        if self.plan.normalised_by_batch(reader) and self.pair is not None:
            p, q = global_sum(self.pair[0][columns], self.pair[1][columns], self.group)
            self.backend.finalise_gradient(grad, self.through(columns, p, q), target)
        elif out is not None or self.source is not self.grad:
            self.backend.append_features(to_image(grad, self.plan.grid), target, None)
        return target

    def drop(self, matrix: Tensor, j: int) -> None:
        """Stage j's dropout, if it has one, of what its convolution made or of its gradient, in place."""
        mask = self.masks[j]
        if mask is not None:
            image = to_image(matrix, self.plan.grid)
            self.backend.append_features(image, matrix, None, mask, self.plan.keep_scales[j])

    def through(self, columns: slice, p: Tensor, q: Tensor) -> ThroughStatistics:
        """What completes the gradient of columns of F."""
        return ThroughStatistics(self.features[:, columns], self.mean[columns], p, q, self.count)

    def layer(self, i: int, dy: Tensor, z: Tensor | None, target: Tensor | None) -> Tensor | None:
        """One layer's backward: its stages' gradients, and (2) on the columns it read, unless their gradients are not
        needed: no ``target``. On those of them that nobody before it reads (1), into the target, which is returned if
        that was done."""
        plan = self.plan
        j, columns = i * len(plan.layers[i]), plan.read(i)
        inputs, affine, gradients = self.features[:, columns], self.affines[j], self.gradients[j]
        weight, like = self.weights[j][0], gradients.stage.conv_weight
        need_d = target is not None or gradients.needs_norm
        before = None if self.pair is None else (self.pair[0][columns], self.pair[1][columns])
        after = self.spare[0][0][columns], self.spare[0][1][columns]
        reader, completion = gradients.reader(before, after), None
        if not plan.bottleneck:
            total, source = self.grad[:, columns], self.source[:, columns]
            if target is None:
                total, source = torch.empty_like(total) if need_d else None, None
            grad_weight, _ = self.backend.bn_relu_conv3x3_backward(
                dy,
                inputs,
                affine,
                weight,
                plan.grid,
                total,
                need_weight=gradients.needs_conv_weight,
                reader=reader,
                like=like,
                source=source,
            )
            gradients.convolution(grad_weight, dy)
        else:
            need_dz = need_d or gradients.needs_any
            dz, unfinished = self.bottleneck(i, dy, z, need_dz)
            if not need_dz:
                return None
            if unfinished.through is not None and (gradients.needs_conv_bias or self.masks[j] is not None):
                self.backend.finalise_gradient(dz, unfinished.through, dz)
                unfinished.through = None
            self.drop(dz, j)
            if target is not None and reader.after is not None and self.group is None:
                last = plan.last_read(i)
                through = self.through(plan.new(i - 1) if i else columns, after[0][last], after[1][last])
                completion = Completion(last, through, target)
            grad_weight, _ = self.backend.bn_relu_conv1x1_backward(
                dz,
                inputs,
                affine,
                weight.flatten(1),
                None if target is None else self.grad[:, columns],
                need_weight=gradients.needs_conv_weight,
                need_sums=need_d,
                source=self.source[:, columns] if self.source is not self.grad else None,
                reader=reader,
                completion=completion,
                unfinished=unfinished,
                like=like,
            )
            gradients.convolution(grad_weight, dz)
        if need_d and reader.after is not None:
            self.pair = self.spare[0]
            self.spare.reverse()
        return None if completion is None else target

    def bottleneck(self, i: int, dy: Tensor, z: Tensor | None, need_dz: bool) -> tuple[Tensor | None, Unfinished]:
        """From dY to dZ, through the 3x3 convolution and the second normalisation: s' * D', and what is unfinished."""
        plan, columns, j = self.plan, self.plan.bottlenecks[i], 2 * i + 1
        gradients = self.gradients[j]
        if z is None:
            (weight, bias), inputs = self.weights[j - 1], self.features[:, plan.read(i)]
            z = plan.bottleneck_in(self.z, i, self.features)
            self.backend.bn_relu_conv1x1(inputs, self.affines[j - 1], weight.flatten(1), bias, z, None)
            self.drop(z, j - 1)
        scaled = plan.bottleneck_in(self.dz, i, self.features) if need_dz or gradients.needs_norm else None
        p, q = (v[columns.start - plan.columns : columns.stop - plan.columns] for v in self.bottleneck_pair)
        through = ThroughStatistics(z, self.mean[columns], p, q, self.count)
        unfinished = Unfinished(through if need_dz and not plan.stages[j].frozen else None)
        later = unfinished if need_dz and self.group is None else None
        grad_weight, _ = self.backend.bn_relu_conv3x3_backward(
            dy,
            z,
            self.affines[j],
            self.weights[j][0],
            plan.grid,
            scaled,
            need_weight=gradients.needs_conv_weight,
            reader=gradients.reader(None, (p, q)),
            unfinished=later,
            like=gradients.stage.conv_weight,
        )
        gradients.convolution(grad_weight, dy)
        if later is None and unfinished.through is not None:
            p, q = global_sum(p, q, self.group)
            unfinished.through = through._replace(p=p, q=q)
        return scaled, unfinished


def consuming_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What the backward op computes from ``(grad, *inputs)``, with G in the memory of ``grad``, which nobody else may
    need."""
    return without_autocast(_run_backward)(grad, *inputs, total=grad)


def _run_backward(
    grad: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    features: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    bottlenecks: list[Tensor],
    saved: list[bool],
    tensors: list[Tensor],
    eps: list[float],
    masks: list[Tensor],
    drop_rates: list[float],
    bottleneck: bool,
    in_channels: int,
    group: str | None,
    needs: list[bool],
    prepend: bool,
    total: Tensor | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """G stands in the memory of ``total``, which may be grad, or in its own."""
    described = grad_mean is not None
    own = own_features(features, in_channels, prepend)
    plan = plan_of(own, tensors, eps, bottleneck, drop_rates, described, prepend)
    backend = select(features.device, features.dtype)
    if plan.walked_by(backend, features.dtype, group) and all(compress(needs, (True, *plan.walk.is_trained))):
        walk = plan.walk
        image = empty_image(features, plan.grid, in_channels)
        gradients: list[Tensor] = [features.new_empty(0)] * len(tensors)
        for i in walk.trained:
            gradients[i] = torch.empty_like(walk.tensors[i], dtype=torch.float32)
        p, q = mean.new_zeros(2, *mean.shape).unbind()
        if described:
            p[: plan.columns].copy_(grad_mean[: plan.columns]), q[: plan.columns].copy_(grad_var[: plan.columns])
        incoming, f = to_matrix(grad), to_matrix(features)
        g = torch.empty_like(f) if total is None else incoming
        kept, rows = for_each_layer(bottlenecks, saved, features), rows_of(count, f.shape[0])
        block = Block(f, walk.tensors, eps, plan.grid, kept, mean, var, prepend)
        out = (to_matrix(image), gradients, p, q)
        backend.dense_block_backward(incoming, g, block, rows, *out, described=described)
        made: list[Tensor | None] = [None] * len(tensors)
        for i in walk.trained:
            made[i] = gradients[i] if walk.tensors[i].dtype == torch.float32 else gradients[i].to(walk.tensors[i].dtype)
        return image, made
    behind = (grad_mean.contiguous(), grad_var.contiguous()) if described else None
    gradients = BlockGradients(plan, features, mean, var, count, behind, group)
    return gradients.run(grad, total is not None, bottlenecks, saved, masks, needs)


@define("dense_block_backward")
def _backward(
    grad: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    features: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    bottlenecks: list[Tensor],
    saved: list[bool],
    tensors: list[Tensor],
    eps: list[float],
    masks: list[Tensor],
    drop_rates: list[float],
    bottleneck: bool,
    in_channels: int,
    group: str | None,
    needs: list[bool],
    prepend: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of the stages' tensors, empty where ``needs`` (x's, then one per tensor) says so.

    ``grad_mean`` and ``grad_var`` are those of the features' statistics, [C_total] or packed, None where nobody read
    them; ``bottlenecks`` are those of the layers of which they were ``saved``; ``in_channels`` is C0; all else is as in
    the forward pass.
    """
    block = (features, mean, var, count, bottlenecks, saved, tensors, eps, masks, drop_rates, bottleneck)
    return _run_backward(grad, grad_mean, grad_var, *block, in_channels, group, needs, prepend, total=None)


@_backward.custom_op.register_fake
def _(
    grad: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    features: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    bottlenecks: list[Tensor],
    saved: list[bool],
    tensors: list[Tensor],
    eps: list[float],
    masks: list[Tensor],
    drop_rates: list[float],
    bottleneck: bool,
    in_channels: int,
    group: str | None,
    needs: list[bool],
    prepend: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    grid = (features.shape[0], *features.shape[2:])
    grad_x = empty_image(features, grid, in_channels) if needs[0] else features.new_empty(0)
    return grad_x, [torch.empty_like(t) if need else features.new_empty(0) for t, need in zip(tensors, needs[1:])]


def for_each_layer(bottlenecks: list[Tensor], saved: list[bool], like: Tensor) -> list[Tensor]:
    """Of each layer its bottleneck, empty where it was not ``saved``, from those that were."""
    kept, empty = iter(bottlenecks), like.new_empty(0)
    return [next(kept) if flag else empty for flag in saved]


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: Outputs) -> None:
    x, _, _, tensors, ctx.eps, masks, ctx.drop_rates, ctx.bottleneck, ctx.saved, _, ctx.group, *rest = inputs
    link, ctx.prepend = rest
    *described, count, bottlenecks = outputs
    ctx.mark_non_differentiable(count, *bottlenecks)
    ctx.set_materialize_grads(False)
    ctx.in_channels = x.shape[1]
    stages = save_stages(ctx, tensors)
    ctx.sizes = [len(stages), len(masks), len(bottlenecks)]
    ctx.save_for_backward(*described, count, link, *stages, *masks, *bottlenecks)


def _shown(outputs: Outputs) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    features, mean, var, count, _ = outputs
    columns = features.shape[1]
    return (features, mean[:columns], var[:columns]), (count, mean, var)


def _gradients(
    ctx: Any, needs: list[bool], grad: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, *_: Any
) -> Gradients:
    features, mean, var, count, link, *rest = ctx.saved_tensors
    stages, masks, bottlenecks = (rest[sum(ctx.sizes[:i]) :][:n] for i, n in enumerate(ctx.sizes))
    tensors = saved_stages(ctx, stages)
    if grad is None and grad_mean is None and grad_var is None:
        return None, None, None, [None] * len(tensors)
    grads = (grad, grad_mean, grad_var)
    if any(g is not None and stock.needed_in_backward(g) for g in grads):
        grad_x, *gradients = _differentiable_gradients(ctx, grads, features, link, tensors, masks)
    else:
        grad = torch.zeros_like(features) if grad is None else grad
        if grad_mean is not grad_var:  # one of them may be None
            grad_mean, grad_var = (torch.zeros_like(mean) if g is None else g for g in (grad_mean, grad_var))
        saved = (features, mean, var, count, bottlenecks, ctx.saved, tensors)
        options = (ctx.eps, masks, ctx.drop_rates, ctx.bottleneck, ctx.in_channels, ctx.group)
        options += ([needs[0], *needs[2:]], ctx.prepend)
        grad_x, gradients = _backward(grad, grad_mean, grad_var, *saved, *options)
    return grad_x if needs[0] else None, None, None, gradients


def _differentiable_gradients(
    ctx: Any,
    grads: tuple[Tensor | None, ...],
    features: Tensor,
    link: Tensor | None,
    tensors: list[Tensor | None],
    masks: list[Tensor],
) -> list[Tensor | None]:
    value = own_features(features.detach(), ctx.in_channels, ctx.prepend)

    def block(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x = value if link is None else value + x
        plan = Plan(x, tensors, ctx.eps, ctx.bottleneck, ctx.drop_rates)
        made = stock.dense_block(x, plan.layers, masks, ctx.drop_rates, ctx.prepend)
        return made, *stock.batch_statistics(made)

    grads = (grads[0], *(None if g is None else g[: features.shape[1]] for g in grads[1:]))
    return stock.differentiable_gradients(block, [value if link is None else link, *tensors], grads, ctx.group)


register_vmap(_backward.custom_op)
parts = Parts(_forward, _backward, stock.dense_block)
dense_block = with_autograd(_forward, _save, _gradients, _shown)
"""Returns (features, their mean and variance, count, mean, var), the last two as :class:`Plan` packs them."""
