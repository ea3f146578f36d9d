"""The kernels in CUDA C++ (csrc/cuda): what is bound by bandwidth, not by a product, for NVIDIA GPUs.

float32, float64, float16 and bfloat16; each reads and writes its matrices once, 16 or 8 bytes at a time where
addresses allow. Equal inputs give bitwise equal results, on every GPU the same: the division of rows and columns
depends on the shape and the alignment alone. The functions are those of the contract, and stand in ``cuda``.

Where the library was built to emulate a GPU (tests/backends/cuda), the same kernels serve CPU tensors, slowly.
"""

import functools
import operator
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from densenet_fast.backends import extension, nvidia
from densenet_fast.backends.affine import (
    DTYPES,
    NO_STATISTICS,
    Affine,
    Job,
    Reader,
    RunningStatistics,
    Statistics,
    ThroughStatistics,
    Update,
)
from densenet_fast.backends.contract import Sums

MINIMUM_CAPABILITY = (7, 5)

kernels = torch.ops.densenet_fast

_dtype, _device = map(operator.attrgetter, ("dtype", "device"))


@functools.cache
def emulated() -> bool:
    """Whether the loaded library runs the kernels on CPU tensors."""
    return _built() and hasattr(kernels, "cuda_emulated")


@functools.cache
def unavailable() -> str | None:
    """Why these kernels cannot run here, or None."""
    if extension.unavailable() is not None:
        return extension.unavailable()
    if not _built():
        return "the compiled kernels were built without CUDA (pip install --no-build-isolation . with nvcc on PATH)"
    if emulated():
        return None
    return nvidia.unavailable(MINIMUM_CAPABILITY)


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for ``dtype`` on ``device``."""
    device = nvidia.meant(device)
    if dtype not in DTYPES:
        return False
    if device.type == "cpu":
        return unavailable() is None and emulated()
    return nvidia.serves(device, MINIMUM_CAPABILITY)


def serve(x: Tensor) -> bool:
    """Whether these kernels should run on x."""
    return supports(x.device, x.dtype) and unavailable() is None


def _built() -> bool:
    return extension.unavailable() is None and hasattr(kernels, "cuda_append_features")


def stream_of(x: Tensor) -> int:
    """The handle of the stream that kernels on x are launched on."""
    return nvidia.current_stream(x.device)


def channel_statistics(x: Tensor, out: Statistics) -> None:
    kernels.cuda_append_features(_adjacent(x), None, 1.0, None, *out, stream_of(x))


def append_features(
    new: Tensor, out: Tensor, statistics: Statistics | None, mask: Tensor | None = None, keep_scale: float = 1.0
) -> None:
    kernels.cuda_append_features(new, mask, keep_scale, out, *(statistics or NO_STATISTICS), stream_of(out))


def finalise_gradient(grad: Tensor, through: ThroughStatistics, out: Tensor) -> Tensor:
    *given, count = through
    count, rows = (count, 1.0) if isinstance(count, Tensor) else (None, float(count))
    kernels.cuda_finalise_gradient(_adjacent(grad), *given, count, rows, out, stream_of(out))
    return out


def bn_relu_maxpool(
    x: Tensor, affine: Affine, grid: tuple[int, ...], statistics: Statistics | None
) -> tuple[Tensor, Tensor]:
    return kernels.cuda_bn_relu_maxpool(x, *affine, grid, *(statistics or NO_STATISTICS), stream_of(x))


def bn_relu_maxpool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, affine: Affine, grid: tuple[int, ...], reader: Reader | None = None
) -> tuple[Tensor, Sums | None]:
    sums = None if reader is not None else _new_sums(affine)
    scaled = kernels.cuda_bn_relu_maxpool_backward(
        _adjacent(grad), argmax, x, *affine, grid, *_asked(reader, sums), stream_of(x)
    )
    return scaled, sums


def bn_relu_global_avgpool(x: Tensor, affine: Affine, grid: tuple[int, ...]) -> Tensor:
    return kernels.cuda_bn_relu_global_avgpool(x, *affine, grid[0], stream_of(x))


def bn_relu_global_avgpool_backward(
    grad: Tensor, x: Tensor, affine: Affine, grid: tuple[int, ...], reader: Reader | None = None
) -> tuple[Tensor, Sums | None]:
    sums = None if reader is not None else _new_sums(affine)
    scaled = kernels.cuda_bn_relu_global_avgpool_backward(
        _adjacent(grad), x, *affine, grid[0], *_asked(reader, sums), stream_of(x)
    )
    return scaled, sums


def _new_sums(affine: Affine) -> Sums:
    return torch.empty_like(affine.mean), torch.empty_like(affine.mean)


def _asked(reader: Reader | None, sums: Sums | None) -> tuple[Tensor | None, ...]:
    """The arguments of a backward op that say what it writes: the vectors of a reader, or the sums."""
    before, after, weight, bias = reader or Reader(None, None, None, None)
    none = (None, None)
    return *(before or none), *(after or none), weight, bias, *(sums or none)


def prepare(jobs: Sequence[Job]) -> None:
    """Makes one launch for 64 jobs, which run in no order."""
    if not jobs:
        return
    copies, rstds, zeros = ([job for job in jobs if job.kind == kind] for kind in ("copy", "rstd", "zero"))
    if len(copies) + len(rstds) + len(zeros) < len(jobs):
        raise ValueError(f"kind: expected copy, rstd or zero, got {[job.kind for job in jobs]}")
    kernels.cuda_prepare(
        [job.source for job in copies],
        [job.target for job in copies],
        [job.source for job in rstds],
        [job.target for job in rstds],
        [job.eps for job in rstds],
        [job.target for job in zeros],
        stream_of(jobs[0].target),
    )


def update_running_statistics(updates: Sequence[Update]) -> None:
    """Makes one launch for 64 normalisations. The tensors that it changes are given by their addresses: to hand over
    hundreds of tensors would take longer than to update them."""
    updates = [u for u in updates if u.running]
    if not updates:
        return
    running = [r if isinstance(r, RunningStatistics) else RunningStatistics(r) for r, *_ in updates]
    tables, device = [r.table for r in running], updates[0].mean.device
    vectors = [*chain.from_iterable(r.vectors for r in running)]
    counters = [*chain.from_iterable(r.counters for r in running)]
    if not all(map(Tensor.is_contiguous, vectors)):
        raise RuntimeError("update_running_statistics: running mean and var: expected contiguous values")
    if not {*map(_dtype, counters)} <= {torch.int64}:
        raise RuntimeError("update_running_statistics: batches: expected int64 values")
    first = (r.vectors[0] for r in running)  # whose device all vectors have, says the table
    if {*map(_device, first), *map(_device, counters)} != {device}:
        raise RuntimeError(f"update_running_statistics: expected all tensors on {device}")
    torch.autograd.graph.increment_version([*vectors, *counters])
    kernels.cuda_update_running_statistics(
        [*map(Tensor.data_ptr, vectors)],
        [*map(Tensor.data_ptr, counters)],
        tables,
        [u.mean for u in updates],
        [u.var for u in updates],
        [u.count if isinstance(u.count, Tensor) else None for u in updates],
        [1.0 if isinstance(u.count, Tensor) else float(u.count) for u in updates],
        stream_of(updates[0].mean),
    )


def _adjacent(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()
