"""When a module may run fused, and why not otherwise."""

import operator
from collections.abc import Callable
from contextlib import ContextDecorator
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import handle_torch_function, has_torch_function_unary

from densenet_fast import operands, reference
from densenet_fast.nn.sync_batch_norm import SyncBatchNorm

_enabled = True

SYNC_BATCH_NORMS = (nn.SyncBatchNorm, SyncBatchNorm)
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
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
    """Whether a call of ``module`` does more than its class's ``forward``: it has hooks, or a ``forward`` of its own.
    ``module.compile()`` makes such a one too."""
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
    ones, padding = (1,) * dims, (kernel // 2,) * dims
    pads_plainly = convolve.padding in (padding, "same") or (kernel == 1 and convolve.padding == "valid")
    if (
        convolve.kernel_size == (kernel,) * dims
        and convolve.stride == ones
        and pads_plainly
        and (kernel == 1 or convolve.dilation == ones)
        and convolve.groups == 1
        and (kernel == 1 or convolve.padding_mode == "zeros")
    ):
        return None
    wanted = {"kernel_size": kernel, "stride": 1, "groups": 1}
    wanted |= {} if pads_plainly else {"padding": kernel // 2}
    wanted |= {} if kernel == 1 else {"dilation": 1, "padding_mode": "zeros"}
    return f"{conv} is not a plain convolution of kernel size {kernel}: {_other_settings(convolve, wanted)}"


def _other_settings(module: nn.Module, wanted: dict[str, Any]) -> str:
    """The attributes of ``module`` that differ from ``wanted``, with their values. Each is wanted alike in all
    dimensions."""
    other = []
    for name, value in wanted.items():
        found = getattr(module, name)
        if any(size != value for size in (found if isinstance(found, (tuple, list)) else [found])):
            other.append(f"{name}={found!r}")
    return ", ".join(other)


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


def max_pool_obstacle(module: nn.Module, pool: str, dims: int = 2, kernel: int = 3) -> str | None:
    """Why the child ``pool`` of ``module`` is not a maximum over windows of ``kernel`` at distance 2, those of 3 padded
    by 1, or None."""
    part, wanted = child(module, pool), {"kernel_size": kernel, "stride": 2, "padding": kernel // 3, "dilation": 1}
    wanted |= {"ceil_mode": False, "return_indices": False}
    other = _other_settings(part, wanted) if type(part) is MAX_POOLS[dims] else type(part).__name__
    windows = "x".join([str(kernel)] * dims)
    return f"{pool} is not a plain maximum over {windows} windows of stride 2: {other}" if other else None


def average_pool_obstacle(module: nn.Module, pool: str, dims: int) -> str | None:
    """Why the child ``pool`` of ``module`` is not a mean over windows of 2 that drops an odd last row, or None."""
    part, wanted = child(module, pool), {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False}
    wanted |= {} if dims == 1 else {"divisor_override": None}
    other = _other_settings(part, wanted) if type(part) is reference.AVERAGE_POOLS[dims] else type(part).__name__
    return f"{pool} is not a plain average over 2: {other}" if other else None


def call_obstacle(x: Any, dims: int) -> str | None:
    """Why a call with ``x`` cannot run fused whatever the module's structure, or None."""
    return environment_obstacle(x) or input_obstacle(x, dims)


def environment_obstacle(x: Any) -> str | None:
    """Why no call can run fused here and now, or None. ``x`` may be a stand-in for a tensor."""
    if not _enabled:
        return "switched off by set_fused(False)"
    if not isinstance(x, Tensor):
        return "traced symbolically"
    if not torch.compiler.is_compiling():
        if torch.jit.is_tracing():
            return "traced by torch.jit"
        if nn.modules.module._has_any_global_hook():
            return "a global module hook is registered"
        if torch._C._len_torch_dispatch_stack() and (mode := _foreign_mode()) is not None:
            return f"{mode} looks at torch's operations"
    if torch.compiler.is_exporting():
        return "exported"
    return operands.active_transform() or patched()


def input_obstacle(x: Tensor, dims: int) -> str | None:
    """Why ``x`` cannot be a fused part's input, or None."""
    if not x.dtype.is_floating_point or x.dtype.itemsize == 1:
        return f"{x.dtype} is not supported"
    if x.dim() != dims + 2:
        return f"the input is {x.dim()}-D"
    if x.numel() == 0:
        return "the input is empty"
    return None


def _foreign_mode() -> str | None:
    """The name of an active dispatch mode that is neither torch's nor this package's, or None. Such a mode may count
    what stock layers run, and would not recognise other operations."""
    kinds = (type(torch._C._get_dispatch_stack_at(i)) for i in range(torch._C._len_torch_dispatch_stack()))
    foreign = (kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "densenet_fast"))
    return next((kind.__qualname__ for kind in foreign), None)


_owners: list[Any] = []
_names: list[str] = []
_originals: list[Any] = []
"""The functions that stock layers run: the owner of each, its name there, and the function at the time of the
import."""


def watch(owner: Any, *names: str) -> None:
    """Lets :func:`patched` notice when one of ``owner``'s functions is replaced."""
    for name in names:
        _owners.append(owner), _names.append(name), _originals.append(getattr(owner, name))


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a compiler take the result of ``function`` for a constant.

    This is ``torch.compiler.assume_constant_result``, without importing the compiler (140 MiB).
    """
    function._dynamo_marked_constant = True
    return function


@constant
def patched() -> str | None:
    """The name of a function that stock layers run and that was replaced since the import, on its class or module; or
    None."""
    if all(map(operator.is_, map(getattr, _owners, _names), _originals)):
        return None
    changed = (i for i, original in enumerate(_originals) if getattr(_owners[i], _names[i]) is not original)
    return next((f"{_owners[i].__name__}.{_names[i]} was replaced" for i in changed), None)


watch(nn.Module, "__call__", "_wrapped_call_impl", "_call_impl")
watch(nn.Sequential, "forward")
watch(nn.ReLU, "forward")
watch(nn.Flatten, "forward")
for _kind in (*reference.BATCH_NORMS.values(), *SYNC_BATCH_NORMS, *reference.AVERAGE_POOLS.values()):
    watch(_kind, "forward")
for _kind in (*MAX_POOLS.values(), nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d):
    watch(_kind, "forward")
for _kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
    watch(_kind, "forward")
for _kind in DIMENSIONS:
    watch(_kind, "forward", "_conv_forward")
watch(F, "dropout", "dropout1d", "dropout2d", "dropout3d")
watch(F, "relu", "batch_norm", "max_pool1d", "max_pool2d", "max_pool3d")
watch(F, "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
watch(F, "avg_pool1d", "avg_pool2d", "avg_pool3d", "conv1d", "conv2d", "conv3d")
watch(torch, "cat", "relu", "relu_", "batch_norm", "flatten")


def overrides_functions(x: Tensor) -> bool:
    """Whether the class of ``x`` wants to see what is called on it (``__torch_function__``)."""
    return not torch.compiler.is_compiling() and type(x) not in (Tensor, nn.Parameter) and has_torch_function_unary(x)


def chain_obstacle(x: Any) -> str | None:
    """Why fused parts cannot be chained here and now, or None. A subclass of Tensor has to see each part's call."""
    reason = environment_obstacle(x)
    return f"the input is a {type(x).__name__}" if reason is None and overrides_functions(x) else reason


def run(part: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """Runs ``part(x, *arguments)``. A subclass of Tensor with a ``__torch_function__`` sees it as one call, and the
    result is of that class, as with torch's own functions."""
    if overrides_functions(x):
        return handle_torch_function(_run_plain, (x,), part, x, *arguments)
    return part(x, *arguments)


def _run_plain(part: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    return part(Tensor.as_subclass(x, Tensor), *arguments)


def unit(module: nn.Module, norm: str, conv: str) -> operands.BNReLUConv:
    """The tensors of the children ``norm`` and ``conv`` of ``module`` as the functional ops take them."""
    convolve = child(module, conv)
    return operands.BNReLUConv(batch_norm(child(module, norm)), convolve.weight, convolve.bias)


def normalises_by_batch(normalise: nn.Module) -> bool:
    """Whether a batch normalisation uses the batch's statistics now."""
    return normalise.training or normalise.running_mean is None


FROZEN = ("weight", "bias", "running_mean", "running_var")
FROZEN_EPS = 1e-5
"""The eps of frozen normalisations that have no attribute for it."""


def is_frozen_norm(module: nn.Module | None) -> bool:
    """Whether ``module`` has the tensors of a batch normalisation that uses running statistics alone, such as
    torchvision's FrozenBatchNorm2d. What it computes the tensors do not tell."""
    if module is None or isinstance(module, (_NormBase, LazyModuleMixin)):
        return False
    tensors = {n: t for n, t in (module._parameters | module._buffers).items() if t is not None}
    if tensors.keys() - {"num_batches_tracked"} != {*FROZEN}:
        return False
    shapes = {tensors[name].shape for name in FROZEN}
    return len(shapes) == 1 and len(shapes.pop()) == 1


def normalised_channels(normalise: nn.Module) -> int:
    """How many channels a batch normalisation, or a frozen one, normalises."""
    return normalise.num_features if isinstance(normalise, _NormBase) else normalise.running_mean.numel()


def batch_norm(normalise: nn.Module) -> operands.BatchNorm:
    """The tensors and options of a batch normalisation, or a frozen one, as the functional ops take them."""
    if not isinstance(normalise, _NormBase):
        tensors = [getattr(normalise, name) for name in FROZEN]
        return operands.BatchNorm(*tensors, None, False, eps=getattr(normalise, "eps", FROZEN_EPS))
    tracking = normalise.track_running_stats or not normalise.training
    group = None
    if isinstance(normalise, SYNC_BATCH_NORMS) and normalise.training and torch.distributed.is_initialized():
        group = normalise.process_group or torch.distributed.group.WORLD
    return operands.BatchNorm(
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
