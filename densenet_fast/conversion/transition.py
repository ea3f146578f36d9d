"""Transitions of any library: their layouts, read from their modules alone, and their operands.

Batch normalisation, ReLU, a 1x1 convolution and average pooling over windows of 2 run as one op, also without the ReLU.
With dropout behind the convolution, with max pooling or without pooling, the op ends with the convolution, and stock
functions do the rest.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from densenet_fast import functional, reference
from densenet_fast.backends.layout import is_channels_last
from densenet_fast.conversion import layout
from densenet_fast.conversion.classes import Classes
from densenet_fast.conversion.expected import Expected, expected_of
from densenet_fast.conversion.layout import Dropout, NotRecognised, Unit
from densenet_fast.functional import BatchStatistics, Updates
from densenet_fast.nn import fusion
from densenet_fast.operands import ConvOperands

AVERAGE, MAXIMUM = "average", "maximum"
AVERAGES = F.avg_pool1d, F.avg_pool2d, F.avg_pool3d
MAXIMA = F.max_pool1d, F.max_pool2d, F.max_pool3d


class TransitionLayout(NamedTuple):
    """See :class:`densenet_fast.conversion.layout.PartLayout`."""

    dims: int
    unit: Unit
    relu: bool
    dropout: Dropout | None
    """The dropout behind the convolution."""
    pool: str | None
    """The pooling over windows of 2: AVERAGE, MAXIMUM or None."""
    path: str | None
    """The path of the pooling module; None if the pooling is functional."""
    expected: Expected
    classes: Classes

    @property
    def kind(self) -> str:
        return "BNReLUConv1x1" if self.pool is None else "Transition"

    convolves = True

    @property
    def pools(self) -> bool:
        return self.pool is not None

    def obstacle(self, module: nn.Module) -> str | None:
        if not self.relu and isinstance(fusion.child(module, self.unit.norm), fusion.SYNC_BATCH_NORMS):
            return f"{self.unit.norm} is synchronised, and no ReLU follows it"
        reason = layout.unit_obstacle(module, self.unit, self.dims)
        if reason is None and self.path is not None:
            obstacle = fusion.average_pool_obstacle if self.pool == AVERAGE else _maximum_obstacle
            reason = obstacle(module, self.path, self.dims)
        return reason

    def channels(self, module: nn.Module) -> int:
        return fusion.child(module, self.unit.conv).in_channels

    def dropouts(self) -> list[Dropout]:
        return [] if self.dropout is None else [self.dropout]

    def operands_of(self, module: nn.Module) -> "TransitionOperands":
        rate = layout.current_rate(module, self.dropout)
        following: list[Callable[[Tensor], Tensor]] = []
        if rate:
            following.append(lambda x: _dropped(x, rate, self.dropout.whole_channels))
        pooled = self.pool == AVERAGE and not following
        if self.pool is not None and not pooled:
            pool = (AVERAGES if self.pool == AVERAGE else MAXIMA)[self.dims - 1]
            following.append(lambda x: pool(x, 2))
        operands = ConvOperands(fusion.unit(module, self.unit.norm, self.unit.conv))
        return TransitionOperands(operands, self.relu, pooled, following)


class TransitionOperands:
    """The operands of a transition for many calls.

    ``pooled`` says whether the op includes the pooling. The functions ``following`` are applied to the op's output.
    """

    def __init__(
        self, operands: ConvOperands, relu: bool, pooled: bool, following: list[Callable[[Tensor], Tensor]]
    ) -> None:
        self.operands, self.relu, self.pooled, self.following = operands, relu, pooled, following
        self.outcome, self.reads_statistics = operands.outcome, operands.reads_statistics

    def channels_last(self, input_channels_last: bool) -> bool:
        """Whether the stock layers would return channels last, given whether their input is."""
        return input_channels_last or is_channels_last(self.operands.unit.weight)

    def reads_block(self) -> ConvOperands | None:
        """Its operands, if it can run in one call with the dense block before it, else None."""
        return self.operands if self.relu and self.pooled else None

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, return_statistics: bool, updates: Updates | None
    ) -> tuple[Tensor, BatchStatistics | None]:
        """Runs the transition on ``x``, whose ``statistics`` are given if they are known.

        If asked to return the statistics of its result, it does so where the op computes them; else None.
        """
        if not self.relu:
            return functional.run_bn_conv1x1_avgpool(x, self.operands, statistics, updates), None
        if self.pooled:
            return functional.run_bn_relu_conv1x1_avgpool(x, self.operands, statistics, return_statistics, updates)
        x = functional.run_bn_relu_conv1x1(x, self.operands, statistics, updates)
        for function in self.following:
            x = function(x)
        return x, None


def _dropped(x: Tensor, p: float, whole_channels: bool) -> Tensor:
    """Dropout, of values or of whole channels, with the mask that stock draws for contiguous memory."""
    keep_scale = 1 / (1 - p) if p < 1 else 0.0
    if not whole_channels:
        return x * reference.dropout_mask(x, p) * keep_scale
    mask = reference.dropout_mask(x.new_empty(x.shape[:2] + (1,) * (x.dim() - 2)), p)
    return x * (mask.to(x.dtype) * keep_scale)


def _maximum_obstacle(module: nn.Module, pool: str, dims: int) -> str | None:
    return fusion.max_pool_obstacle(module, pool, dims, kernel=2)


def transition_layouts(module: nn.Module) -> Iterator[TransitionLayout]:
    """The possible layouts of ``module`` as a transition, by its modules; the most common first.

    Raises:
        NotRecognised: ``module`` is built in another way.
    """
    leaves = layout.leaves_of(module, "")
    layout.refuse_tensors(module, "it")
    if len(leaves.convs) != 1:
        raise NotRecognised(f"it has {len(leaves.convs)} convolutions")
    (unit,) = layout.units_of(module, leaves, (1,))
    if len(leaves.dropouts) > 1 or len(leaves.others) > 1:
        other = (leaves.dropouts + leaves.others)[-1]
        raise NotRecognised(f"{other} is not a part of BN-ReLU-convolution-dropout-pooling")
    dims = fusion.DIMENSIONS[type(fusion.child(module, unit.conv))]
    path = leaves.others[0] if leaves.others else None
    if path is None:
        pools = [AVERAGE, None, MAXIMUM]
    else:
        pools = [MAXIMUM if type(fusion.child(module, path)) is fusion.MAX_POOLS[dims] else AVERAGE]
    candidates = []
    for dropout in _dropouts(module, leaves.dropouts):
        rates = {} if dropout is None else {dropout.path: dropout.rate}
        expected = expected_of(module, rates), layout.classes_below(module)
        candidates += [TransitionLayout(dims, unit, True, dropout, pool, path, *expected) for pool in pools]
    if AVERAGE in pools and dropout is None:
        candidates.append(TransitionLayout(dims, unit, False, None, AVERAGE, path, *expected))
    reasons = [candidate.obstacle(module) for candidate in candidates]
    if None not in reasons:
        raise NotRecognised(reasons[0])
    yield from (candidate for candidate, reason in zip(candidates, reasons) if reason is None)


def _dropouts(module: nn.Module, modules: list[str]) -> list[Dropout | None]:
    """The possible dropouts behind the convolution: a module, a function whose rate is an attribute, or none."""
    if modules:
        return [Dropout(path, "p", isinstance(fusion.child(module, path), layout.CHANNEL_DROPOUTS)) for path in modules]
    names = [name for name, value in vars(module).items() if "drop" in name.lower() and type(value) in (int, float)]
    return [Dropout("", name, whole_channels) for name in names[:1] for whole_channels in (False, True)] + [None]


def resembles_transition(module: nn.Module) -> bool:
    """Whether ``module`` has any normalisation, a 1x1 convolution, any pooling, perhaps an activation and dropout."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    convs = layout.convolutions(module)
    if not 3 <= len(children) <= 5 or len(convs) != 1 or set(convs[0].kernel_size) != {1}:
        return False
    (first, norm), (last, pool) = children[0], children[-1]
    return "norm" in f"{first}{type(norm).__name__}".lower() and "pool" in f"{last}{type(pool).__name__}".lower()
