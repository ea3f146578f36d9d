"""Plans against walks: ops on CPU tensors that run by their plans, launch by launch, in Triton's interpreter and the
emulation of CUDA C++, and that take no plan for inputs of another kind."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from backends.plan.bodies import equal
from densenet_fast import DenseNet
from densenet_fast.backends import plan
from densenet_fast.backends.recording import replaced, tensors_in
from densenet_fast.backends.symbolic import Unplannable
from densenet_fast.backends.triton import launch
from densenet_fast.functional import shared
from densenet_fast.nn import DenseBlock
from densenet_fast.ops import planned
from helpers import randomise

FORWARD = ["dense_block, bn_relu_conv1x1", "dense_block, bn_relu_global_avgpool"]
"""The bodies of a network of two blocks with the stem for small images, in order."""

APART = ["dense_block", "bn_relu_conv1x1", "dense_block", "bn_relu_global_avgpool"]
"""The same where a block and what reads it are called one after the other."""

BLOCK = ["dense_block", "dense_block_backward"]
"""Those of a training step of a block."""


class Bodies:
    """What ran: the ops whose bodies were planned, their plans, and the ops whose bodies were walked and why."""

    def __init__(self) -> None:
        self.planned: list[str] = []
        self.plans: list[plan.Plan] = []
        self.walked: list[tuple[str, str]] = []

    def reasons(self) -> set[str]:
        return {reason for _, reason in self.walked}


_made_for: dict[plan.Plan, str] = {}
"""The kind of inputs that each plan was used for first."""


def kind(inputs: Sequence[Any]) -> str:
    """All of ``inputs`` that a body can see, but for addresses and values."""

    def seen(t: torch.Tensor) -> tuple[Any, ...]:
        return tuple(t.shape), t.stride(), t.dtype, t.data_ptr() % 16

    return repr((replaced(list(inputs), seen), torch.backends.cudnn.conv.fp32_precision))


@contextlib.contextmanager
def plans() -> Iterator[Bodies]:
    """Ops on CPU tensors run by a plan from their first call on, if there is one, poisoned. Whether a GPU would ask for
    the range of variances makes no difference here: it does not."""
    bodies, one_at_a_time, run_launch = Bodies(), threading.Lock(), launch.run

    def run(name: str, body: Callable[..., Any], inputs: Sequence[Any]) -> Any:
        found = plan.cached(name, body, inputs)
        name = name.partition("::")[2]
        if isinstance(found, Unplannable):
            bodies.walked.append((name, str(found)))
            return found
        assert _made_for.setdefault(found, kind(inputs)) == kind(inputs), f"a plan of {name} is stale"
        bodies.planned.append(name)
        bodies.plans.append(found)
        return found.interpret(inputs, poison=True)

    def launch_alone(item: launch.Launch) -> None:
        with one_at_a_time:  # the interpreter exchanges Triton's functions in all threads
            run_launch(item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned, "DEVICE", "cpu")
        patch.setattr(plan, "run", run)
        patch.setattr(launch, "run", launch_alone)
        patch.setattr(shared, "beyond_range", lambda *_: False)
        yield bodies


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Convolutions of float32 by Triton, whose interpreter computes them exactly."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def compare(model: torch.nn.Module, history: Callable[[torch.nn.Module], list[Any]]) -> Bodies:
    """Asserts that ``history`` of a copy of the model makes bitwise the same with plans and without, and no NaN."""
    expected = history(copy.deepcopy(model))
    with plans() as bodies:
        made = history(copy.deepcopy(model))
    assert all(t.isfinite().all() for t in tensors_in(expected))
    for i, (one, other) in enumerate(zip(made, expected, strict=True)):
        assert equal(one, other), f"{i} of {len(made)}"
    return bodies


def gradients(model: torch.nn.Module, *others: torch.Tensor) -> list[torch.Tensor | None]:
    """Of the model's parameters and of others."""
    return [None if t.grad is None else t.grad.clone() for t in (*others, *model.parameters())]


def cotangent(like: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Random, contiguous, the same for every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def training_step(model: torch.nn.Module, x: torch.Tensor) -> list[Any]:
    """The output, all gradients and all buffers of a step on a copy of x."""
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(cotangent(out))
    return [out, *gradients(model, x), *map(torch.clone, model.buffers())]


def both_passes(bodies: Sequence[str], *stem: str) -> list[str]:
    """The bodies of a training step."""
    names = [*stem, *bodies]
    return names + [f"{name}_backward" for name in reversed(names)]


def network(first: int = 1, **options: Any) -> torch.nn.Module:
    """Of two blocks, of ``first`` layers and one, for images of 4 x 4."""
    return randomise(DenseNet(4, (first, 1), 6, 3, num_classes=3, **{"small_inputs": True, **options}))


def images(size: int = 4, dtype: torch.dtype = torch.float32, batch: int = 2) -> torch.Tensor:
    """What a network reads."""
    return torch.randn(batch, 3, size, size).to(dtype)


def steps(x: torch.Tensor) -> Callable[[torch.nn.Module], list[Any]]:
    """:func:`training_step` on x."""
    return lambda model: training_step(model, x)


def block(layers: int = 1, **options: Any) -> torch.nn.Module:
    """A dense block of 5 channels, bottlenecks of 6 and 3 new channels a layer."""
    return randomise(DenseBlock(layers, 5, growth_rate=3, **{"bn_size": 2, **options}))


def maps(height: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a block reads."""
    return torch.randn(2, 5, height, 3).to(dtype)
