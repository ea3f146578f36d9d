"""A dense block and the transition or the head behind it, as one call."""

from torch import Tensor

from densenet_fast.functional import shared
from densenet_fast.functional.dense_block import stand_in
from densenet_fast.functional.shared import BatchStatistics, Updates
from densenet_fast.operands import BlockOperands, ConvOperands, NormOperands, check_poolable
from densenet_fast.ops import planned
from densenet_fast.ops.chain import HEAD, TRANSITION, Call
from densenet_fast.ops.op import saved_tensors_are_looked_at, seen_by_dispatcher

__all__ = ["run_dense_block_and_reader"]


def run_dense_block_and_reader(
    x: Tensor,
    operands: BlockOperands,
    reader: ConvOperands | NormOperands,
    statistics: BatchStatistics | None,
    return_statistics: bool,
    updates: Updates,
) -> tuple[Tensor, BatchStatistics | None] | None:
    """Runs :func:`run_dense_block` and, on its result, the transition or the head of ``reader``, as one call.

    That spares work of the host and the memory of a gradient. Returns None where the two have to be called one after
    the other: where neither saving counts, and where there is more to do.
    """
    if operands.drops or saved_tensors_are_looked_at() or seen_by_dispatcher([x]):
        return None
    is_planned, differentiable = planned.obstacle(x) is None, operands.differentiable(x)
    if not is_planned and (x.device.type != "cpu" or not differentiable):
        return None
    group, is_transition = operands.group(), isinstance(reader, ConvOperands)
    if group is not None or reader.group() is not None:
        return None
    x, statistics = shared.autocast(x, statistics)
    if is_transition:
        check_poolable(x)
    operands.admit(x)
    reader.admit(x, x.shape[1] + sum(operands.growths))
    call = Call(
        x,
        *shared.known(x, operands.reader, statistics, group),
        stages=operands.stages,
        drop_rates=operands.drop_rates,
        bottleneck=operands.bottleneck,
        saved=operands.saved(x, differentiable),
        return_statistics=reader.reads_statistics,
        prepend=operands.prepend,
        x_stand_in=stand_in(x) if differentiable and x.requires_grad else None,
        read_stages=reader.stages,
        options=(True, return_statistics) if is_transition else (),
    )
    out, mean, var, count, *own = (TRANSITION if is_transition else HEAD)(*call)
    if not is_planned and shared.beyond_range(x, var, group):
        return None
    shared.update_running_statistics(x, operands, mean, var, count, updates)
    shared.update_running_statistics(x, reader, *own[:3], updates)
    return out, BatchStatistics(*own[3:5]) if return_statistics else None
