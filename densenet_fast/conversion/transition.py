"""Transitions of any library: how one is built, read from its modules alone, and what its call takes.

Batch normalisation, ReLU, a 1x1 convolution and a mean over windows of 2 run as one op; so do they without ReLU. With
dropout behind the convolution, a maximum instead of the mean, or no pool at all, the op ends with the convolution, and
stock functions do the rest.
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
from densenet_fast.conversion.layout import Dropout, Unit, Unlike
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
    """What drops out behind the convolution."""
    pool: str | None
    """What pools over windows of 2, AVERAGE or MAXIMUM, if anything does."""
    path: str | None
    """Path of the pool; None if it is functional."""
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

    def gathered(self, module: nn.Module) -> "TransitionOperands":
        rate = layout.rate_now(module, self.dropout)
        behind: list[Callable[[Tensor], Tensor]] = []
        if rate:
            behind.append(lambda x: _dropped(x, rate, self.dropout.whole_channels))
        pooled = self.pool == AVERAGE and not behind
        if self.pool is not None and not pooled:
            pool = (AVERAGES if self.pool == AVERAGE else MAXIMA)[self.dims - 1]
            behind.append(lambda x: pool(x, 2))
        operands = ConvOperands(fusion.unit(module, self.unit.norm, self.unit.conv))
        return TransitionOperands(operands, self.relu, pooled, behind)


class TransitionOperands:
    """A transition gathered for many calls; ``behind`` is what follows the op, which is ``pooled`` or not."""

    def __init__(
        self, operands: ConvOperands, relu: bool, pooled: bool, behind: list[Callable[[Tensor], Tensor]]
    ) -> None:
        self.operands, self.relu, self.pooled, self.behind = operands, relu, pooled, behind
        self.outcome, self.reads_statistics = operands.outcome, operands.reads_statistics

    def channels_last(self, before: bool) -> bool:
        """Whether stock's output would be channels last, if its input is so ``before``."""
        return before or is_channels_last(self.operands.unit.weight)

    def reads_block(self) -> ConvOperands | None:
        """Its operands, if it can run as one with the dense block before it."""
        return self.operands if self.relu and self.pooled else None

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, describe: bool, updates: Updates | None
    ) -> tuple[Tensor, BatchStatistics | None]:
        """From ``x`` and its statistics to the result and, if asked to describe it and they are known, its own."""
        if not self.relu:
            return functional.run_bn_conv1x1_avgpool(x, self.operands, statistics, updates), None
        if self.pooled:
            return functional.run_bn_relu_conv1x1_avgpool(x, self.operands, statistics, describe, updates)
        x = functional.run_bn_relu_conv1x1(x, self.operands, statistics, updates)
        for function in self.behind:
            x = function(x)
        return x, None


def _dropped(x: Tensor, p: float, whole_channels: bool) -> Tensor:
    """Dropout, or that of whole channels, with the mask that it draws on contiguous memory."""
    keep_scale = 1 / (1 - p) if p < 1 else 0.0
    if not whole_channels:
        return x * reference.dropout_mask(x, p) * keep_scale
    mask = reference.dropout_mask(x.new_empty(x.shape[:2] + (1,) * (x.dim() - 2)), p)
    return x * (mask.to(x.dtype) * keep_scale)


def _maximum_obstacle(module: nn.Module, pool: str, dims: int) -> str | None:
    return fusion.max_pool_obstacle(module, pool, dims, kernel=2)


def transition_layouts(module: nn.Module) -> Iterator[TransitionLayout]:
    """What ``module`` may be as a transition, by its modules; the likeliest first.

    Raises:
        Unlike: it is built in another way.
    """
    leaves = layout.leaves_of(module, "")
    layout.refuse_tensors(module, "it")
    if len(leaves.convs) != 1:
        raise Unlike(f"it has {len(leaves.convs)} convolutions")
    (unit,) = layout.units_of(module, leaves, (1,))
    if len(leaves.dropouts) > 1 or len(leaves.others) > 1:
        raise Unlike(f"{(leaves.dropouts + leaves.others)[-1]} is not a part of BN-ReLU-convolution-dropout-pooling")
    dims = fusion.DIMENSIONS[type(fusion.child(module, unit.conv))]
    path = leaves.others[0] if leaves.others else None
    if path is None:
        pools = [AVERAGE, None, MAXIMUM]
    else:
        pools = [MAXIMUM if type(fusion.child(module, path)) is fusion.MAX_POOLS[dims] else AVERAGE]
    candidates = []
    for dropout in _dropouts(module, leaves.dropouts):
        free = {} if dropout is None else {dropout.path: dropout.rate}
        known = expected_of(module, free), layout.classes_below(module)
        candidates += [TransitionLayout(dims, unit, True, dropout, pool, path, *known) for pool in pools]
    if AVERAGE in pools and dropout is None:
        candidates.append(TransitionLayout(dims, unit, False, None, AVERAGE, path, *known))
    reasons = [candidate.obstacle(module) for candidate in candidates]
    if None not in reasons:
        raise Unlike(reasons[0])
    yield from (candidate for candidate, reason in zip(candidates, reasons) if reason is None)


def _dropouts(module: nn.Module, modules: list[str]) -> list[Dropout | None]:
    """What may drop out behind the convolution: a module, or a function whose rate is an attribute, or nothing."""
    if modules:
        return [Dropout(path, "p", isinstance(fusion.child(module, path), layout.CHANNEL_DROPOUTS)) for path in modules]
    names = [name for name, value in vars(module).items() if "drop" in name.lower() and type(value) in (int, float)]
    return [Dropout("", name, whole_channels) for name in names[:1] for whole_channels in (False, True)] + [None]


def resembles_transition(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation, a 1x1 convolution and a pool, of any kind, and perhaps an activation and
    dropout."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    convs = layout.convolutions(module)
    if not 3 <= len(children) <= 5 or len(convs) != 1 or set(convs[0].kernel_size) != {1}:
        return False
    (first, norm), (last, pool) = children[0], children[-1]
    return "norm" in f"{first}{type(norm).__name__}".lower() and "pool" in f"{last}{type(pool).__name__}".lower()
