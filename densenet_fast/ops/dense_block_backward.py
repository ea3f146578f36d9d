"""densenet_fast::dense_block_backward: the backward pass of :mod:`densenet_fast.ops.dense_block`, whose letters it
uses."""

from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.affine import Completion, Statistics, ThroughStatistics, Unfinished
from densenet_fast.backends.layout import empty_image, to_image, to_matrix
from densenet_fast.backends.optional import Block
from densenet_fast.ops.batching import register_vmap
from densenet_fast.ops.block_plan import Plan, for_each_layer, own_features, plan_of
from densenet_fast.ops.op import define
from densenet_fast.ops.stage import STAGE_TENSORS, Pair, Prepared, StageGradients, global_sum, rows_of, without_autocast


class BackwardInputs(NamedTuple):
    """The arguments of the op. Those not listed are what the forward op took and returned.

    Args:
        grad: the gradient of the features [N, C_total, *spatial].
        grad_mean, grad_var: the gradients of their statistics, [C_total] or packed; None where nobody read the
            statistics.
        bottlenecks: those of the layers that ``saved`` theirs.
        in_channels: C0.
        needs: whether a gradient is needed: of x, and then of each of the stages' tensors.
    """

    grad: Tensor
    grad_mean: Tensor | None
    grad_var: Tensor | None
    features: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor
    bottlenecks: list[Tensor]
    saved: list[bool]
    tensors: list[Tensor]
    eps: list[float]
    masks: list[Tensor]
    drop_rates: list[float]
    bottleneck: bool
    in_channels: int
    group: str | None
    needs: list[bool]
    prepend: bool = False


class BlockGradients:
    """The backward pass of a block: it computes G, P and Q and the gradients of the stages.

    ``behind`` are P and Q of the packed statistics that readers behind the block contributed, or None.
    """

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
        """P and Q of the columns of F so far; None stands for zero."""
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
        """Returns the gradients of x [N, C0, *spatial] and of the stages' tensors that ``needs`` asks for. With
        ``consumed``, G takes the memory of grad."""
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
        """The gradient of F: the incoming one until the last layer has written G, then G."""
        own = self.features
        self.grad = self.source if consumed else self.backend.empty(own, own.shape, own.stride())
        self.z = None if all(saved) else plan.bottleneck_buffer(self.features, self.backend)
        self.dz = plan.bottleneck_buffer(self.features, self.backend)
        image = self.features.new_empty(0)
        if need_x:
            image = empty_image(self.features, plan.grid, plan.widths[0], self.backend.empty)
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
        """Completes, by (1), the gradient of columns of F, in G or in ``out``, which is returned.

        ``reader`` is the first layer that reads the columns. If neither it nor a later one normalises by the batch,
        there is nothing to add.
        """
        grad = self.source[:, columns]
        target = self.grad[:, columns] if out is None else out
        if self.plan.normalised_by_batch(reader) and self.pair is not None:
            p, q = global_sum(self.pair[0][columns], self.pair[1][columns], self.group)
            self.backend.finalise_gradient(grad, self.through(columns, p, q), target)
        elif out is not None or self.source is not self.grad:
            self.backend.append_features(to_image(grad, self.plan.grid), target, None)
        return target

    def drop(self, matrix: Tensor, j: int) -> None:
        """Applies stage j's dropout, if it has one, in place, to what its convolution made or to the gradient of
        that."""
        mask = self.masks[j]
        if mask is not None:
            image = to_image(matrix, self.plan.grid)
            self.backend.append_features(image, matrix, None, mask, self.plan.keep_scales[j])

    def through(self, columns: slice, p: Tensor, q: Tensor) -> ThroughStatistics:
        """What (1) adds to the gradient of columns of F."""
        return ThroughStatistics(self.features[:, columns], self.mean[columns], p, q, self.count)

    def layer(self, i: int, dy: Tensor, z: Tensor | None, target: Tensor | None) -> Tensor | None:
        """One layer's backward pass: the gradients of its stages, and (2) on the columns that it read.

        Without a ``target`` the gradients of these columns are not needed. With one, (1) may be done here on those of
        the columns that no earlier layer reads: their complete gradient then stands in the target, which is returned.
        """
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
        """From dY to dZ, through the 3x3 convolution and the second normalisation. Returns s' * D' and what is left to
        add to it."""
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


def _run(given: BackwardInputs, total: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
    """Computes the op's results. G takes the memory of ``total``, which may be grad; for None it gets its own."""
    features, tensors, saved, needs = given.features, given.tensors, given.saved, given.needs
    mean, group, return_statistics = given.mean, given.group, given.grad_mean is not None
    own = own_features(features, given.in_channels, given.prepend)
    plan = plan_of(own, tensors, given.eps, given.bottleneck, given.drop_rates, return_statistics, given.prepend)
    backend = select(features.device, features.dtype)
    whole = plan.runs_whole_on(backend, features.dtype, group)
    if whole and all(compress(needs, (True, *plan.block_tensors.is_trained))):
        trained, like = plan.block_tensors.trained, plan.block_tensors.tensors
        image = empty_image(features, plan.grid, given.in_channels, backend.empty)
        gradients: list[Tensor] = [features.new_empty(0)] * len(tensors)
        for i in trained:
            gradients[i] = torch.empty_like(like[i], dtype=torch.float32)
        p, q = mean.new_zeros(2, *mean.shape).unbind()
        if return_statistics:
            p[: plan.columns].copy_(given.grad_mean[: plan.columns])
            q[: plan.columns].copy_(given.grad_var[: plan.columns])
        incoming, f = to_matrix(given.grad), to_matrix(features)
        g = backend.empty(f, f.shape, f.stride()) if total is None else incoming
        kept, rows = for_each_layer(given.bottlenecks, saved, features), rows_of(given.count, f.shape[0])
        block = Block(f, like, given.eps, plan.grid, kept, mean, given.var, given.prepend)
        out = (to_matrix(image), gradients, p, q)
        backend.dense_block_backward(incoming, g, block, rows, *out, return_statistics=return_statistics)
        return image, plan.block_tensors.gradients(gradients[i] for i in trained)
    behind = (given.grad_mean.contiguous(), given.grad_var.contiguous()) if return_statistics else None
    gradients = BlockGradients(plan, features, mean, given.var, given.count, behind, group)
    return gradients.run(given.grad, total is not None, given.bottlenecks, saved, given.masks, needs)


@define("dense_block_backward", BackwardInputs)
def backward(given: BackwardInputs) -> tuple[Tensor, list[Tensor]]:
    """Returns the gradients of x and of the stages' tensors, empty where ``needs`` is False."""
    return _run(given, total=None)


@backward.fake
def _(given: BackwardInputs) -> tuple[Tensor, list[Tensor]]:
    features = given.features
    grid = (features.shape[0], *features.shape[2:])
    grad_x = empty_image(features, grid, given.in_channels) if given.needs[0] else features.new_empty(0)
    return grad_x, [
        torch.empty_like(t) if need else features.new_empty(0) for t, need in zip(given.tensors, given.needs[1:])
    ]


register_vmap(backward.custom_op)


@without_autocast
def consuming_backward(*inputs: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Computes the op's results with G in the memory of the incoming gradient. Nobody else may need that gradient."""
    return _run(BackwardInputs(*inputs), total=inputs[0])
