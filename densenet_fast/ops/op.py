"""A custom op that is called without torch's dispatcher where nothing needs to see the call.

A compiler, a mode, a transform or a subclass of Tensor has to see it. For the hundreds of tensors of a block a call
through the dispatcher takes milliseconds: on a CPU as long as some of the kernels.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends.inputs import holds_others
from densenet_fast.backends.layout import CHANNELS_LAST, is_channels_last, to_image, to_matrix
from densenet_fast.ops import planned
from densenet_fast.ops.ahead import compile_ahead
from densenet_fast.ops.flops import of_stages
from densenet_fast.ops.stage import RequiringGrad, Stage, Stages, none_as_empty, without_autocast

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]


class Op:
    """``densenet_fast::<name>``, which computes what ``body`` does, in the dtypes it is given.

    ``inputs`` is a NamedTuple whose fields are the op's arguments. A list that the body returns may hold None; the
    dispatcher gets an empty tensor in its place.
    """

    def __init__(self, name: str, inputs: type[tuple[Any, ...]], body: Callable[[Any], tuple[Any, ...]]) -> None:
        self.name = f"densenet_fast::{name}"
        self.inputs = inputs
        self.body = without_autocast(lambda *values: body(inputs(*values)))

        def complete(*values: Any, **by_name: Any) -> tuple[Any, ...]:
            values = inputs(*values, **by_name)
            empty = values[0].new_empty
            return tuple(
                [empty(0) if t is None else t for t in output] if isinstance(output, list) else output
                for output in self.body(*values)
            )

        complete.__signature__ = _signature(inputs, body)
        complete.__doc__ = body.__doc__
        self.custom_op = torch.library.custom_op(self.name, complete, mutates_args=())

    def __call__(self, *inputs: Any) -> Any:
        if seen_by_dispatcher(inputs):
            return self.custom_op(*(none_as_empty(v, inputs[0]) if isinstance(v, list) else v for v in inputs))
        with named(self.name, inputs[0]):
            return planned.run(self.name, self.body, inputs)

    def fake(self, function: Callable[[Any], tuple[Any, ...]]) -> None:
        """Decorates the op's fake kernel: a function of the same inputs that returns tensors without values."""
        self.custom_op.register_fake(lambda *values, **by_name: function(self.inputs(*values, **by_name)))


def _signature(inputs: type[tuple[Any, ...]], body: Callable[[Any], tuple[Any, ...]]) -> inspect.Signature:
    """The signature of a function whose arguments are the fields of ``inputs``. Torch makes the op's schema from it."""
    defaults = inputs._field_defaults
    parameters = [
        inspect.Parameter(
            field,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=defaults.get(field, inspect.Parameter.empty),
            annotation=annotation,
        )
        for field, annotation in inputs.__annotations__.items()
    ]
    return inspect.Signature(parameters, return_annotation=inspect.signature(body).return_annotation)


class Parts(NamedTuple):
    """The op of a function, the op of its backward pass, and the same function in stock differentiable torch
    functions."""

    forward: Op
    backward: Op
    on_stock: Callable[..., Any]


def define(name: str, inputs: type[tuple[Any, ...]]) -> Callable[[Callable[[Any], tuple[Any, ...]]], Op]:
    """Decorates the body of the op ``densenet_fast::<name>``, whose arguments are the fields of ``inputs``."""
    return functools.partial(Op, name, inputs)


def named(name: str, x: Tensor, *flops: Callable[[], int]) -> contextlib.AbstractContextManager[Any]:
    """Shows what runs meanwhile on x to the profiler, if one is active, as one operation with the sum of its
    ``flops``."""
    if not torch.autograd._profiler_enabled():
        return contextlib.nullcontext()
    return torch._C._profiler._RecordFunctionFast(name, [x], {"flops": sum(count() for count in flops)})


def direct_call(function: type[torch.autograd.Function], op: str) -> Callable[..., Any]:
    """Returns the ``apply`` of an autograd Function without its support for torch.func, for calls that no transform
    sees.

    In graphs of autograd the call is named after the op: DenseBlock for densenet_fast::dense_block, and
    DenseBlockBackward.
    """
    words = op.partition("::")[2].replace(", ", "_and_").split("_")
    shown = type(function)("".join(map(str.capitalize, words)), (function,), {})
    return super(torch.autograd.Function, shown).apply


