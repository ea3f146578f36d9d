"""The fused ops as functions: what ``torch.nn.functional`` is to ``torch.nn``.

Like ``torch.nn.functional.batch_norm`` they update the running statistics they are given in place, once per call, with
the unbiased variance. All take and return feature maps [N, C, *spatial] with 1, 2 or 3 spatial dimensions, in any
memory format, and return channels-last memory. Under autocast those with a convolution run in its dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from densenet_fast import ops
from densenet_fast.backends import aten, select
from densenet_fast.backends.affine import Running, accumulation_dtype
from densenet_fast.backends.layout import CHANNELS_LAST
from densenet_fast.ops import stock
from densenet_fast.ops.op import seen_by_dispatcher
from densenet_fast.ops.stage import STAGE_TENSORS, Stage, autocast_dtype, rows_of, without_autocast
from densenet_fast.reference import dropout_mask

__all__ = [
    "BatchNorm",
    "BatchStatistics",
    "BNReLUConv",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_avgpool",
    "bn_relu_global_avgpool",
    "bn_relu_maxpool",
    "dense_block",
]


class BatchNorm(NamedTuple):
    """A batch normalisation as ``torch.nn.BatchNorm2d`` defines it.

    In training, or without running statistics, it normalises by the batch's mean and biased variance; otherwise by the
    running statistics. In training, running statistics that are given are updated; ``momentum=None`` averages
    cumulatively by ``num_batches_tracked``. Tensors are [C] (``num_batches_tracked`` a scalar), any floating dtype.
    With a ``group``, all its processes' batches are normalised together (``torch.nn.SyncBatchNorm``).
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    group: "dist.ProcessGroup | None" = None

    @property
    def frozen(self) -> bool:
        """Whether it normalises by its running statistics."""
        return not self.training and self.running_mean is not None

    def stage(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Stage:
        """This, ReLU and, if given, a convolution, as the ops take it."""
        running = (self.running_mean, self.running_var) if self.frozen else (None, None)
        return Stage(self.weight, self.bias, *running, weight, bias, self.eps)


class BatchStatistics(NamedTuple):
    """A feature map's mean and biased variance over its batch and pixels, [C] each, in float32 (float64 for float64):
    over this process's batch, or over those of all processes of ``group``, a group's name."""

    mean: Tensor
    var: Tensor
    group: str | None = None


class BNReLUConv(NamedTuple):
    """Batch normalisation, ReLU and a convolution of ``weight`` [out, in, *kernel] and ``bias`` [out] or None."""

    norm: BatchNorm
    weight: Tensor
    bias: Tensor | None = None

    def stage(self) -> Stage:
        return self.norm.stage(self.weight, self.bias)


def bn_relu_conv1x1(
    x: Tensor,
    norm: BatchNorm,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    statistics: BatchStatistics | None = None,
) -> Tensor:
    """``conv(relu(batch_norm(x)), weight, bias)`` with a 1x1 convolution, saving ``x`` alone for the backward pass.

    Pleiss et al., "Memory-Efficient Implementation of DenseNets" (https://arxiv.org/abs/1707.06990), section 3.

    Args:
        x: [N, C, *spatial], floating.
        norm: the batch normalisation, of C channels.
        weight: [C', C, 1, ...], of x's dtype unless autocast is on.
        bias: [C'] or None.
        statistics: x's, as the function that made x returned them; else they are computed where they are needed.

    Returns:
        [N, C', *spatial].

    Raises:
        ValueError: x has the wrong number of dimensions, or one value per channel where the batch is normalised.
        RuntimeError: channels, kernel size, dtypes or devices do not match.
    """
    return _bn_relu_conv1x1(x, BNReLUConv(norm, weight, bias), False, statistics, False)[0]


def bn_relu_conv1x1_avgpool(
    x: Tensor,
    norm: BatchNorm,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    statistics: BatchStatistics | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, BatchStatistics]:
    """The transition: ``avg_pool(conv(relu(batch_norm(x)), weight, bias), 2)``, pooling first, which is the same.

    Arguments and errors as for :func:`bn_relu_conv1x1`. Returns [N, C', *spatial // 2]; with ``return_statistics`` also
    its statistics, for a dense block that reads it.
    """
    _check(x.dim() < 3 or min(x.shape[2:]) >= 2, RuntimeError, "x", "spatial sizes of at least 2", tuple(x.shape))
    out, own = _bn_relu_conv1x1(x, BNReLUConv(norm, weight, bias), True, statistics, return_statistics)
    return (out, own) if return_statistics else out


def _bn_relu_conv1x1(
    x: Tensor, unit: BNReLUConv, pool: bool, statistics: BatchStatistics | None, describe: bool
) -> tuple[Tensor, BatchStatistics]:
    x, statistics = _autocast(x, statistics)
    _check_units(x, [unit])
    _check_unit(unit, x, "weight", x.shape[1], kernel=1)
    group = _group([unit.norm])
    mean, var = _known(x, unit.norm, statistics, group)
    stage = unit.stage()
    outputs = ops.bn_relu_conv1x1(x, mean, var, [stage], pool, describe, group)
    if _beyond_range(x, outputs[2], group):
        convolve = stock.bn_relu_conv_pool if pool else stock.bn_relu_conv
        outputs = _on_stock(convolve, x, stage, None, None)
    _update_running_statistics(x, [unit.norm], [slice(None)], *outputs[1:4])
    return outputs[0], BatchStatistics(*outputs[4:6])


def bn_relu_maxpool(
    x: Tensor, norm: BatchNorm, *, return_statistics: bool = False
) -> Tensor | tuple[Tensor, BatchStatistics]:
    """The stem behind its convolution: ``max_pool(relu(batch_norm(x)), 3, stride=2, padding=1)``.

    Huang et al., "Densely Connected Convolutional Networks" (https://arxiv.org/abs/1608.06993), table 1. Saved for the
    backward pass: ``x`` and one byte for each value of the result.

    Args:
        x: [N, C, *spatial], floating.
        norm: the batch normalisation, of C channels.
        return_statistics: whether to return the result's statistics too, for a dense block that reads it.

    Returns:
        [N, C, *(spatial + 1) // 2], of x's dtype.

    Raises:
        ValueError: x has the wrong number of dimensions, or one value per channel where the batch is normalised.
        RuntimeError: channels, dtypes or devices do not match.
    """
    _check_input(x, [norm])
    _check_norm(norm, x, "norm", x.shape[1])
    stage, group = norm.stage(), _group([norm])
    outputs = ops.bn_relu_maxpool(x, None, None, [stage], return_statistics, group)
    if _beyond_range(x, outputs[2], group):
        out, *own = _on_stock(stock.bn_relu_maxpool, x, stage, None, None)
        outputs = (out, *own[:3], None, *own[3:])
    _update_running_statistics(x, [norm], [slice(None)], *outputs[1:4])
    return (outputs[0], BatchStatistics(*outputs[5:7])) if return_statistics else outputs[0]


def bn_relu_global_avgpool(x: Tensor, norm: BatchNorm, *, statistics: BatchStatistics | None = None) -> Tensor:
    """The head before its classifier: ``relu(batch_norm(x))``, averaged over all pixels of each image; saves ``x``
    alone for the backward pass.

    ``statistics`` are x's, as the dense block that made x returned them. Other arguments, source and errors as for
    :func:`bn_relu_maxpool`. Returns [N, C], of x's dtype.
    """
    _check_input(x, [norm])
    _check_norm(norm, x, "norm", x.shape[1])
    stage, group = norm.stage(), _group([norm])
    outputs = ops.bn_relu_global_avgpool(x, *_known(x, norm, statistics, group), [stage], group)
    if _beyond_range(x, outputs[2], group):
        outputs = _on_stock(stock.bn_relu_global_avgpool, x, stage, None, None)
    _update_running_statistics(x, [norm], [slice(None)], *outputs[1:4])
    return outputs[0]


def dense_block(
    x: Tensor,
    layers: Sequence[Sequence[BNReLUConv]],
    drop_rates: Sequence[float] | None = None,
    memory_efficient: bool | Sequence[bool] = False,
    *,
    drop_channels: bool = False,
    statistics: BatchStatistics | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, BatchStatistics]:
    """A dense block: each layer reads x and all features made before it, and appends its own.

    Saved for the backward pass: the result and the output of each bottleneck; with ``memory_efficient`` the result
    alone, the bottlenecks being recomputed.

    Args:
        x: [N, C0, *spatial], floating.
        layers: at least one; each (1x1 unit, 3x3 unit), or in every layer (3x3 unit,) for no bottleneck. Convolutions
            of stride 1, the 3x3 ones padded by 1; weights of x's dtype unless autocast is on.
        drop_rates: the rate at which each layer's new features are dropped, [len(layers)]; None for no dropout. Masks
            come from torch's default generator: in training, the ones that ``F.dropout`` draws on contiguous memory.
        memory_efficient: whether to recompute the bottlenecks in the backward pass: of all layers or, [len(layers)],
            of each.
        drop_channels: whether dropout takes whole channels of an image, as ``F.dropout2d`` does, instead of values.
        statistics: x's, as the function that made x returned them; else they are computed where they are needed.
        return_statistics: whether to return the result's statistics too, for a transition or head that reads it. They
            are differentiable, and the pass over the features that its gradient would take is saved.

    Returns:
        [N, C0 + sum of the layers' new channels, *spatial].

    Raises:
        ValueError: no or unlike layers, not one rate or flag for each, x has the wrong number of dimensions, or one
            value per channel where the batch is normalised.
        RuntimeError: channels, kernel sizes, dtypes or devices do not match.
    """
    x, statistics = _autocast(x, statistics)
    sizes = {len(layer) for layer in layers if not isinstance(layer, BNReLUConv)}
    _check(sizes in ({1}, {2}), ValueError, "layers", "one or two BN-ReLU-convolutions in every layer", sizes)
    units = [unit for layer in layers for unit in layer]
    _check_units(x, units)
    norms = [unit.norm for unit in units]
    bottleneck = sizes == {2}
    channels = x.shape[1]
    for i, layer in enumerate(layers):
        made = channels
        for unit, kernel in zip(layer, (1, 3) if bottleneck else (3,)):
            _check_unit(unit, x, f"layers[{i}]", made, kernel)
            made = unit.weight.shape[0]
        channels += made

    rates = [0.0] * len(layers) if drop_rates is None else [float(p) for p in drop_rates]
    _check(len(rates) == len(layers), ValueError, "drop_rates", f"{len(layers)} rates", len(rates))
    _check(all(0 <= p <= 1 for p in rates), ValueError, "drop_rates", "probabilities between 0 and 1", rates)
    recomputed = [memory_efficient] * len(layers) if isinstance(memory_efficient, bool) else list(memory_efficient)
    _check(len(recomputed) == len(layers), ValueError, "memory_efficient", f"{len(layers)} flags", len(recomputed))
    growths = [layer[-1].weight.shape[0] for layer in layers]
    masks = [_mask(x, k, p, drop_channels) for k, p in zip(growths, rates)]
    stages = [unit.stage() for unit in units]
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad or any(t is not None and t.requires_grad for stage in stages for t in stage[:STAGE_TENSORS])
    )
    group = _group(norms)
    first = next((layer[0].norm for layer in layers if not layer[0].norm.frozen), norms[0])
    features, mean, var, count, *_ = ops.dense_block(
        x,
        *_known(x, first, statistics, group),
        stages,
        masks,
        rates,
        bottleneck,
        [differentiable and not flag for flag in recomputed],
        return_statistics,
        group,
        _link(x) if differentiable and x.requires_grad else None,
    )
    described = mean[: features.shape[1]], var[: features.shape[1]]
    if _beyond_range(x, var, group):
        per_layer = [stages[i : i + len(layers[0])] for i in range(0, len(stages), len(layers[0]))]
        keep_scales = [1 / (1 - p) if p < 1 else 0.0 for p in rates]
        bottlenecks: list[Tensor] = []
        features, *_ = made = _on_stock(stock.dense_block, x, per_layer, masks, keep_scales, bottlenecks)
        mean, var = map(torch.cat, zip(*map(_summed_in_float64, [features, *bottlenecks])))
        described = made[4:]
    _update_running_statistics(x, norms, _packed_ranges(x.shape[1], layers), mean, var, count)
    return (features, BatchStatistics(*described, group)) if return_statistics else features


