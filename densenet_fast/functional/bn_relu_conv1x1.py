"""``conv(relu(batch_norm(x)))`` with a 1x1 convolution, and the transition, which also pools."""

from collections.abc import Callable

from torch import Tensor

from densenet_fast import inference, ops
from densenet_fast.functional import shared
from densenet_fast.functional.shared import BatchStatistics, Updates
from densenet_fast.operands import BatchNorm, BNReLUConv, ConvOperands, check_poolable
from densenet_fast.ops import stock

__all__ = ["bn_relu_conv1x1", "bn_relu_conv1x1_avgpool", "run_bn_relu_conv1x1", "run_bn_relu_conv1x1_avgpool"]


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
    operands = ConvOperands(BNReLUConv(norm, weight, bias))
    return _bn_relu_conv1x1(x, operands, operands.check, False, statistics, False)[0]


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
    check_poolable(x)
    operands = ConvOperands(BNReLUConv(norm, weight, bias))
    out, own = _bn_relu_conv1x1(x, operands, operands.check, True, statistics, return_statistics)
    return (out, own) if return_statistics else out


def run_bn_relu_conv1x1(
    x: Tensor, operands: ConvOperands, statistics: BatchStatistics | None = None, updates: Updates | None = None
) -> Tensor:
    """:func:`bn_relu_conv1x1`."""
    return _bn_relu_conv1x1(x, operands, operands.admit, False, statistics, False, updates)[0]


def run_bn_relu_conv1x1_avgpool(
    x: Tensor,
    operands: ConvOperands,
    statistics: BatchStatistics | None = None,
    return_statistics: bool = False,
    updates: Updates | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    """:func:`bn_relu_conv1x1_avgpool`, with the statistics of its result if they are asked for."""
    check_poolable(x)
    return _bn_relu_conv1x1(x, operands, operands.admit, True, statistics, return_statistics, updates)


def _bn_relu_conv1x1(
    x: Tensor,
    operands: ConvOperands,
    check_input: Callable[[Tensor], None],
    pool: bool,
    statistics: BatchStatistics | None,
    return_statistics: bool,
    updates: Updates | None = None,
) -> tuple[Tensor, BatchStatistics | None]:
    x, statistics = shared.autocast(x, statistics)
    check_input(x)
    if pool and not return_statistics:
        made = inference.transition(x, operands, shared.room(updates))
        if made is not None:
            return made, None
    group = operands.group()
    mean, var = shared.known(x, operands.reader, statistics, group)
    outputs = ops.bn_relu_conv1x1(x, mean, var, operands.stages, pool, return_statistics, group)
    if shared.beyond_range(x, outputs[2], group):
        convolve = stock.bn_relu_conv_pool if pool else stock.bn_relu_conv
        outputs = shared.on_stock(convolve, x, *operands.stages, None, None)
    shared.update_running_statistics(x, operands, *outputs[1:4], updates)
    return outputs[0], BatchStatistics(*outputs[4:6]) if return_statistics else None
