"""The stem: ``max_pool(relu(batch_norm(x)))`` behind its convolution, and both as one call."""

from torch import Tensor, nn

from densenet_fast import inference, ops
from densenet_fast.functional import shared
from densenet_fast.functional.shared import BatchStatistics, Updates
from densenet_fast.operands import BatchNorm, NormOperands
from densenet_fast.ops import stock

__all__ = ["bn_relu_maxpool", "run_bn_relu_maxpool", "run_stem"]


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
    operands = NormOperands(norm)
    operands.check(x)
    out, own = _bn_relu_maxpool(x, operands, return_statistics)
    return (out, own) if return_statistics else out


def run_bn_relu_maxpool(
    x: Tensor, operands: NormOperands, return_statistics: bool, updates: Updates | None = None
) -> tuple[Tensor, BatchStatistics | None]:
    """:func:`bn_relu_maxpool`, with the statistics of its result if they are asked for."""
    operands.admit(x)
    return _bn_relu_maxpool(x, operands, return_statistics, updates)


def run_stem(images: Tensor, convolution: nn.Module, operands: NormOperands, updates: Updates | None) -> Tensor | None:
    """A plain ``convolution`` of the images and :func:`bn_relu_maxpool` of its result, as one call.

    Returns None where the two have to be called one after the other: outside inference, and where the convolution is of
    an unusual kind.
    """
    return inference.stem(images, convolution, operands, shared.room(updates))


def _bn_relu_maxpool(
    x: Tensor, operands: NormOperands, return_statistics: bool, updates: Updates | None = None
) -> tuple[Tensor, BatchStatistics | None]:
    group = operands.group()
    outputs = ops.bn_relu_maxpool(x, None, None, operands.stages, return_statistics, group)
    if shared.beyond_range(x, outputs[2], group):
        out, *own = shared.on_stock(stock.bn_relu_maxpool, x, *operands.stages, None, None)
        outputs = (out, *own[:3], None, *own[3:])
    shared.update_running_statistics(x, operands, *outputs[1:4], updates)
    return outputs[0], BatchStatistics(*outputs[5:7]) if return_statistics else None
