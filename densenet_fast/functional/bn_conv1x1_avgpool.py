"""The transition without ReLU: ``avg_pool(conv(batch_norm(x)), 2)`` with a 1x1 convolution."""

from collections.abc import Callable

from torch import Tensor

from densenet_fast import ops
from densenet_fast.functional import shared
from densenet_fast.functional.shared import BatchStatistics, Updates
from densenet_fast.operands import BatchNorm, BNReLUConv, ConvOperands, check, check_poolable
from densenet_fast.ops import stock
from densenet_fast.ops.stage import global_count

__all__ = ["bn_conv1x1_avgpool", "run_bn_conv1x1_avgpool"]


def bn_conv1x1_avgpool(
    x: Tensor,
    norm: BatchNorm,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    statistics: BatchStatistics | None = None,
) -> Tensor:
    """The transition without ReLU: ``avg_pool(conv(batch_norm(x), weight, bias), 2)``, computed pooling first.

    It saves ``x`` and its centred mean over the windows for the backward pass. Arguments, result and errors are those
    of :func:`bn_relu_conv1x1_avgpool`. It also raises a RuntimeError if the batch is normalised over several processes.
    """
    check_poolable(x)
    operands = ConvOperands(BNReLUConv(norm, weight, bias))
    return _bn_conv1x1_avgpool(x, operands, operands.check, statistics)


def run_bn_conv1x1_avgpool(
    x: Tensor, operands: ConvOperands, statistics: BatchStatistics | None = None, updates: Updates | None = None
) -> Tensor:
    """:func:`bn_conv1x1_avgpool`."""
    check_poolable(x)
    return _bn_conv1x1_avgpool(x, operands, operands.admit, statistics, updates)


def _bn_conv1x1_avgpool(
    x: Tensor,
    operands: ConvOperands,
    check_input: Callable[[Tensor], None],
    statistics: BatchStatistics | None,
    updates: Updates | None = None,
) -> Tensor:
    x, statistics = shared.autocast(x, statistics)
    check_input(x)
    group, (stage,) = operands.group(), operands.stages
    check(group is None, RuntimeError, "norm.group", "batch statistics of one process", group)
    out, mean, var = ops.bn_conv1x1_avgpool(x, *shared.known(x, operands.reader, statistics, group), stage)
    mean, var, count = mean.detach(), var.detach(), global_count(0, x, None)
    if shared.beyond_range(x, var, group):
        out, mean, var, count, *_ = shared.on_stock(stock.bn_conv_pool, x, stage, None, None)
    shared.update_running_statistics(x, operands, mean, var, count, updates)
    return out
