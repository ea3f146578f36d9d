"""A dense block and the transition or the head behind it as one node of autograd and one launch plan.

The bodies of the two ops run one after the other, forward and backward, so the results are theirs. The block's features
stay between them. The gradient of the features does too, and the block's backward pass uses its memory for G. On a GPU
the host spends as much time on the call of an op as on dozens of launches; a chain spares half of the calls.
"""

from collections.abc import Callable, Sequence
from itertools import compress
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.contract import Backend
from densenet_fast.backends.layout import is_channels_last, to_matrix
from densenet_fast.backends.optional import BlockAndReader
from densenet_fast.ops import planned, stock
from densenet_fast.ops.ahead import compile_ahead
from densenet_fast.ops.block_plan import BlockTensors, Plan, own_features, plan_of
from densenet_fast.ops.bn_relu_conv1x1 import parts as transition_parts
from densenet_fast.ops.bn_relu_global_avgpool import parts as head_parts
from densenet_fast.ops.dense_block import parts as block_parts
from densenet_fast.ops.dense_block_backward import consuming_backward
from densenet_fast.ops.flops import of_stages
from densenet_fast.ops.op import Parts, direct_call, in_format, named, seen_by_dispatcher, with_unit_channel_stride
from densenet_fast.ops.stage import RequiringGrad, Stage, Stages, global_count, save_stages, saved_stages, unflatten

__all__ = ["HEAD", "TRANSITION", "Call"]


class Inputs(NamedTuple):
    """The arguments of a chain's forward pass.

    They are those of the block's op without masks and group, then those of the reader's op without the features.
    ``return_statistics`` says whether the reader gets the statistics of the features. ``options`` are the reader's own.
    """

    x: Tensor
    mean: Tensor | None
    var: Tensor | None
    tensors: list[Tensor]
    eps: list[float]
    drop_rates: list[float]
    bottleneck: bool
    saved: list[bool]
    return_statistics: bool
    prepend: bool
    read_tensors: list[Tensor]
    read_eps: list[float]
    options: tuple[Any, ...]


class BackwardInputs(NamedTuple):
    """The arguments of a chain's backward pass.

    They are the gradient of the reader's result; what the block's op returned and took, with the gradients that it
    ``needs`` (of x, of its statistics, of each tensor); and the same for the reader.
    """

    grad: Tensor
    features: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor
    bottlenecks: list[Tensor]
    saved: list[bool]
    tensors: list[Tensor]
    eps: list[float]
    drop_rates: list[float]
    bottleneck: bool
    in_channels: int
    needs: list[bool]
    prepend: bool
    read_mean: Tensor
    read_var: Tensor
    read_count: Tensor
    read_tensors: list[Tensor]
    read_eps: list[float]
    options: tuple[Any, ...]
    read_needs: list[bool]


class Call(NamedTuple):
    """The arguments of a chain: those of :class:`Inputs`, but with both ops' stages as they are, and with the
    ``x_stand_in``."""

    x: Tensor
    mean: Tensor | None
    var: Tensor | None
    stages: Sequence[Stage]
    drop_rates: Sequence[float]
    bottleneck: bool
    saved: Sequence[bool]
    return_statistics: bool
    prepend: bool
    x_stand_in: Tensor | None
    read_stages: Sequence[Stage]
    options: tuple[Any, ...]


class Whole:
    """A chain that the ``backend`` runs in one call: ``block`` and ``reader`` are the tensors of the two ops."""

    def __init__(self, backend: Backend, plan: Plan, given: Inputs) -> None:
        self.backend, self.grid, self.block = backend, plan.grid, plan.block_tensors
        self.reader = BlockTensors.of(given.read_tensors, given.read_eps)
        self._given = given.tensors, given.read_tensors

    @classmethod
    def of(cls, x: Tensor, given: Inputs) -> "Whole | None":
        """The chain for x, or None where no backend runs it in one call, and where a profiler is to see both ops."""
        backend, grid = select(x.device, x.dtype), (x.shape[0], *x.shape[2:])
        if not backend.runs_whole_blocks(grid) or torch.autograd._profiler_enabled():
            return None
        options = (given.eps, given.bottleneck, given.drop_rates, given.return_statistics, given.prepend)
        plan = plan_of(x, given.tensors, *options)
        whole = cls(backend, plan, given) if plan.runs_whole_on(backend, x.dtype, None) else None
        return whole if whole is not None and whole.reader.fits(x.dtype) else None

    def serves(self, given: BackwardInputs) -> bool:
        """Whether the tensors are still as they were, and all gradients are needed that it computes."""
        dtype, needs = given.features.dtype, (given.needs[0], *given.needs[2:], *given.read_needs[2:])
        return (
            given.tensors is self._given[0]
            and given.read_tensors is self._given[1]
            and self.block.fits(dtype)
            and self.reader.fits(dtype)
            and all(compress(needs, (True, *self.block.is_trained, *self.reader.is_trained)))
            and not torch.autograd._profiler_enabled()
        )

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """What :meth:`Chain.forward` does."""
        given = Inputs(*inputs)
        x, wanted = given.x, bool(given.options) and given.options[1]  # the head has no options, and no statistics
        features, mean, var, bottlenecks, out, *own = self.backend.dense_block_and_reader(
            to_matrix(x), given.mean, given.var, self._parts(given), return_statistics=wanted
        )
        columns, count = features.shape[1], global_count(0, x, None)
        return features, mean, var, count, bottlenecks, out, mean[:columns], var[:columns], count, *own

    def backward(self, given: BackwardInputs) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """What :meth:`Chain.backward` does."""
        statistics = (given.mean, given.var, given.bottlenecks)
        grad_x, grads, read_grads = self.backend.dense_block_and_reader_backward(
            to_matrix(given.grad), to_matrix(given.features), *statistics, given.in_channels, self._parts(given)
        )
        return grad_x, self.block.gradients(grads), self.reader.gradients(read_grads)

    def _parts(self, given: Inputs | BackwardInputs) -> BlockAndReader:
        options = (given.eps, self.grid, given.saved, given.prepend)
        return BlockAndReader(self.block.present, self.block.places, *options, self.reader.tensors, *given.read_eps)