LARGEST_VARIANCE = 2.0**80
"""Up to here the cube of rsqrt(variance), which gradients are multiplied by, is a normal float32."""


def _beyond_range(x: Tensor, var: Tensor, group: str | None) -> bool:
    """Whether the variances of a batch [C] are too large for the kernels' float32, or not finite, where stock torch,
    which sums in float64 on CPUs, may know better. A GPU is not asked: it would have to be waited for."""
    if x.device.type != "cpu" or x.dtype == torch.float64 or group is not None or seen_by_dispatcher([x]):
        return False
    return not var.max().item() <= LARGEST_VARIANCE


def _on_stock(function: Callable[..., Tensor], x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """What ``function`` of ``ops.stock`` makes of x: the result, the mean and variance of x and their count, and the
    mean and variance of the result. Torch sums in float64 where memory is contiguous."""
    out = without_autocast(function)(x.contiguous(), *arguments)
    if out.dim() in CHANNELS_LAST:
        out = out.contiguous(memory_format=CHANNELS_LAST[out.dim()])
    count = torch.full((), x.numel() // x.shape[1], dtype=torch.float64)
    return out, *_summed_in_float64(x), count, *(stock.batch_statistics(out) if out.dim() > 2 else ())


def _summed_in_float64(x: Tensor) -> list[Tensor]:
    """Mean and biased variance of x, [C] each, in float32."""
    wide, dims = x.detach().double(), [0, *range(2, x.dim())]
    return [wide.mean(dims).float(), wide.var(dims, correction=0).float()]


def _known(
    x: Tensor, norm: BatchNorm, statistics: BatchStatistics | None, group: str | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The mean and variance in ``statistics``, if they are what ``norm`` normalises x by."""
    if statistics is None or norm.frozen or statistics.group != group:
        return None, None
    for field, vector in zip(("mean", "var"), statistics):
        expected = (x.shape[1],), accumulation_dtype(x.dtype), x.device
        got = tuple(vector.shape), vector.dtype, vector.device
        _check(got == expected, RuntimeError, f"statistics.{field}", f"shape, dtype and device {expected}", got)
    return statistics[:2]


def _mask(x: Tensor, channels: int, p: float, whole_channels: bool) -> Tensor:
    """A dropout mask [N, channels, *spatial] for features made from x; empty where nothing is dropped."""
    if p == 0:
        return x.new_empty(0)
    spatial = x.shape[2:]
    drawn = torch.Size([1] * len(spatial)) if whole_channels else spatial
    return dropout_mask(x.new_empty(x.shape[0], channels, *drawn), p).expand(-1, -1, *spatial)


def _packed_ranges(channels: int, layers: Sequence[Sequence[BNReLUConv]]) -> list[slice]:
    """Where each normalisation's statistics stand in the op's packed vectors, in the order of the units."""
    bottleneck = channels + sum(layer[-1].weight.shape[0] for layer in layers)
    ranges = []
    for layer in layers:
        ranges.append(slice(0, channels))
        if len(layer) == 2:
            ranges.append(slice(bottleneck, bottleneck + layer[0].weight.shape[0]))
            bottleneck = ranges[-1].stop
        channels += layer[-1].weight.shape[0]
    return ranges


@torch.no_grad()
def _update_running_statistics(
    x: Tensor, norms: Sequence[BatchNorm], ranges: Sequence[slice], mean: Tensor, var: Tensor, count: Tensor
) -> None:
    """running = (1 - momentum) * running + momentum * batch, with the unbiased variance, for the statistics of x and
    what was made of it; ``ranges`` says where each normalisation's stand in ``mean`` and ``var``."""
    running = []
    for norm, columns in zip(norms, ranges):
        if norm.training and norm.running_mean is not None:
            averages = norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum
            running.append(Running(*averages, columns.start or 0))
        elif norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
    traced = seen_by_dispatcher([mean, *(r.mean for r in running)])
    backend = aten if traced else select(x.device, x.dtype)
    backend.update_running_statistics(running, mean, var, rows_of(count, x.numel() // x.shape[1]))


class _Link(torch.autograd.Function):
    """One zero, seen in x's shape, whose gradient is x's: reaches x's graph without keeping its memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        return grad


def _link(x: Tensor) -> Tensor | None:
    return None if torch.compiler.is_compiling() else _Link.apply(x)


def _group(norms: Sequence[BatchNorm]) -> str | None:
    """The name of the process group over which the batches are normalised; None if there is but this process."""
    groups = {norm.group for norm in norms if not norm.frozen}
    _check(len(groups) <= 1, ValueError, "layers", "one process group for all normalisations", groups)
    group = groups.pop() if groups else None
    return None if group is None or dist.get_world_size(group) == 1 else group.group_name


def _autocast(x: Tensor, statistics: BatchStatistics | None) -> tuple[Tensor, BatchStatistics | None]:
    """x in autocast's dtype, and its statistics if it was in that dtype already."""
    dtype = autocast_dtype(x.device)
    if dtype in (None, x.dtype) or not x.dtype.is_floating_point or x.dtype == torch.float64:
        return x, statistics
    return x.to(dtype), None


def _check(condition: bool, error: type[Exception], argument: str, expected: str, got: object) -> None:
    if not condition:
        raise error(f"{argument}: expected {expected}, got {got}")


def _check_units(x: Tensor, units: Sequence[BNReLUConv]) -> None:
    for unit in units:
        right = isinstance(unit, BNReLUConv) and isinstance(unit.norm, BatchNorm) and isinstance(unit.weight, Tensor)
        _check(right, TypeError, "layers", "BNReLUConv(BatchNorm(...), weight, bias) of tensors", unit)
    _check_input(x, [unit.norm for unit in units])
    channels = units[0].weight.shape[1]
    _check(x.shape[1] == channels, RuntimeError, "x", f"{channels} channels, as the first weight has", x.shape[1])


def _check_input(x: Tensor, norms: Sequence[BatchNorm]) -> None:
    transform = active_transform()
    if transform is not None:
        raise RuntimeError(f"x: {transform} is not supported; the modules of densenet_fast.nn run on stock ops there")
    for norm in norms:
        _check(isinstance(norm, BatchNorm), TypeError, "norm", "BatchNorm(...)", norm)
        pair = (norm.running_mean is None) == (norm.running_var is None)
        _check(pair, ValueError, "norm", "running_mean and running_var, or neither", "one of them")
        if norm.eps < 0 or (norm.training and norm.eps == 0):
            raise ValueError(f"norm.eps: expected a positive number, got {norm.eps}")
    _check(3 <= x.dim() <= 5, ValueError, "x", "[N, C, *spatial] with 1 to 3 spatial dimensions", tuple(x.shape))
    _check(x.dtype.is_floating_point, RuntimeError, "x", "a floating dtype", x.dtype)
    _check(x.numel() > 0, ValueError, "x", "at least one value", tuple(x.shape))
    by_batch = [norm for norm in norms if not norm.frozen]
    if by_batch and x.numel() == x.shape[1] and _group(norms) is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


def active_transform() -> str | None:
    """The transform that the fused ops cannot run inside, if one is active."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform"
    return "forward-mode differentiation" if torch.autograd.forward_ad._current_level >= 0 else None


def _check_unit(unit: BNReLUConv, x: Tensor, name: str, channels: int, kernel: int) -> None:
    norm, weight = unit.norm, unit.weight
    expected = (weight.shape[0], channels, *[kernel] * (x.dim() - 2))
    _check(tuple(weight.shape) == expected, RuntimeError, name, f"a convolution weight {expected}", tuple(weight.shape))
    matches = weight.dtype == x.dtype or (x.dtype != torch.float64 and autocast_dtype(x.device) is not None)
    _check(matches, RuntimeError, name, f"a convolution weight of the input's dtype {x.dtype}", weight.dtype)
    if unit.bias is not None:
        _check(tuple(unit.bias.shape) == expected[:1], RuntimeError, name, f"a bias {expected[:1]}", unit.bias.shape)
    for tensor in (weight, unit.bias):
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{name}: expected all tensors on {x.device}, got {tensor.device}")
    _check_norm(norm, x, name, channels)


def _check_norm(norm: BatchNorm, x: Tensor, name: str, channels: int) -> None:
    dtypes = (x.dtype, accumulation_dtype(x.dtype))
    for field in ("weight", "bias", "running_mean", "running_var"):
        vector = getattr(norm, field)
        if vector is None or (vector.shape == (channels,) and vector.dtype in dtypes and vector.device == x.device):
            continue  # what follows takes longer, and a block has hundreds
        got = tuple(vector.shape)
        _check(got == (channels,), RuntimeError, name, f"a normalisation {field} of {channels} channels", got)
        _check(vector.dtype in dtypes, RuntimeError, name, f"a normalisation {field} of {dtypes[0]}", vector.dtype)
        _check(False, RuntimeError, name, f"all tensors on {x.device}", vector.device)
