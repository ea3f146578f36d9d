"""vmap over an op: one call per sample of the batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def register_vmap(op: Any) -> None:
    """Lets ``op``, which takes tensors and lists of tensors and returns a tensor and a list of tensors, run under
    ``torch.vmap``: batched cotangents (``is_grads_batched``), jacobians."""
    op.register_vmap(_rule(op))


def _rule(op: Callable[..., tuple[Tensor, list[Tensor]]]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        outputs = [op(*_sample(args, in_dims, i)) for i in range(info.batch_size)]
        first = torch.stack([tensor for tensor, _ in outputs])
        rest = [torch.stack(tensors) for tensors in zip(*(tensors for _, tensors in outputs))]
        return (first, rest), (0, [0] * len(rest))

    return rule


def _sample(args: Any, dims: Any, i: int) -> Any:
    """Sample ``i`` of what is batched along ``dims``, which is nested as ``args``."""
    if isinstance(args, (list, tuple)) and isinstance(dims, (list, tuple)):
        return [_sample(arg, dim, i) for arg, dim in zip(args, dims)]
    return args if dims is None else args.select(dims, i)
