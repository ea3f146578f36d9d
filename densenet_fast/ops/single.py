"""What the ops of a single stage share: their input, its batch statistics, the gradients behind them, autograd.

The batch's statistics may come from where x was made. If they are part of its graph, their gradients P and Q go back
there; else the gradient of x is complete, as if they had been computed here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.affine import (
    Affine,
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
    StageGradients,
    add_reader,
    affines,
    convolutions,
    global_count,
    global_sum,
    norm_gradients,
    present,
    synchronise,
    through_statistics,
    unflatten,
)


class Input:
    """x [N, C, *spatial] of an op of one packed stage, as the kernels take it."""

    def __init__(self, x: Tensor, tensors: list[Tensor], eps: list[float]) -> None:
        self.x = x
        (self.stage,) = unflatten(tensors, eps)
        self.backend = select(x.device, x.dtype)
        self.matrix, self.grid = to_matrix(x), (x.shape[0], *x.shape[2:])

    def convolution(self) -> tuple[Tensor, Tensor | None]:
        """The convolution's weight [C', C] and bias in x's dtype."""
        ((weight, bias),) = convolutions([self.stage], self.x.dtype)
        return weight.flatten(1), bias

    def statistics(self, mean: Tensor | None, var: Tensor | None, group: str | None) -> Statistics:
        """Of the batch, [C] each: a copy of the given ones, or computed; zeros if the stage is frozen."""
        if mean is not None:
            return self.known(mean.clone(), var.clone())
        own = empty_statistics(self.x, self.x.shape[1], self.stage.eps)
        if self.stage.frozen:
            own.mean.zero_(), own.var.zero_()
        else:
            self.backend.channel_statistics(self.matrix, own)
            synchronise(own, self.matrix.shape[0], group)
        return own

    def known(self, mean: Tensor, var: Tensor) -> Statistics:
        """Those with ``mean`` and ``var``."""
        return Statistics(mean, var, torch.rsqrt(var + self.stage.eps), self.stage.eps)

    def count(self, group: str | None) -> Tensor:
        """The number of rows that the statistics are over."""
        return global_count(self.matrix.shape[0], self.x, group)

    def affine(self, own: Statistics) -> Affine:
        """What normalises x."""
        return affines([self.stage], [own])[0][0]

    def gradients(
        self,
        scaled: Tensor | None,
        sums: tuple[Tensor, Tensor] | None,
        gradients: StageGradients,
        own: Statistics,
        count: Tensor,
        group: str | None,
        needs: list[bool],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """What a backward op returns, from scale * D, None where x needs no gradient, and (sum D, sum D * (x - mean)),
        None where neither x nor the normalisation does: (1) and (2)."""
        normalised = affines([self.stage], [own])
        gradients.sums = sums
        norm_gradients([gradients], [normalised[0][1]])
        tensors = gradients.tensors()
        p, q = torch.zeros_like(own.mean), torch.zeros_like(own.mean)
        if not self.stage.frozen and (needs[0] or needs[1]):
            add_reader(sums, through_statistics(normalised)[0], p, q)
        if needs[1]:
            tensors += [p, q]
        elif needs[0] and not self.stage.frozen:
            through = ThroughStatistics(self.matrix, own.mean, *global_sum(p, q, group), count)
            self.backend.finalise_gradient(scaled, through, scaled)
        return as_output(to_image(scaled, self.grid)) if needs[0] else self.x.new_empty(0), tensors


def fake_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count as :meth:`Input.statistics` returns them, without values."""
    vector = x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))
    return vector, torch.empty_like(vector), x.new_empty((), dtype=torch.float64)


def fake_gradients(x: Tensor, mean: Tensor, tensors: list[Tensor], needs: list[bool]) -> tuple[Tensor, list[Tensor]]:
    """What :meth:`Input.gradients` returns, without values."""
    grad_x = empty_image(x, (x.shape[0], *x.shape[2:]), x.shape[1]) if needs[0] else x.new_empty(0)
    gradients = [torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(tensors, needs[2:])]
    return grad_x, gradients + [torch.empty_like(mean) for _ in range(2) if needs[1]]


def statistics_of_output(out: Tensor, channels: int, wanted: bool) -> tuple[Statistics | None, Tensor, Tensor]:
    """Where a kernel writes the statistics of its result, like ``out`` in dtype, if they are ``wanted``; and its mean
    and variance, empty if not."""
    own = empty_statistics(out, channels if wanted else 0, 0.0)
    return own if wanted else None, own.mean, own.var


def with_autograd(
    op: Op, backward_op: Op, run: Callable[..., Tensor], saved: slice
) -> Callable[..., tuple[Tensor, ...]]:
    """``op(x, mean, var, tensors, eps, *options, group)`` of one flattened stage as a differentiable function, by
    ``backward_op(grad, x, *outputs[saved], tensors, eps, *options, group, needs) -> (x's gradient, the tensors' and, if
    needed, mean's and var's)``.

    A derivative that must itself be differentiable goes through ``run(x, mean, var, stage, *options)``, which is ``op``
    on stock torch functions.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        x, mean, var, tensors, ctx.eps, *ctx.options, ctx.group = inputs
        ctx.saved = len(outputs[saved])
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, var, *outputs[saved], *tensors)

    def gradients(ctx: Any, needs: list[bool], grad: Tensor | None, *_: None) -> Gradients:
        x, mean, var, *rest = ctx.saved_tensors
        kept, tensors = rest[: ctx.saved], rest[ctx.saved :]
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
        inputs = (grad, x, *kept, present(tensors, x), ctx.eps, *ctx.options, ctx.group, needs)
        grad_x, grads = backward_op(*inputs)
        grad_mean, grad_var = grads[len(tensors) :] or (None, None)
        grads = [g if need else None for g, need in zip(grads, needs[2:])]
        return grad_x if needs[0] else None, grad_mean, grad_var, grads

    register_vmap(backward_op.custom_op)
    return op_with_autograd(op, save, gradients)