class Chain:
    """A dense block and the op of its ``reader``, which has one stage."""

    def __init__(self, reader: Parts) -> None:
        self.name = f"{block_parts.forward.name}, {reader.forward.name.partition('::')[2]}"
        self.reader = reader
        self.apply = direct_call(_Node, self.name)

    def __call__(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Takes the fields of a :class:`Call`. Returns the reader's result, the block's packed mean and variance and
        its count, and then all else that the reader's op returns."""
        compile_ahead(self, *arguments)
        call = Call(*arguments)
        stages, read_stages = (s if isinstance(s, Stages) else Stages(s) for s in (call.stages, call.read_stages))
        block = (call.drop_rates, call.bottleneck, call.saved, call.return_statistics, call.prepend)
        read = (read_stages.tensors, read_stages.eps, call.options)
        inputs = Inputs(call.x, call.mean, call.var, stages.tensors, stages.eps, *block, *read)
        required = stages.requiring_grad(), read_stages.requiring_grad()
        seen = (call.x, call.mean, call.var, *required[0].tensors, *required[1].tensors)
        return self.apply(self, inputs, (*required, call.x_stand_in), *seen)

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        """Takes the fields of :class:`Inputs`. Returns what the block's op returns, then what the reader's op
        returns."""
        given = Inputs(*inputs)
        x, tensors, return_statistics = given.x, given.tensors, given.return_statistics
        block = (tensors, given.eps, [], given.drop_rates, given.bottleneck, given.saved, return_statistics, None, None)
        with named(block_parts.forward.name, x, lambda: of_stages(x, tensors)):
            features, mean, var, count, bottlenecks = block_parts.forward.body(
                x, given.mean, given.var, *block, given.prepend
            )
        columns = slice(0, features.shape[1])
        known = (mean[columns], var[columns]) if return_statistics else (None, None)
        with named(self.reader.forward.name, features, lambda: of_stages(features, given.read_tensors)):
            read = (given.read_tensors, given.read_eps, *given.options, None)
            made = self.reader.forward.body(features, *known, *read)
        return features, mean, var, count, bottlenecks, *made

    def backward(self, *inputs: Any, seen: bool = False) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """Takes the fields of :class:`BackwardInputs`. Returns the gradients of x, of the block's tensors and of the
        reader's. ``seen`` says whether the dispatcher has to see the two ops."""
        given = BackwardInputs(*inputs)
        features, read_tensors, needs = given.features, given.read_tensors, given.needs
        known = (features, given.read_mean, given.read_var, given.read_count, read_tensors, given.read_eps)
        with named(self.reader.backward.name, given.grad):
            read = self.reader.backward if seen else self.reader.backward.body
            grad, grads = read(given.grad, *known, *given.options, None, given.read_needs)
        own, through = grads[: len(read_tensors)], grads[len(read_tensors) :] or (None, None)
        if not given.read_needs[0]:
            return features.new_empty(0), [None] * len(given.tensors), own
        block = (features, given.mean, given.var, given.count, given.bottlenecks, given.saved, given.tensors, given.eps)
        block += ([], given.drop_rates, given.bottleneck, given.in_channels, None, [needs[0], *needs[2:]])
        with named(block_parts.backward.name, grad):
            run = block_parts.backward if seen else consuming_backward
            grad_x, grads = run(grad, *through, *block, given.prepend)
        return grad_x, grads, own

    def on_stock(self, given: Inputs, value: Tensor, has_stand_in: bool, size: int) -> Callable[..., list[Tensor]]:
        """Returns a function of x and of both ops' tensors that computes the reader's result with stock torch
        functions.

        The block's tensors come first; there are ``size`` of them. If x ``has_stand_in``, the function takes that
        instead of x, and adds it to the ``value`` of x.
        """

        def run(x: Tensor, *tensors: Tensor | None) -> list[Tensor]:
            x = value + x if has_stand_in else value
            plan = Plan(x, tensors[:size], given.eps, given.bottleneck, given.drop_rates)
            made = block_parts.on_stock(x, plan.layers, [], given.drop_rates, given.prepend)
            return [self.reader.on_stock(made, None, None, *unflatten(tensors[size:], given.read_eps), *given.options)]

        return run


class _Node(torch.autograd.Function):
    """A chain with autograd.

    ``given`` are the inputs of its forward pass. Autograd does not look into a tuple, so x, mean, var and the tensors
    that require a gradient are passed once more by themselves. What is ``hidden`` autograd does not see.
    """

    @staticmethod
    def forward(
        ctx: Any, chain: Chain, given: Inputs, hidden: tuple[RequiringGrad, RequiringGrad, Tensor | None], *_: Any
    ) -> tuple[Tensor, ...]:
        x, tensors, read_tensors = given.x, given.tensors, given.read_tensors
        ctx.whole = Whole.of(x, given)
        forward = chain.forward if ctx.whole is None else ctx.whole.forward
        with named(chain.name, x, lambda: of_stages(x, tensors), lambda: of_stages(x, read_tensors)):
            made = planned.run(chain.name, forward, given)
        features, mean, var, count, bottlenecks, out, *read = made
        *ctx.required, x_stand_in = hidden
        ctx.chain, ctx.channels_last, ctx.in_channels = chain, is_channels_last(x), x.shape[1]
        ctx.given = given._replace(x=None, mean=None, var=None, tensors=None, read_tensors=None)
        ctx.block, ctx.reader = SimpleNamespace(), SimpleNamespace()
        stages, behind = save_stages(ctx.block, tensors), save_stages(ctx.reader, read_tensors)
        ctx.sizes = len(stages), len(bottlenecks)
        ctx.mark_non_differentiable(mean, var, count, *read)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(features, mean, var, count, x_stand_in, *read[:3], *stages, *bottlenecks, *behind)
        return out, mean, var, count, *read

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        features, mean, var, count, x_stand_in, *rest = ctx.saved_tensors
        given: Inputs = ctx.given
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        read, rest = rest[:3], rest[3:]
        first, second = ctx.sizes[0], sum(ctx.sizes)
        tensors, bottlenecks = saved_stages(ctx.block, rest[:first]), rest[first:second]
        read_tensors = saved_stages(ctx.reader, rest[second:])
        required, behind = ctx.required
        if stock.needed_in_backward(grad):
            value = own_features(features.detach(), ctx.in_channels, given.prepend)
            run = ctx.chain.on_stock(given, value, x_stand_in is not None, len(tensors))
            inputs = [value if x_stand_in is None else x_stand_in, *tensors, *read_tensors]
            grad_x, *grads = stock.differentiable_gradients(run, inputs, [grad], None)
            grads, read_grads = grads[: len(tensors)], grads[len(tensors) :]
        else:
            flags = ctx.needs_input_grad[3:]
            middle = 3 + len(required.tensors)
            needs = required.needs(flags[:middle])
            needed = any(flags[:middle])
            read_needs = behind.needs((needed, needed and given.return_statistics, False, *flags[middle:]))
            inputs = BackwardInputs(
                with_unit_channel_stride(grad),
                features,
                mean,
                var,
                count,
                bottlenecks,
                given.saved,
                tensors,
                given.eps,
                given.drop_rates,
                given.bottleneck,
                ctx.in_channels,
                needs,
                given.prepend,
                *read,
                read_tensors=read_tensors,
                read_eps=given.read_eps,
                options=given.options,
                read_needs=read_needs,
            )
            name = f"{ctx.chain.name}_backward"
            with named(name, grad):
                if seen_by_dispatcher([grad]):
                    grad_x, grads, read_grads = ctx.chain.backward(*inputs, seen=True)
                elif ctx.whole is not None and ctx.whole.serves(inputs):
                    grad_x, grads, read_grads = ctx.whole.backward(inputs)
                else:
                    grad_x, grads, read_grads = planned.run(name, ctx.chain.backward, inputs)
            if not needs[0]:
                grad_x = None
        chosen = (*required.of_those(grads), *behind.of_those(read_grads))
        return None, None, None, in_format(grad_x, ctx), None, None, *chosen


TRANSITION, HEAD = Chain(transition_parts), Chain(head_parts)
