"""When a module may run fused, and why not otherwise."""

from collections.abc import Callable, Sequence
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from densenet_fast import functional, reference
from densenet_fast.nn.sync_batch_norm import SyncBatchNorm

_enabled = True

SYNC_BATCH_NORMS = (nn.SyncBatchNorm, SyncBatchNorm)
DIMENSIONS = {convolution: dims for dims, convolution in reference.CONVOLUTIONS.items()}


class set_fused(ContextDecorator):
    """Switches the fused ops on or off for the whole process, all threads included.

    Called as a function it lasts, in a ``with`` block or as a decorator for as long as that runs. Switched off, the
    modules run their layers one by one on stock torch ops, with the same results::

        densenet_fast.set_fused(False)
        with densenet_fast.set_fused(False):
            ...
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = bool(enabled)
        self._before_call: bool | None = _enabled
        self._before: list[bool] = []
        _switch(self._enabled)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        _switch(self._before_call)
        self._before_call = None
        return super().__call__(function)

    def __enter__(self) -> None:
        self._before.append(_enabled if self._before_call is None else self._before_call)
        self._before_call = None
        _switch(self._enabled)

    def __exit__(self, kind: type | None, value: BaseException | None, traceback: TracebackType | None) -> None:
        _switch(self._before.pop())


def _switch(enabled: bool) -> None:
    global _enabled
    _enabled = enabled


def has_hooks(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class's ``forward``: hooks, or a ``forward`` of its own, which
    ``module.compile()`` makes too."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def child(module: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path`` below ``module`` ("norm1", "layers.norm1"), or None."""
    if path in module._modules:
        return module._modules[path]
    for name in path.split("."):
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def structural_obstacle(module: nn.Module, norm: str, relu: str, conv: str, kernel: int) -> str | None:
    """Why the children ``norm``, ``relu``, ``conv`` of ``module`` are not a plain BN-ReLU-convolution, or None."""
    reason = hook_obstacle(module, norm, relu, conv) or convolution_obstacle(module, conv, kernel)
    if reason is not None:
        return reason
    return norm_obstacle(module, norm, DIMENSIONS[type(child(module, conv))]) or relu_obstacle(module, relu)


