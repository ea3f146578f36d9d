"""A dense block and the transition or the head behind it as one node of autograd and one launch plan.

On a GPU the host spends as much on calling an op as on dozens of launches. Computed is what the two ops compute; their
bodies run one after the other, forward and backward, and the block's features stay between them. So does the gradient
of the features, whose memory the block's backward pass uses for G.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends.layout import is_channels_last
from densenet_fast.ops import planned, stock
from densenet_fast.ops.ahead import compile_ahead
from densenet_fast.ops.block_plan import Plan, own_features
from densenet_fast.ops.bn_relu_conv1x1 import parts as transition_parts
from densenet_fast.ops.bn_relu_global_avgpool import parts as head_parts
from densenet_fast.ops.dense_block import consuming_backward
from densenet_fast.ops.dense_block import parts as block_parts
from densenet_fast.ops.flops import of_stages
from densenet_fast.ops.op import Parts, channels_adjacent, direct_call, in_format, named, seen_by_dispatcher
from densenet_fast.ops.stage import Followed, Stage, Stages, save_stages, saved_stages, unflatten

__all__ = ["HEAD", "TRANSITION"]


class Chain:
    """A dense block with the op of the ``reader`` behind it, of one stage."""

    def __init__(self, reader: Parts) -> None:
        self.name = f"{block_parts.forward.name}, {reader.forward.name.partition('::')[2]}"
        self.reader = reader
        self.apply = direct_call(_Node, self.name)

    def __call__(
        self,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        stages: Sequence[Stage],
        drop_rates: Sequence[float],
        bottleneck: bool,
        saved: Sequence[bool],
        described: bool,
        prepend: bool,
        link: Tensor | None,
        read_stages: Sequence[Stage],
        *options: Any,
    ) -> tuple[Tensor, ...]:
        """From what the block's op takes, without masks and group, and what the reader's takes beside the features,
        which are ``described`` to it or not: the reader's result; the block's packed mean and variance, and its count;
        and all else that the reader's op returns."""
        given = (x, mean, var, stages, drop_rates, bottleneck, saved, described, prepend, link, read_stages, *options)
        compile_ahead(self, *given)
        stages, read_stages = (s if isinstance(s, Stages) else Stages(s) for s in (stages, read_stages))
        inputs = (x, mean, var, stages.tensors, stages.eps, drop_rates, bottleneck, saved, described, prepend)
        inputs += (read_stages.tensors, read_stages.eps, *options)
        followed, read = stages.followed(), read_stages.followed()
        return self.apply(self, inputs, (followed, read, link), x, mean, var, *followed.tensors, *read.tensors)

    def forward(
        self,
        x: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        tensors: list[Tensor],
        eps: list[float],
        drop_rates: list[float],
        bottleneck: bool,
        saved: list[bool],
        described: bool,
        prepend: bool,
        read_tensors: list[Tensor],
        read_eps: list[float],
        *options: Any,
    ) -> tuple[Any, ...]:
        """What the block returns and what the reader does."""
        given = (tensors, eps, [], drop_rates, bottleneck, saved, described, None, None, prepend)
        with named(block_parts.forward.name, x, lambda: of_stages(x, tensors)):
            features, packed_mean, packed_var, count, bottlenecks = block_parts.forward.body(x, mean, var, *given)
        columns = slice(0, features.shape[1])
        known = (packed_mean[columns], packed_var[columns]) if described else (None, None)
        with named(self.reader.forward.name, features, lambda: of_stages(features, read_tensors)):
            made = self.reader.forward.body(features, *known, read_tensors, read_eps, *options, None)
        return features, packed_mean, packed_var, count, bottlenecks, *made

    def backward(
        self,
        grad: Tensor,
        features: Tensor,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        bottlenecks: list[Tensor],
        saved: list[bool],
        tensors: list[Tensor],
        eps: list[float],
        drop_rates: list[float],
        bottleneck: bool,
        in_channels: int,
        needs: list[bool],
        prepend: bool,
        read_mean: Tensor,
        read_var: Tensor,
        read_count: Tensor,
        read_tensors: list[Tensor],
        read_eps: list[float],
        *options: Any,
        seen: bool = False,
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """The gradients of x, of the block's tensors and of the reader's, as far as ``needs`` (x's, its statistics',
        then one per tensor) and the last of the options, the reader's, say so. Both ops are ``seen`` by the dispatcher
        or not."""
        *options, read_needs = options
        known = (features, read_mean, read_var, read_count, read_tensors, read_eps)
        with named(self.reader.backward.name, grad):
            read = self.reader.backward if seen else self.reader.backward.body
            grad, grads = read(grad, *known, *options, None, read_needs)
        own, through = grads[: len(read_tensors)], grads[len(read_tensors) :] or (None, None)
        if not read_needs[0]:
            return features.new_empty(0), [None] * len(tensors), own
        block = (features, mean, var, count, bottlenecks, saved, tensors, eps, [], drop_rates, bottleneck)
        block += (in_channels, None, [needs[0], *needs[2:]], prepend)
        with named(block_parts.backward.name, grad):
            run = block_parts.backward if seen else consuming_backward
            grad_x, grads = run(grad, *through, *block)
        return grad_x, grads, own

    def on_stock(self, ctx: Any, value: Tensor, linked: bool, size: int) -> Callable[..., list[Tensor]]:
        """The reader's result from x, or where it is ``linked`` what is added to its ``value``, and from the tensors of
        both, the block's ``size`` first."""

        def run(x: Tensor, *tensors: Tensor | None) -> list[Tensor]:
            x = value + x if linked else value
            plan = Plan(x, tensors[:size], ctx.eps, ctx.bottleneck, ctx.drop_rates)
            made = block_parts.on_stock(x, plan.layers, [], ctx.drop_rates, ctx.prepend)
            return [self.reader.on_stock(made, None, None, *unflatten(tensors[size:], ctx.read_eps), *ctx.options)]

        return run


class _Node(torch.autograd.Function):
    """A chain with autograd. ``inputs`` are its forward pass's; x, mean and var and those of its tensors that autograd
    follows come again, for autograd to see; what is ``hidden`` it does not see."""

    @staticmethod
    def forward(
        ctx: Any, chain: Chain, inputs: tuple[Any, ...], hidden: tuple[Followed, Followed, Tensor | None], *_: Any
    ) -> tuple[Tensor, ...]:
        x, _, _, tensors, ctx.eps, ctx.drop_rates, ctx.bottleneck, ctx.saved, ctx.described, ctx.prepend, *rest = inputs
        read_tensors, ctx.read_eps, *ctx.options = rest
        with named(chain.name, x, lambda: of_stages(x, tensors), lambda: of_stages(x, read_tensors)):
            made = planned.run(chain.name, chain.forward, inputs)
        features, mean, var, count, bottlenecks, out, *read = made
        *ctx.followed, link = hidden
        ctx.chain, ctx.channels_last, ctx.in_channels = chain, is_channels_last(x), x.shape[1]
        ctx.block, ctx.reader = SimpleNamespace(), SimpleNamespace()
        stages, behind = save_stages(ctx.block, tensors), save_stages(ctx.reader, read_tensors)
        ctx.sizes = len(stages), len(bottlenecks)
        ctx.mark_non_differentiable(mean, var, count, *read)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, mean, var, count, link, *read[:3], *stages, *bottlenecks, *behind)
        return out, mean, var, count, *read

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        features, mean, var, count, link, *rest = ctx.saved_tensors
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        read, rest = rest[:3], rest[3:]
        first, second = ctx.sizes[0], sum(ctx.sizes)
        tensors, bottlenecks = saved_stages(ctx.block, rest[:first]), rest[first:second]
        read_tensors = saved_stages(ctx.reader, rest[second:])
        followed, behind = ctx.followed
        if stock.needed_in_backward(grad):
            value = own_features(features.detach(), ctx.in_channels, ctx.prepend)
            run = ctx.chain.on_stock(ctx, value, link is not None, len(tensors))
            inputs = [value if link is None else link, *tensors, *read_tensors]
            grad_x, *grads = stock.differentiable_gradients(run, inputs, [grad], None)
            grads, read_grads = grads[: len(tensors)], grads[len(tensors) :]
        else:
            flags = ctx.needs_input_grad[3:]
            middle = 3 + len(followed.tensors)
            needs = followed.needs(flags[:middle])
            needed = any(flags[:middle])
            read_needs = behind.needs((needed, needed and ctx.described, False, *flags[middle:]))
            block = (features, mean, var, count, bottlenecks, ctx.saved, tensors, ctx.eps, ctx.drop_rates)
            block += (ctx.bottleneck, ctx.in_channels, needs, ctx.prepend)
            inputs = (channels_adjacent(grad), *block, *read, read_tensors, ctx.read_eps, *ctx.options, read_needs)
            name = f"{ctx.chain.name}_backward"
            with named(name, grad):
                if seen_by_dispatcher([grad]):
                    grad_x, grads, read_grads = ctx.chain.backward(*inputs, seen=True)
                else:
                    grad_x, grads, read_grads = planned.run(name, ctx.chain.backward, inputs)
            if not needs[0]:
                grad_x = None
        return None, None, None, in_format(grad_x, ctx), None, None, *followed.chosen(grads), *behind.chosen(read_grads)


TRANSITION, HEAD = Chain(transition_parts), Chain(head_parts)
