"""The 3x3 convolution and its gradients in CUDA C++ (csrc/cuda/bn_relu_conv3x3*.cu), by tensor cores: for float16 and
bfloat16, images of two dimensions, and GPUs of compute capability 8.0 and up.

Equal inputs give bitwise equal results on the same GPU; the gradients' sums are divided by how many multiprocessors it
has. On the meta device, where launches are planned, results have shapes alone.
"""

import torch
from torch import Tensor

from densenet_fast.backends import cuda_kernels, nvidia
from densenet_fast.backends.affine import NO_STATISTICS, Affine, Statistics, ThroughStatistics

DTYPES = (torch.float16, torch.bfloat16)

MINIMUM_CAPABILITY = (8, 0)

MOST_PIXELS = (1 << 30) - 1

RESIDENT = 2
"""How many blocks of a gradient's kernel run on each multiprocessor. It has room for that many."""

kernels = torch.ops.densenet_fast


def serves(z: Tensor) -> bool:
    """Whether these kernels run on tensors like z."""
    if z.dtype not in DTYPES or z.shape[0] > MOST_PIXELS:
        return False
    if cuda_kernels.unavailable() is not None:
        return False
    device = nvidia.meant(z.device)
    if device.type in ("cpu", "meta"):
        return cuda_kernels.emulated() or device.type == "meta"
    return nvidia.serves(device, MINIMUM_CAPABILITY)


def bn_relu_conv3x3(
    z: Tensor,
    affine: Affine | None,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, ...],
    out: Tensor,
    *,
    mask: Tensor | None = None,
    keep_scale: float = 1.0,
    statistics: Statistics | None = None,
    processors: int,
) -> None:
    """out [M, k] = conv3x3(relu(bn(z)), weight) for z [M, B] and weight [k, 3, 3, B]; without an affine, of z itself.
    The rest is as in the contract, for a GPU with so many multiprocessors."""
    if z.is_meta:
        return
    given = (None,) * 4 if affine is None else affine
    asked = statistics or NO_STATISTICS
    stream = cuda_kernels.stream_of(z)
    kernels.cuda_bn_relu_conv3x3(z, *given, weight, bias, grid, mask, keep_scale, out, *asked, processors, stream)


def grad_input(
    grad: Tensor, z: Tensor, affine: Affine, weight: Tensor, grid: tuple[int, ...], scaled: Tensor, processors: int
) -> Tensor:
    """Writes ``scaled`` [M, B] = scale * D. Returns partial sums [blocks, 2 * B] of D and of D * (z - mean)."""
    channels = z.shape[1]
    if z.is_meta:
        return z.new_empty(1, 2 * channels, dtype=torch.float32)
    resident = processors * RESIDENT
    partials = kernels.cuda_bn_relu_conv3x3_grad_input(
        grad, z, *affine, weight, grid, scaled, processors, resident, cuda_kernels.stream_of(z)
    )
    return partials.view(-1, 2 * channels)


def grad_weight(
    grad: Tensor,
    z: Tensor,
    affine: Affine,
    grid: tuple[int, ...],
    through: ThroughStatistics | None,
    dz: Tensor | None,
    processors: int,
) -> Tensor:
    """Returns partial products [ranges, k * 9 * B], in the order of a weight [k, 3, 3, B]. Also completes dz [M, B], if
    it is to go ``through`` z's statistics."""
    if z.is_meta:
        return z.new_empty(1, 9 * grad.shape[1] * z.shape[1], dtype=torch.float32)
    resident, stream = processors * RESIDENT, cuda_kernels.stream_of(z)
    completed = (None, None, None, 1.0) if through is None else (dz, through.p, through.q, float(through.count))
    return kernels.cuda_bn_relu_conv3x3_grad_weight(grad, z, *affine, grid, *completed, resident, stream)
