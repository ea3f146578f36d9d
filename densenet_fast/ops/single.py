"""What the ops of a single stage share: their input, its batch statistics, the gradients behind them, autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.affine import ThroughStatistics, accumulation_dtype
from densenet_fast.backends.layout import empty_image, to_image, to_matrix
from densenet_fast.ops import stock
from densenet_fast.ops.batching import register_vmap
from densenet_fast.ops.stage import (
    StageGradients,
    global_count,
    global_statistics,
    global_sum,
    statistics_gradient,
    unpack,
)


class Input:
    """x [N, C, *spatial] of an op of one packed stage, as the kernels take it."""

    def __init__(self, x: Tensor, tensors: list[Tensor], eps: float) -> None:
        self.x = x
        (self.stage,) = unpack(tensors, [eps])
        self.backend = select(x.device, x.dtype)
        self.matrix, self.grid = to_matrix(x), (x.shape[0], *x.shape[2:])

    def statistics(self, group: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [C] and variance [C] of the batch (zeros if the stage is frozen), and the count [] of its rows."""
        count = global_count(self.matrix.shape[0], self.x, group)
        if self.stage.frozen:
            mean = self.matrix.new_zeros(self.x.shape[1], dtype=accumulation_dtype(self.x.dtype))
            return mean, mean.clone(), count
        mean, var = global_statistics(self.backend.channel_statistics(self.matrix), self.matrix.shape[0], group)
        return mean, var, count

    def gradients(
        self,
        scaled: Tensor | None,
        sums: tuple[Tensor, Tensor] | None,
        gradients: StageGradients,
        statistics: tuple[Tensor, Tensor, Tensor],
        group: str | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """What a backward op returns, from scale * D, None where x needs no gradient, and (sum D, sum D * (x - mean)),
        None where neither x nor the normalisation does: (1) and (2)."""
        mean, var, count = statistics
        affine, r = self.stage.fold(mean, var)
        if sums is not None:
            gradients.norm(sums, r)
        if scaled is None:
            return self.x.new_empty(0), gradients.tensors(self.x)
        if not self.stage.frozen:
            p, q = global_sum(*statistics_gradient(sums, affine.scale, r), group)
            through = ThroughStatistics(self.matrix, mean, p, q, count)
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