def convolution_obstacle(module: nn.Module, conv: str, kernel: int) -> str | None:
    """Why the child ``conv`` of ``module`` is not a plain convolution over ``kernel`` in all dimensions, or None."""
    convolve = child(module, conv)
    dims = DIMENSIONS.get(type(convolve))
    if dims is None:
        return f"{conv} is a {type(convolve).__name__}, not a convolution"
    plain = (
        convolve.kernel_size == (kernel,) * dims
        and convolve.stride == (1,) * dims
        and convolve.padding == (kernel // 2,) * dims
        and (kernel == 1 or convolve.dilation == (1,) * dims)
        and convolve.groups == 1
        and (kernel == 1 or convolve.padding_mode == "zeros")
    )
    return None if plain else f"{conv} is not a plain convolution of kernel size {kernel}: {convolve.extra_repr()}"


def hook_obstacle(module: nn.Module, *names: str) -> str | None:
    """Which of the children ``names`` of ``module`` is missing or has a hook, or None."""
    for name in names:
        part = child(module, name)
        if part is None:
            return f"{name} is missing"
        if has_hooks(part):
            return f"{name} has a hook or a forward of its own"
    return None


def norm_obstacle(module: nn.Module, norm: str, dims: int) -> str | None:
    """Why the child ``norm`` of ``module`` is not a batch normalisation of ``dims`` spatial dimensions, or None."""
    kind = type(child(module, norm))
    if kind in (reference.BATCH_NORMS[dims], *SYNC_BATCH_NORMS):
        return None
    return f"{norm} is a {kind.__name__}, not a batch normalisation of {dims} dimensions"


def relu_obstacle(module: nn.Module, relu: str) -> str | None:
    """Why the child ``relu`` of ``module`` is not a ReLU, or None."""
    kind = type(child(module, relu))
    return None if kind is nn.ReLU else f"{relu} is a {kind.__name__}, not a ReLU"


def max_pool_obstacle(module: nn.Module, pool: str) -> str | None:
    """Why the child ``pool`` of ``module`` is not a maximum over 3x3 windows at distance 2, padded by 1, or None."""
    part = child(module, pool)
    if type(part) is nn.MaxPool2d and not part.return_indices and not part.ceil_mode:
        sizes = [(s, s) if isinstance(s, int) else tuple(s) for s in _window(part)]
        if sizes == [(3, 3), (2, 2), (1, 1), (1, 1)]:
            return None
    return f"{pool} is not a plain maximum over 3x3 windows of stride 2: {part}"


def average_pool_obstacle(module: nn.Module, pool: str, dims: int) -> str | None:
    """Why the child ``pool`` of ``module`` is not a mean over windows of 2 that drops an odd last row, or None."""
    part = child(module, pool)
    if type(part) is reference.AVERAGE_POOLS[dims]:
        sizes = [[size] * dims if isinstance(size, int) else list(size) for size in (part.kernel_size, part.stride)]
        padding = {part.padding} if isinstance(part.padding, int) else set(part.padding)
        divisor = getattr(part, "divisor_override", None)
        if all(s in ([2] * dims, [2]) for s in sizes) and padding == {0} and not part.ceil_mode and divisor is None:
            return None
    return f"{pool} is not a plain average over 2: {part}"


def _window(pool: nn.MaxPool2d) -> tuple[int | Sequence[int], ...]:
    return pool.kernel_size, pool.stride, pool.padding, pool.dilation


def call_obstacle(x: Any, dims: int) -> str | None:
    """Why a call with ``x`` cannot run fused whatever the module's structure, or None."""
    return environment_obstacle(x) or input_obstacle(x, dims)


def environment_obstacle(x: Any) -> str | None:
    """Why no call can run fused here and now, with ``x`` that may be a stand-in for a tensor, or None."""
    if not _enabled:
        return "switched off by set_fused(False)"
    if not isinstance(x, Tensor):
        return "traced symbolically"
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing():
            return "traced by torch.jit"
        if nn.modules.module._has_any_global_hook():
            return "a global module hook is registered"
    if torch.compiler.is_exporting():
        return "exported"
    return functional.active_transform() or patched()


def input_obstacle(x: Tensor, dims: int) -> str | None:
    """Why ``x`` cannot be a fused part's input, or None."""
    if not x.dtype.is_floating_point or x.dtype.itemsize == 1:
        return f"{x.dtype} is not supported"
    if x.dim() != dims + 2:
        return f"the input is {x.dim()}-D"
    if x.numel() == 0:
        return "the input is empty"
    return None


_originals: list[tuple[Any, str, Any]] = []
"""What stock layers run: an owner, a name, and what stood there when this was imported."""


def watch(owner: Any, *names: str) -> None:
    """Lets :func:`patched` notice when one of ``owner``'s functions is replaced."""
    _originals.extend((owner, name, getattr(owner, name)) for name in names)


@torch.compiler.assume_constant_result
def patched() -> str | None:
    """Which function that stock layers run was replaced on its class or module since this was imported, or None."""
    for owner, name, original in _originals:
        if getattr(owner, name) is not original:
            return f"{owner.__name__}.{name} was replaced"
    return None


watch(nn.Module, "__call__", "_wrapped_call_impl", "_call_impl")
watch(nn.Sequential, "forward")
watch(nn.ReLU, "forward")
watch(nn.MaxPool2d, "forward")
for _kind in (*reference.BATCH_NORMS.values(), *SYNC_BATCH_NORMS, *reference.AVERAGE_POOLS.values()):
    watch(_kind, "forward")
for _kind in DIMENSIONS:
    watch(_kind, "forward", "_conv_forward")
watch(F, "relu", "batch_norm", "dropout", "max_pool2d", "adaptive_avg_pool2d")
watch(F, "avg_pool1d", "avg_pool2d", "avg_pool3d", "conv1d", "conv2d", "conv3d")
watch(torch, "cat", "relu", "relu_", "batch_norm", "flatten")


def overrides_functions(x: Tensor) -> bool:
    """Whether ``x`` is of a subclass that wants to see what is called on it (``__torch_function__``)."""
    return not torch.compiler.is_compiling() and type(x) not in (Tensor, nn.Parameter) and has_torch_function_unary(x)


def run(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``part(x)``, which a subclass of Tensor with a ``__torch_function__`` sees as one call; the result is of that
    class, as that of any of torch's functions."""
    return handle_torch_function(_run_plain, (x,), part, x) if overrides_functions(x) else part(x)


def _run_plain(part: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return part(Tensor.as_subclass(x, Tensor))


def unit(module: nn.Module, norm: str, conv: str) -> functional.BNReLUConv:
    """The tensors of the children ``norm`` and ``conv`` of ``module`` as the functional ops take them."""
    convolve = child(module, conv)
    return functional.BNReLUConv(batch_norm(child(module, norm)), convolve.weight, convolve.bias)


def normalises_by_batch(normalise: nn.Module) -> bool:
    """Whether a batch normalisation uses the batch's statistics now."""
    return normalise.training or normalise.running_mean is None


def batch_norm(normalise: nn.Module) -> functional.BatchNorm:
    """The tensors and options of a batch normalisation as the functional ops take them."""
    tracking = normalise.track_running_stats or not normalise.training
    group = None
    if type(normalise) in SYNC_BATCH_NORMS and normalise.training and torch.distributed.is_initialized():
        group = normalise.process_group or torch.distributed.group.WORLD
    return functional.BatchNorm(
        normalise.weight,
        normalise.bias,
        normalise.running_mean if tracking else None,
        normalise.running_var if tracking else None,
        normalise.num_batches_tracked if tracking else None,
        normalise.training,
        normalise.momentum,
        normalise.eps,
        group,
    )
