"""The floating-point operations of the ops, for torch's counters.

As torch does for its own ops, a convolution is counted by its definition, with two operations per product. What minimal
filtering or pooling first saves is not subtracted. Recomputed bottlenecks count again.
"""

import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from densenet_fast.ops.stage import STAGE_TENSORS

__all__ = ["add_flops", "of_convolutions", "of_stages", "register"]

COUNTER = "torch.utils.flop_counter"
CONV_WEIGHT = 4
"""The place of the convolution's weight among a stage's tensors."""


def of_convolutions(positions: int, weights: Iterable[Tensor | None]) -> int:
    """The operations of convolutions with these ``weights``, at so many positions of their outputs."""
    return 2 * positions * sum(weight.numel() for weight in weights if weight is not None)


def of_stages(x: Tensor, tensors: Sequence[Tensor | None]) -> int:
    """The operations of flattened stages' convolutions, at the positions of x [N, C, *spatial]."""
    return of_convolutions(_positions(x), tensors[CONV_WEIGHT::STAGE_TENSORS])


def _positions(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _forward(x: Tensor, mean: Any, var: Any, tensors: Sequence[Tensor], *others: Any, out_val: Any = None) -> int:
    return of_stages(x, tensors)


def _by_name(op: str, given: Sequence[Any]) -> dict[str, Any]:
    """The arguments of a call of the op, by the names in its schema."""
    schema = getattr(torch.ops.densenet_fast, op).default._schema
    return dict(zip((argument.name for argument in schema.arguments), given))


def _conv1x1_backward(*given: Any, out_val: Any = None) -> int:
    call = _by_name("bn_relu_conv1x1_backward", given)
    needs = call["needs"]
    return _backward(call["x"], call["tensors"], needs[0] or needs[1], needs[2:])


def _dense_block_backward(*given: Any, out_val: Any = None) -> int:
    call = _by_name("dense_block_backward", given)
    features, tensors, needs = call["features"], call["tensors"], call["needs"]
    per_layer = 2 * STAGE_TENSORS
    recomputed = [
        tensors[i * per_layer + CONV_WEIGHT]
        for i, kept in enumerate(call["saved"] if call["bottleneck"] else ())
        if not kept and any(needs[: 1 + (i + 1) * per_layer])
    ]
    return of_convolutions(_positions(features), recomputed) + _backward(features, tensors, needs[0], needs[1:])


def _backward(x: Tensor, tensors: Sequence[Tensor], need_input: bool, needs: Sequence[bool]) -> int:
    """The operations of the gradients: of the weights, and of a convolution's input where something before it needs
    one."""
    total = 0
    for i in range(CONV_WEIGHT, len(tensors), STAGE_TENSORS):
        asked = need_input or any(needs[:i])
        total += (asked + needs[i]) * of_convolutions(_positions(x), [tensors[i]])
    return total


FORMULAS = {
    "dense_block": _forward,
    "dense_block_backward": _dense_block_backward,
    "bn_relu_conv1x1": _forward,
    "bn_relu_conv1x1_backward": _conv1x1_backward,
}


class _Registering:
    """Registers the formulas when torch's counter is first imported. That module imports Triton, so this package does
    not import it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == COUNTER else None
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Makes ``torch.utils.flop_counter`` count the ops, now or when it is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _Registering())


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.densenet_fast, name), get_raw=True)(formula)


def add_flops(profile: Any) -> None:
    """Adds the ops to the FLOPs that ``torch.profiler`` counted with ``with_flops=True``.

    The profiler knows seven of torch's operations by name, and no others can be added to it. Here each op counts what
    its convolutions do in the forward pass; what torch counted inside the op is left out. Backward passes count
    nothing, as the profiler counts nothing for those of convolutions.

    Args:
        profile: a ``torch.profiler.profile`` that has ended.

    Raises:
        TypeError: ``profile`` is not such an object.
        ValueError: it has not ended, or was made without ``with_flops``.
    """
    if not isinstance(profile, torch.profiler.profile | torch.autograd.profiler.profile):
        raise TypeError(f"profile: expected a torch.profiler.profile that has ended, got {type(profile).__name__}")
    inner = getattr(profile, "profiler", profile)
    if inner is None or inner.kineto_results is None:
        raise ValueError("profile: expected one that has ended, got one that has not")
    if not inner.with_flops:
        raise ValueError("profile: expected with_flops=True, got False")
    own = [event for event in profile.events() if _is_counted(event)]
    for event in own:
        _leave_out([event])
    for event in own:
        if not any(map(_is_counted, event.cpu_children)):  # two ops that run as one, each of which counts itself
            event.flops = event.kwinputs["flops"]


def _is_counted(event: Any) -> bool:
    return event.name.startswith("densenet_fast::") and "flops" in event.kwinputs


def _leave_out(events: Iterable[Any]) -> None:
    for event in events:
        event.flops = 0
        _leave_out(event.cpu_children)