def seen_by_dispatcher(inputs: Sequence[Any]) -> bool:
    """Whether a call with ``inputs`` must go through torch's dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or holds_others(inputs)
    )


def saved_tensors_are_looked_at() -> bool:
    """Whether hooks see the tensors that are saved for the backward pass. Those of checkpointing count them."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def with_autograd(
    op: Op,
    save: Callable[[Any, tuple[Any, ...], tuple[Any, ...]], None],
    gradients: Callable[..., Gradients],
    shown: Callable[[tuple[Any, ...]], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """Makes a differentiable function ``call(x, mean, var, stages, *constants)`` of an op.

    The op takes ``(x, mean, var, tensors, eps, *constants)``: a feature map, its batch statistics or None, flattened
    stages, and arguments that have no gradient. The function returns the op's outputs. If the op returns more than
    tensors, ``shown`` makes two tuples of its outputs: those that are differentiable, and those that are not.

    ``save(ctx, inputs, outputs)`` keeps what the backward pass needs. ``gradients(ctx, needs, *grads)`` returns the
    gradients of x, of mean and var, and of the tensors. ``needs`` has an entry for x, one for mean and var, and one per
    tensor.
    """

    class Direct(torch.autograd.Function):
        """The op's body with autograd.

        ``inputs`` are the op's. Autograd does not look into a tuple, so x, mean, var and the tensors that require a
        gradient are passed once more by themselves.
        """

        @staticmethod
        def forward(
            ctx: Any, inputs: tuple[Any, ...], required: RequiringGrad, *_: Tensor | None
        ) -> tuple[Tensor, ...]:
            with named(op.name, inputs[0], lambda: of_stages(inputs[0], inputs[3])):
                outputs = planned.run(op.name, op.body, inputs)
            ctx.required = required
            ctx.channels_last = is_channels_last(inputs[0])
            save(ctx, inputs, outputs)
            if shown is None:
                return outputs
            differentiable, others = shown(outputs)
            ctx.mark_non_differentiable(*others)
            return *differentiable, *others

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needs = ctx.required.needs(ctx.needs_input_grad[2:])
            grad_x, *statistics, rest = gradients(ctx, needs, with_unit_channel_stride(grads[0]), *grads[1:])
            return (
                None,
                None,
                in_format(grad_x, ctx),
                *statistics,
                *ctx.required.of_those(rest),
            )

    apply = direct_call(Direct, op.name)
    arguments = op.custom_op._opoverload._schema.arguments[4:]
    tensor_lists = [str(argument.type) == "List[Tensor]" for argument in arguments]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.channels_last = is_channels_last(inputs[0])
        ctx.constants = [[None] * len(c) if listed else None for c, listed in zip(inputs[4:], tensor_lists)]
        save(ctx, inputs, output)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, mean, _, tensors, *given = ctx.needs_input_grad  # without defaults, which the dispatcher leaves out
        grad_x, *statistics, rest = gradients(ctx, [x, mean, *tensors], *grads)
        rest = [g if need else None for g, need in zip(rest, tensors)]
        return in_format(grad_x, ctx), *statistics, rest, *ctx.constants[: len(given)]

    op.custom_op.register_autograd(backward, setup_context=setup_context)

    def call(
        x: Tensor, mean: Tensor | None, var: Tensor | None, stages: Sequence[Stage], *constants: Any
    ) -> tuple[Tensor, ...]:
        stages = stages if isinstance(stages, Stages) else Stages(stages)
        inputs = (x, mean, var, stages.tensors, stages.eps, *constants)
        if seen_by_dispatcher(inputs):
            plain = [[*c] if isinstance(c, list) else c for c in constants]
            outputs = op.custom_op(x, mean, var, none_as_empty(stages.tensors, x), [*stages.eps], *plain)
            return outputs if shown is None else tuple(chain(*shown(outputs)))
        compile_ahead(call, x, mean, var, stages, *constants)
        required = stages.requiring_grad()
        return apply(inputs, required, x, mean, var, *required.tensors)

    return call


def with_unit_channel_stride(grad: Tensor | None) -> Tensor | None:
    """Returns an incoming gradient with a channel stride of 1, which all bodies expect.

    The copy is made here, outside of launch plans. A gradient that is itself differentiated, or that is a batch of
    gradients, stays as it is.
    """
    if grad is None or grad.stride(1) == 1 or torch.is_grad_enabled() or _is_batched(grad):
        return grad
    return to_image(to_matrix(grad), (grad.shape[0], *grad.shape[2:]))


def in_format(grad_x: Tensor | None, ctx: Any) -> Tensor | None:
    """The gradient of x in the memory format of x."""
    if grad_x is None or (ctx.channels_last and _is_batched(grad_x)):
        return grad_x
    return grad_x.contiguous(
        memory_format=CHANNELS_LAST[grad_x.dim()] if ctx.channels_last else torch.contiguous_format
    )


def _is_batched(grad: Tensor) -> bool:
    """Whether ``grad`` is a batch of gradients, for which torch knows no memory format."""
    return torch._C._functorch.is_batchedtensor(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)
