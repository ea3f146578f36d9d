"""What the ops of a single stage share: their input, its batch statistics, the gradients, autograd.

The batch statistics may come from the op that made x. If they are part of its graph, their gradients P and Q go back
there. Otherwise the gradient of x is complete, as if the statistics had been computed here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.affine import (
    Reader,
    Statistics,
    ThroughStatistics,
    accumulation_dtype,
    empty_statistics,
)
from densenet_fast.backends.layout import as_output, empty_image, to_image, to_matrix
from densenet_fast.ops import stock
from densenet_fast.ops.batching import register_vmap
from densenet_fast.ops.op import Gradients, Op
from densenet_fast.ops.op import with_autograd as op_with_autograd
from densenet_fast.ops.stage import (
    Prepared,
    StageGradients,
    global_count,
    global_sum,
    rows_of,
    save_stages,
    saved_stages,
    synchronise,
    unflatten,
)


class Input:
    """The input x [N, C, *spatial] of an op of one stage, as the kernels take it, with what normalises it.

    ``own`` are the batch statistics: copies of ``mean`` and ``var`` if they are given, else computed here; zeros if the
    stage is frozen.
    """

    def __init__(self, given: Any, again: bool = False) -> None:
        """Takes x, mean, var, tensors, eps and group from an op's inputs.

        In a backward pass, ``again``, the given statistics are not copied.
        """
        x, mean, var = given.x, given.mean, given.var
        self.x, self.group = x, given.group
        (self.stage,) = unflatten(given.tensors, given.eps)
        self.backend = select(x.device, x.dtype)
        self.matrix, self.grid = to_matrix(x), (x.shape[0], *x.shape[2:])
        prepared = Prepared([self.stage], self.backend, x)
        ((weight, self.bias),) = prepared.weights
        self.weight = None if weight is None else weight.flatten(1)
        if again:
            self.own = Statistics(mean, var, torch.empty_like(var), self.stage.eps)
        else:
            self.own = empty_statistics(x, x.shape[1], self.stage.eps)
        if mean is not None:
            if not again:
                prepared.copy(self.own.mean, mean), prepared.copy(self.own.var, var)
            prepared.rstd(self.own.rstd, var, self.stage.eps)
        elif self.stage.frozen:
            prepared.zero(self.own.mean), prepared.zero(self.own.var)
        else:
            self.backend.channel_statistics(self.matrix, self.own)
            synchronise(self.own, self.matrix.shape[0], given.group)
        self.affine = prepared.affine(0, self.own)

    def count(self) -> Tensor:
        """The number of rows that the statistics are computed over, as :func:`global_count` returns it."""
        return global_count(self.matrix.shape[0], self.x, self.group)

    def reader(self, gradients: StageGradients, needs: list[bool]) -> Reader:
        """Where the kernel that computes the sums writes the gradients through the normalisation."""
        self.through = None
        if not self.stage.frozen and (needs[0] or needs[1]):
            self.through = torch.empty_like(self.own.mean), torch.empty_like(self.own.mean)
        return gradients.reader(None, self.through)

    def gradients(
        self, scaled: Tensor | None, gradients: StageGradients, count: Tensor, needs: list[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Returns the results of the backward op: the gradient of x, completed by (1), and those of the tensors.

        ``scaled`` is s * D, or None if x needs no gradient. The kernels have written to :meth:`reader` before.
        """
        tensors = gradients.tensors()
        if needs[1]:
            tensors += self.through or (torch.zeros_like(self.own.mean), torch.zeros_like(self.own.mean))
        elif self.through is not None:
            rows = rows_of(count, self.matrix.shape[0])
            p, q = global_sum(*self.through, self.group)
            self.backend.finalise_gradient(scaled, ThroughStatistics(self.matrix, self.own.mean, p, q, rows), scaled)
        return as_output(to_image(scaled, self.grid)) if needs[0] else self.x.new_empty(0), tensors


def fake_statistics(given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of an op of one stage, without values."""
    x, group = given.x, given.group
    vector = x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))
    return vector, torch.empty_like(vector), fake_count(x, group)


def fake_count(x: Tensor, group: str | None) -> Tensor:
    """The result of :func:`global_count`, without values."""
    return x.new_empty(0 if group is None else (), dtype=torch.float64)


def fake_gradients(given: Any) -> tuple[Tensor, list[Tensor]]:
    """The result of :meth:`Input.gradients`, without values."""
    x, mean, needs = given.x, given.mean, given.needs
    grad_x = empty_image(x, (x.shape[0], *x.shape[2:]), x.shape[1]) if needs[0] else x.new_empty(0)
    gradients = [torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(given.tensors, needs[2:])]
    return grad_x, gradients + [torch.empty_like(mean) for _ in range(2) if needs[1]]


def statistics_of_output(out: Tensor, channels: int, wanted: bool) -> tuple[Statistics | None, Tensor, Tensor]:
    """Returns where a kernel writes the statistics of ``out``, None if they are not ``wanted``; and their mean and
    variance, empty if they are not."""
    own = empty_statistics(out, channels if wanted else 0, 0.0)
    return own if wanted else None, own.mean, own.var


def with_autograd(
    op: Op, backward_op: Op, run: Callable[..., Tensor], saved: slice
) -> Callable[..., tuple[Tensor, ...]]:
    """Makes a differentiable function of an op of one flattened stage.

    The op is ``op(x, mean, var, tensors, eps, *options, group)``. Its backward op is ``backward_op(grad, x,
    *outputs[saved], tensors, eps, *options, group, needs)``. That returns the gradient of x and a list: the gradients
    of the tensors and, if they are needed, those of mean and var.

    Derivatives that must be differentiable themselves go through ``run(x, mean, var, stage, *options)``, which is the
    op in stock torch functions.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        x, mean, var, tensors, ctx.eps, *ctx.options, ctx.group = inputs
        ctx.saved = len(outputs[saved])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, var, *outputs[saved], *save_stages(ctx, tensors))

    def gradients(ctx: Any, needs: list[bool], grad: Tensor | None, *_: None) -> Gradients:
        x, mean, var, *rest = ctx.saved_tensors
        kept, tensors = rest[: ctx.saved], saved_stages(ctx, rest[ctx.saved :])
        if grad is None:
            return None, None, None, [None] * len(tensors)
        if stock.needed_in_backward(grad):
            known = (mean, var) if needs[1] else (None, None)
            grad_x, grad_mean, grad_var, *grads = stock.differentiable_gradients(
                lambda x, mean, var, *tensors: [run(x, mean, var, *unflatten(tensors, ctx.eps), *ctx.options)],
                [x, *known, *tensors],
                [grad],
                None if needs[1] else ctx.group,
            )
            return grad_x, grad_mean, grad_var, grads
        inputs = (grad, x, *kept, tensors, ctx.eps, *ctx.options, ctx.group, needs)
        grad_x, grads = backward_op(*inputs)
        grad_mean, grad_var = grads[len(tensors) :] or (None, None)
        return grad_x if needs[0] else None, grad_mean, grad_var, grads[: len(tensors)]

    register_vmap(backward_op.custom_op)
    return op_with_autograd(op, save, gradients)
