"""Compiles, together, all kernels that an op and its backward pass will launch on a GPU.

Otherwise each kernel would be compiled at its first launch, one after the other. To find all launches beforehand, the
op and its backward pass run once on the meta device, where tensors have shapes and no values. This happens in a thread
of its own, so that the caller's hooks and modes do not see it.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from densenet_fast.backends import triton
from densenet_fast.ops.stage import Stage

DEVICE = "cuda"
"""The type of the devices whose kernels are compiled at the first launch."""

Call = Callable[..., tuple[Tensor, ...]]

_compiled_kinds: set[tuple[Any, ...]] = set()


def compile_ahead(
    call: Call, x: Tensor, mean: Tensor | None, var: Tensor | None, stages: Sequence[Stage], *constants: Any
) -> None:
    """Compiles the kernels that ``call(x, mean, var, stages, *constants)`` will launch on a GPU, at the first call of
    its kind."""
    if x.device.type != DEVICE or torch.is_anomaly_enabled():  # which looks at values
        return
    layer = tuple((s.frozen, None if s.conv_weight is None else s.conv_weight.shape[0]) for s in stages[:2])
    flags = tuple(c for constant in constants for c in _each(constant) if isinstance(c, bool))
    kind = call, x.device, x.dtype, x.shape[1], mean is None, layer, flags, torch.is_grad_enabled()
    if kind in _compiled_kinds:
        return
    _compiled_kinds.add(kind)
    if triton.unavailable() is None and triton.supports(x.device, x.dtype):
        from densenet_fast.backends.triton import config, launch

        device, train = config.device_of(x.device), torch.is_grad_enabled()
        try:
            with ThreadPoolExecutor(1) as thread:
                planned = thread.submit(plan, call, device, train, x, mean, var, stages, *constants).result()
        except Exception as error:  # whatever it is, the call itself does without
            warnings.warn(
                f"densenet_fast: kernels are compiled one by one: {type(error).__name__}: {error}", stacklevel=2
            )
            return
        launch.compile_all(planned, x.device)


def _each(constant: Any) -> tuple[Any, ...]:
    return constant if type(constant) is tuple else (constant,)


def plan(call: Call, device: Any, train: bool, *arguments: Any) -> list[Any]:
    """Returns the launches of ``call(*arguments)`` on ``device``, a ``triton.config.Device``, and with ``train`` those
    of its backward pass."""
    from densenet_fast.backends.triton import config, launch

    with config.assume(device), launch.planning() as launches, torch.set_grad_enabled(train):
        outputs = [t for t in call(*map(on_meta, arguments)) if t.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    return launches


def on_meta(value: Any) -> Any:
    """Returns an argument of an op with its tensors moved to the meta device. A process group becomes None: no other
    process takes part."""
    if isinstance(value, Tensor):
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return made.requires_grad_(value.requires_grad)
    if isinstance(value, Stage):
        return Stage(*map(on_meta, value))
    if isinstance(value, list | tuple):
        return [on_meta(v) for v in value]
    return None if isinstance(value, str) else value
