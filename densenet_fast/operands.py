"""What an op takes beside its feature map: batch normalisations and convolutions, gathered once for many calls.

Gathering and checking them is Python work for each of a block's hundreds of tensors. So operands are objects. A caller
may use them again if no tensor among them was exchanged, and none changed its dtype, shape or device. They remember the
kinds of input with which they have been checked.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from densenet_fast.backends import select
from densenet_fast.backends.affine import Running, RunningStatistics, accumulation_dtype
from densenet_fast.backends.inputs import Fixed
from densenet_fast.ops.block_plan import own_features
from densenet_fast.ops.stage import Stage, Stages, autocast_dtype

Made = TypeVar("Made")


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
        """The stage of this normalisation, ReLU and, if given, a convolution."""
        running = (self.running_mean, self.running_var) if self.frozen else (None, None)
        return Stage(self.weight, self.bias, *running, weight, bias, self.eps)


class BNReLUConv(NamedTuple):
    """Batch normalisation, ReLU and a convolution of ``weight`` [out, in, *kernel] and ``bias`` [out] or None."""

    norm: BatchNorm
    weight: Tensor
    bias: Tensor | None = None

    def stage(self) -> Stage:
        return self.norm.stage(self.weight, self.bias)


class Outcome:
    """What the last call of an op did. ``walked`` is why it had no launch plan, None if it had one."""

    walked: str | None = "it was not called yet"


class Operands:
    """The normalisations of one op.

    ``read`` are those that normalise its input. Beside them stand the stages, and where the statistics of each
    normalisation stand in the op's packed vectors.
    """

    def __init__(self, norms: list[BatchNorm], read: list[BatchNorm], stages: list[Stage], ranges: list[slice]) -> None:
        self.norms, self.stages, self.ranges = norms, Stages(stages), ranges
        self.reads_statistics = any(not norm.frozen for norm in read)
        """Whether it normalises its input by the batch statistics."""
        self.reader = next((norm for norm in read if not norm.frozen), norms[0])
        """The normalisation of its input: one that uses the batch statistics, if there is one."""
        training = [(norm, columns.start or 0) for norm, columns in zip(norms, ranges) if norm.training]
        self.running = RunningStatistics(
            Running(norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum, start)
            for norm, start in training
            if norm.running_mean is not None
        )
        """The running statistics that a call updates, by columns of the packed vectors."""
        alone = [norm.num_batches_tracked for norm, _ in training if norm.running_mean is None]
        self.counters = [batches for batches in alone if batches is not None]
        """The counters of batches that a call increments where there are no running averages."""
        self.outcome = Outcome()
        self._by_batch = any(not norm.frozen for norm in norms)
        self._groups = {norm.group for norm in norms if not norm.frozen}
        self._admitted: set[tuple[object, ...]] = set()
        self._remembered: dict[Callable[..., object], object] = {}

    def group(self) -> str | None:
        """The name of the process group over which batches are normalised; None if there is only this process."""
        check(len(self._groups) <= 1, ValueError, "layers", "one process group for all normalisations", self._groups)
        group = next(iter(self._groups), None)
        return None if group is None or dist.get_world_size(group) == 1 else group.group_name

    def differentiable(self, x: Tensor) -> bool:
        """Whether autograd records an op on x."""
        return torch.is_grad_enabled() and (x.requires_grad or bool(self.stages.requiring_grad().places))

    def remembered(self, examine: Callable[["Operands"], Made]) -> Made:
        """The result of ``examine`` on these operands, which is computed once."""
        if examine not in self._remembered:
            self._remembered[examine] = examine(self)
        return self._remembered[examine]

    def admit(self, x: Tensor, channels: int | None = None) -> None:
        """As :meth:`check`, but faster for inputs of a kind that was admitted before.

        Only what is not of the kind is checked again. The caller knows that nothing else has changed, and that no
        transform is active. ``channels``, if given, stands for the number of channels of x.
        """
        if torch.compiler.is_compiling():
            return self.check(x)
        kind = channels or x.shape[1], x.dim(), x.dtype, x.device, autocast_dtype(x.device)
        if kind in self._admitted:
            return self._check_size(x)
        self.check(x if channels is None else x[:, :1].expand(-1, channels, *x.shape[2:]))
        self._admitted.add(kind)

    def check(self, x: Tensor) -> None:
        """Raises an error that says what does not fit, of x or of these operands with x."""
        raise NotImplementedError

    def _check_input(self, x: Tensor) -> None:
        transform = active_transform()
        if transform is not None:
            raise RuntimeError(
                f"x: {transform} is not supported; the modules of densenet_fast.nn run on stock ops there"
            )
        for norm in self.norms:
            pair = (norm.running_mean is None) == (norm.running_var is None)
            check(pair, ValueError, "norm", "running_mean and running_var, or neither", "one of them")
            if norm.eps < 0 or (norm.training and norm.eps == 0):
                raise ValueError(f"norm.eps: expected a positive number, got {norm.eps}")
        check(3 <= x.dim() <= 5, ValueError, "x", "[N, C, *spatial] with 1 to 3 spatial dimensions", tuple(x.shape))
        check(x.dtype.is_floating_point, RuntimeError, "x", "a floating dtype", x.dtype)
        self._check_size(x)

    def _check_size(self, x: Tensor) -> None:
        check(x.numel() > 0, ValueError, "x", "at least one value", tuple(x.shape))
        if x.numel() == x.shape[1] and self._by_batch and self.group() is None:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


class NormOperands(Operands):
    """One normalisation."""

    def __init__(self, norm: BatchNorm) -> None:
        _check_kind(norm)
        super().__init__([norm], [norm], [norm.stage()], [slice(None)])

    def check(self, x: Tensor) -> None:
        self._check_input(x)
        _check_norm(self.norms[0], x, "norm", x.shape[1])


class ConvOperands(Operands):
    """One normalisation and the 1x1 convolution behind it."""

    def __init__(self, unit: BNReLUConv) -> None:
        _check_kinds([unit])
        self.unit = unit
        super().__init__([unit.norm], [unit.norm], [unit.stage()], [slice(None)])

    def check(self, x: Tensor) -> None:
        self._check_input(x)
        _check_channels(x, self.unit)
        _check_unit(self.unit, x, "weight", x.shape[1], kernel=1)


class BlockOperands(Operands):
    """The layers of a dense block; the arguments are those of :func:`densenet_fast.functional.dense_block`."""

    def __init__(
        self,
        layers: Sequence[Sequence[BNReLUConv]],
        drop_rates: Sequence[float] | None = None,
        memory_efficient: bool | Sequence[bool] = False,
        drop_channels: bool = False,
        prepend: bool = False,
    ) -> None:
        sizes = {len(layer) for layer in layers if not isinstance(layer, BNReLUConv)}
        check(sizes in ({1}, {2}), ValueError, "layers", "one or two BN-ReLU-convolutions in every layer", sizes)
        units = [unit for layer in layers for unit in layer]
        _check_kinds(units)
        self.layers, self.bottleneck, self.drop_channels, self.prepend = layers, sizes == {2}, drop_channels, prepend
        self.growths = [layer[-1].weight.shape[0] for layer in layers]
        self.channels = layers[0][0].weight.shape[1]
        self.columns = self.channels + sum(self.growths)
        self.drop_rates = Fixed([0.0] * len(layers) if drop_rates is None else map(float, drop_rates))
        self.drops = any(self.drop_rates)
        self.dropped_channels = [unit.weight.shape[0] for unit in units]
        """The number of channels of each drop rate."""
        if len(self.drop_rates) != len(units):
            self.dropped_channels = self.growths
        whole = isinstance(memory_efficient, bool)
        self.recomputed = [memory_efficient] * len(layers) if whole else list(memory_efficient)
        self._none = Fixed(False for _ in self.recomputed)
        self._asked = Fixed(not flag for flag in self.recomputed)
        widens = (layer[0].weight.shape[0] > layer[0].weight.shape[1] for layer in layers)
        self._worth_it = Fixed(asked and not wide for asked, wide in zip(self._asked, widens))
        norms, read = [unit.norm for unit in units], [layer[0].norm for layer in layers]
        super().__init__(norms, read, [unit.stage() for unit in units], packed_ranges(layers, prepend))

    def saved(self, x: Tensor, differentiable: bool) -> list[bool]:
        """Says of each layer whether its bottleneck is kept for a backward pass.

        If a layer reads fewer channels than its bottleneck has, the bottleneck is the cheapest to recompute and as
        large as any other. Some backends always recompute such bottlenecks.
        """
        if not differentiable:
            return self._none
        if torch.compiler.is_compiling():
            recomputes = x.device.type == "cpu"
        else:
            recomputes = select(x.device, x.dtype).RECOMPUTES_WIDE_BOTTLENECKS
        return self._worth_it if recomputes else self._asked

    def own(self, features: Tensor) -> Tensor:
        """The block's input, as a view of its ``features`` [N, C_total, *spatial]."""
        return own_features(features, self.channels, self.prepend)

    def check(self, x: Tensor) -> None:
        self._check_input(x)
        _check_channels(x, self.layers[0][0])
        channels = x.shape[1]
        for i, layer in enumerate(self.layers):
            made = channels
            for unit, kernel in zip(layer, (1, 3) if self.bottleneck else (3,)):
                _check_unit(unit, x, f"layers[{i}]", made, kernel)
                made = unit.weight.shape[0]
            channels += made
        rates, flags, n = self.drop_rates, self.recomputed, len(self.layers)
        either = {n: None, len(self.norms): None}
        check(len(rates) in either, ValueError, "drop_rates", f"{' or '.join(map(str, either))} rates", len(rates))
        check(all(0 <= p <= 1 for p in rates), ValueError, "drop_rates", "probabilities between 0 and 1", rates)
        check(len(flags) == n, ValueError, "memory_efficient", f"{n} flags", len(flags))


