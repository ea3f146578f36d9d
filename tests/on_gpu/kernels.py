"""What the groups that check kernels share."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from backends.comparison import Comparison
from densenet_fast.backends.triton.tune import DTYPES
from on_gpu.checks import Record, Wrong

Results = dict[str, Tensor]
NAMED = 5
"""Wrong results that a message names."""


@contextlib.contextmanager
def numerics(dtype: str) -> Iterator[torch.dtype]:
    """The dtype called ``dtype`` in ``tune.DTYPES``, with torch's setting for convolutions that goes with it; and
    memory that nobody has written is NaN."""
    made, precision = DTYPES[dtype]
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    try:
        yield made
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.conv.fp32_precision = before


def verdict(results: Sequence[Comparison]) -> Record:
    """The worst of the results.

    Raises:
        Wrong: an error is above what is allowed.
    """
    worst = max(results, key=lambda result: result.ours / result.allowed)
    measured = {"worst": worst.name, "error": worst.ours, "stock": worst.stock, "allowed": worst.allowed}
    wrong = [result for result in results if not result.right]
    if wrong:
        wrong.sort(key=lambda result: -result.ours / result.allowed)
        message = f"{len(wrong)} of {len(results)} results: {'; '.join(map(str, wrong[:NAMED]))}"
        raise Wrong(message, **measured)
    return measured


def same_again(run: Callable[[], Results], repeats: int) -> Record:
    """Runs it ``repeats`` times.

    Raises:
        Wrong: a result differs from the first run's in a bit.
    """
    first = {name: value.nan_to_num(0) for name, value in run().items()}
    for i in range(1, repeats + 1):
        for name, value in run().items():
            other = value.nan_to_num(0) != first[name]
            if other.any():
                message = f"{name}: {int(other.sum())} of {other.numel()} elements differ in run {i} from the first"
                raise Wrong(message, run=i, elements=int(other.sum()))
    return {"repeats": repeats}
