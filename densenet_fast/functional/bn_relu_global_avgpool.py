"""The head before its classifier: ``relu(batch_norm(x))``, averaged over the pixels."""

from torch import Tensor

from densenet_fast import inference, ops
from densenet_fast.functional import shared
from densenet_fast.functional.shared import BatchStatistics, Updates
from densenet_fast.operands import BatchNorm, NormOperands
from densenet_fast.ops import stock

__all__ = ["bn_relu_global_avgpool", "run_bn_relu_global_avgpool"]


def bn_relu_global_avgpool(x: Tensor, norm: BatchNorm, *, statistics: BatchStatistics | None = None) -> Tensor:
    """The head before its classifier: ``relu(batch_norm(x))``, averaged over all pixels of each image; saves ``x``
    alone for the backward pass.

    ``statistics`` are x's, as the dense block that made x returned them. Other arguments, source and errors as for
    :func:`bn_relu_maxpool`. Returns [N, C], of x's dtype.
    """
    operands = NormOperands(norm)
    operands.check(x)
    return _bn_relu_global_avgpool(x, operands, statistics)


def run_bn_relu_global_avgpool(
    x: Tensor, operands: NormOperands, statistics: BatchStatistics | None, updates: Updates | None = None
) -> Tensor:
    """:func:`bn_relu_global_avgpool`."""
    operands.admit(x)
    return _bn_relu_global_avgpool(x, operands, statistics, updates)


def _bn_relu_global_avgpool(
    x: Tensor, operands: NormOperands, statistics: BatchStatistics | None, updates: Updates | None = None
) -> Tensor:
    made = inference.global_avgpool(x, operands, shared.room(updates))
    if made is not None:
        return made
    group = operands.group()
    known = shared.known(x, operands.reader, statistics, group)
    outputs = ops.bn_relu_global_avgpool(x, *known, operands.stages, group)
    if shared.beyond_range(x, outputs[2], group):
        outputs = shared.on_stock(stock.bn_relu_global_avgpool, x, *operands.stages, None, None)
    shared.update_running_statistics(x, operands, *outputs[1:4], updates)
    return outputs[0]
