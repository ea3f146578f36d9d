"""What the ops of a single stage share: their input, its batch statistics, the gradients behind them, autograd."""

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
from densenet_fast.backends.layout import empty_image, to_image, to_matrix
from densenet_fast.ops import stock
from densenet_fast.ops.batching import register_vmap
from densenet_fast.ops.stage import (
    StageGradients,
    add_reader,
    affines,
    convolutions,
    global_count,
    global_sum,
    norm_gradients,
    synchronise,
    through_statistics,
    unpack,
)


class Input:
    """x [N, C, *spatial] of an op of one packed stage, as the kernels take it."""

    def __init__(self, x: Tensor, tensors: list[Tensor], eps: float) -> None:
        self.x = x
        (self.stage,) = unpack(tensors, [eps])
        self.backend = select(x.device, x.dtype)
        self.matrix, self.grid = to_matrix(x), (x.shape[0], *x.shape[2:])

    def convolution(self) -> tuple[Tensor, Tensor | None]:
        """The convolution's weight [C', C] and bias in x's dtype."""
        ((weight, bias),) = convolutions([self.stage], self.x.dtype)
        return weight.flatten(1), bias

    def statistics(self, group: str | None) -> Statistics:
        """Of the batch, [C] each; zeros if the stage is frozen."""
        own = empty_statistics(self.x, self.x.shape[1], self.stage.eps)
        if self.stage.frozen:
            own.mean.zero_(), own.var.zero_()
        else:
            self.backend.channel_statistics(self.matrix, own)
            synchronise(own, self.matrix.shape[0], group)
        return own

    def count(self, group: str | None) -> Tensor:
        """The number of rows that the statistics are over."""
        return global_count(self.matrix.shape[0], self.x, group)

    def affine(self, own: Statistics) -> Affine:
        """What normalises x."""
        return affines([self.stage], [own])[0][0]

    def saved(self, mean: Tensor, var: Tensor) -> Statistics:
        """What :meth:`statistics` returned, from what was saved of it."""
        return Statistics(mean, var, torch.rsqrt(var + self.stage.eps), self.stage.eps)

    def gradients(
        self,
        scaled: Tensor | None,
        sums: tuple[Tensor, Tensor] | None,
        gradients: StageGradients,
        own: Statistics,
        count: Tensor,
        group: str | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What a backward op returns, from scale * D, None where x needs no gradient, and (sum D, sum D * (x - mean)),
        None where neither x nor the normalisation does: (1) and (2)."""
        normalised = affines([self.stage], [own])
        gradients.sums = sums
        norm_gradients([gradients], [normalised[0][1]])
        if scaled is None:
            return self.x.new_empty(0), gradients.tensors(self.x)
        if not self.stage.frozen:
            p, q = torch.zeros_like(own.mean), torch.zeros_like(own.mean)
            add_reader(sums, through_statistics(normalised)[0], p, q)
            through = ThroughStatistics(self.matrix, own.mean, *global_sum(p, q, group), count)
            self.backend.finalise_gradient(scaled, through, scaled)
        return to_image(scaled, self.grid), gradients.tensors(self.x)


def fake_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count as :meth:`Input.statistics` returns them, without values."""
    vector = x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))
    return vector, torch.empty_like(vector), x.new_empty((), dtype=torch.float64)


def fake_gradients(x: Tensor, tensors: list[Tensor], needs: list[bool]) -> tuple[Tensor, list[Tensor]]:
    """What :meth:`Input.gradients` returns, without values."""
    grad_x = empty_image(x, (x.shape[0], *x.shape[2:]), x.shape[1]) if needs[0] else x.new_empty(0)
    return grad_x, [torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(tensors, needs[1:])]


def register_autograd(op: Any, backward_op: Any, run: Callable[..., Tensor]) -> None:
    """Autograd of ``op(x, tensors, eps, *options, group) -> (out, *saved)`` by
    ``backward_op(grad, x, *saved, tensors, eps, *options, group, needs) -> (x's gradient, the tensors')``.

    A derivative that must itself be differentiable goes through ``run(x, stage, *options)``, which is ``op`` on stock
    torch functions.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, tensors, ctx.eps, *ctx.options, ctx.group = inputs
        _, *saved = output
        ctx.saved = len(saved)
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *saved, *tensors)

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        saved, tensors = rest[: ctx.saved], rest[ctx.saved :]
        constants = [None] * (2 + len(ctx.options))
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
        if grad is None:
            return None, [None] * len(tensors), *constants
        if stock.needed_in_backward(grad):
            grad_x, *grads = stock.differentiable_gradients(
                lambda x, tensors: run(x, *unpack(tensors, [ctx.eps]), *ctx.options), x, tensors, grad, ctx.group
            )
        else:
            grad_x, grads = backward_op(grad, x, *saved, tensors, ctx.eps, *ctx.options, ctx.group, needs)
        gradients = [g if need else None for g, need in zip([grad_x, *grads], needs)]
        return gradients[0], gradients[1:], *constants

    register_vmap(backward_op)
    op.register_autograd(backward, setup_context=setup_context)