def packed_ranges(layers: Sequence[Sequence[BNReLUConv]], prepend: bool) -> list[slice]:
    """Where the statistics of each normalisation stand in the op's packed vectors, in the order of the units."""
    channels = layers[0][0].weight.shape[1]
    columns = bottleneck = channels + sum(layer[-1].weight.shape[0] for layer in layers)
    ranges = []
    for layer in layers:
        ranges.append(slice(columns - channels, columns) if prepend else slice(0, channels))
        if len(layer) == 2:
            ranges.append(slice(bottleneck, bottleneck + layer[0].weight.shape[0]))
            bottleneck = ranges[-1].stop
        channels += layer[-1].weight.shape[0]
    return ranges


def active_transform() -> str | None:
    """The active transform inside which the fused ops cannot run, or None."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform"
    return "forward-mode differentiation" if torch.autograd.forward_ad._current_level >= 0 else None


def check(condition: bool, error: type[Exception], argument: str, expected: str, got: object) -> None:
    """Raises an error of this type unless the condition holds. It says what was expected and what came."""
    if not condition:
        raise error(f"{argument}: expected {expected}, got {got}")


def check_poolable(x: Tensor) -> None:
    """Raises an error if x has no window of two pixels in each of its spatial dimensions."""
    check(x.dim() < 3 or min(x.shape[2:]) >= 2, RuntimeError, "x", "spatial sizes of at least 2", tuple(x.shape))


def _check_kinds(units: Sequence[BNReLUConv]) -> None:
    for unit in units:
        right = isinstance(unit, BNReLUConv) and isinstance(unit.norm, BatchNorm) and isinstance(unit.weight, Tensor)
        check(right, TypeError, "layers", "BNReLUConv(BatchNorm(...), weight, bias) of tensors", unit)


def _check_kind(norm: BatchNorm) -> None:
    check(isinstance(norm, BatchNorm), TypeError, "norm", "BatchNorm(...)", norm)


def _check_channels(x: Tensor, first: BNReLUConv) -> None:
    channels = first.weight.shape[1]
    check(x.shape[1] == channels, RuntimeError, "x", f"{channels} channels, as the first weight has", x.shape[1])


def _check_unit(unit: BNReLUConv, x: Tensor, name: str, channels: int, kernel: int) -> None:
    norm, weight = unit.norm, unit.weight
    expected = (weight.shape[0], channels, *[kernel] * (x.dim() - 2))
    check(tuple(weight.shape) == expected, RuntimeError, name, f"a convolution weight {expected}", tuple(weight.shape))
    matches = weight.dtype == x.dtype or (x.dtype != torch.float64 and autocast_dtype(x.device) is not None)
    check(matches, RuntimeError, name, f"a convolution weight of the input's dtype {x.dtype}", weight.dtype)
    if unit.bias is not None:
        check(tuple(unit.bias.shape) == expected[:1], RuntimeError, name, f"a bias {expected[:1]}", unit.bias.shape)
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
        check(got == (channels,), RuntimeError, name, f"a normalisation {field} of {channels} channels", got)
        check(vector.dtype in dtypes, RuntimeError, name, f"a normalisation {field} of {dtypes[0]}", vector.dtype)
        check(False, RuntimeError, name, f"all tensors on {x.device}", vector.device)
