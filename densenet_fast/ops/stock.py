"""The ops in stock differentiable torch functions, for second derivatives."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_fast.backends.affine import accumulation_dtype
from densenet_fast.ops.stage import Stage, by_stage


class BatchNorm(torch.autograd.Function):
    """Batch normalisation of x [N, C, *spatial] by its batch, differentiable to every order.

    Torch's own is so to the second order: in a third derivative it takes the batch statistics for constants.

        y = w * n + b  with  n = (x - mean) * r  and  r = rsqrt(var + eps)
        db = sum dy;  dw = sum dy * n;  dx = w * r * (dy - db / M - n * dw / M)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        out, mean, rstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if not torch.is_grad_enabled():
            needs = ctx.needs_input_grad[:3]
            saved = (weight, None, None, mean, rstd, True, ctx.eps, needs)
            grads = torch.ops.aten.native_batch_norm_backward(grad, x, *saved)
            return *(g if need else None for g, need in zip(grads, needs)), None  # on GPUs, all come
        wide = accumulation_dtype(x.dtype)
        dims, count = [0, *range(2, x.dim())], x.numel() // x.shape[1]
        mean, var = batch_statistics(x)
        rstd = torch.rsqrt(var + ctx.eps)
        dy, normalised = grad.to(wide), (x.to(wide) - _per_channel(mean, x)) * _per_channel(rstd, x)
        grad_bias, grad_weight = dy.sum(dims), (dy * normalised).sum(dims)
        centred = dy - _per_channel(grad_bias / count, x) - normalised * _per_channel(grad_weight / count, x)
        scale = rstd if weight is None else weight.to(wide) * rstd
        return (
            (centred * _per_channel(scale, x)).to(x.dtype),
            None if weight is None else grad_weight.to(weight.dtype),
            None if bias is None else grad_bias.to(bias.dtype),
            None,
        )


def bn(x: Tensor, stage: Stage, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    """Batch normalisation of x [N, C, *spatial], by the batch's ``mean`` and ``var`` [C] if they are given."""
    if mean is None:
        if not stage.frozen:
            return BatchNorm.apply(x, stage.weight, stage.bias, stage.eps)
        running = stage.running_mean, stage.running_var
        return F.batch_norm(x, *running, stage.weight, stage.bias, False, 0.0, stage.eps)
    scale = torch.rsqrt(var + stage.eps)
    if stage.weight is not None:
        scale = stage.weight * scale
    y = (x - _per_channel(mean, x)) * _per_channel(scale, x)
    return (y if stage.bias is None else y + _per_channel(stage.bias, x)).to(x.dtype)


def bn_relu(x: Tensor, stage: Stage, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    """BN-ReLU, as :func:`bn`."""
    return F.relu(bn(x, stage, mean, var))


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of x [N, C, *spatial]: [C] each, in the accumulation dtype."""
    var, mean = torch.var_mean(x.to(accumulation_dtype(x.dtype)), [0, *range(2, x.dim())], correction=0)
    return mean, var


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (x.dim() - 2))


def bn_relu_maxpool(x: Tensor, stage: Stage, mean: Tensor | None, var: Tensor | None) -> Tensor:
    """BN-ReLU-max pooling: the stem behind its convolution."""
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
    return pool(bn_relu(x, stage, mean, var), 3, 2, 1)


def bn_relu_global_avgpool(x: Tensor, stage: Stage, mean: Tensor | None, var: Tensor | None) -> Tensor:
    """BN-ReLU and the mean over all pixels: the head before its classifier."""
    return bn_relu(x, stage, mean, var).flatten(2).mean(2)


def bn_relu_conv(x: Tensor, stage: Stage, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    """BN-ReLU-convolution, 1x1 or 3x3 with padding 1, of x [N, C, *spatial]."""
    return _convolve(bn_relu(x, stage, mean, var), stage)


def _convolve(x: Tensor, stage: Stage) -> Tensor:
    weight, bias = stage.conv_weight.to(x.dtype), None if stage.conv_bias is None else stage.conv_bias.to(x.dtype)
    ones = [1] * (x.dim() - 2)
    padding = [weight.shape[-1] // 2] * len(ones)
    return torch.convolution(x, weight, bias, ones, padding, ones, False, [0], 1)


def bn_relu_conv_pool(x: Tensor, stage: Stage, mean: Tensor | None, var: Tensor | None) -> Tensor:
    """BN-ReLU-convolution-average pooling: the transition."""
    return _pool(bn_relu_conv(x, stage, mean, var))


def bn_conv_pool(x: Tensor, stage: Stage, mean: Tensor | None, var: Tensor | None) -> Tensor:
    """BN-convolution-average pooling: the transition without ReLU."""
    return _pool(_convolve(bn(x, stage, mean, var), stage))


def _pool(x: Tensor) -> Tensor:
    return (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.dim() - 3](x, 2)


def dense_block(
    x: Tensor,
    layers: Sequence[Sequence[Stage]],
    masks: Sequence[Tensor],
    drop_rates: Sequence[float],
    prepend: bool = False,
    bottlenecks: list[Tensor] | None = None,
) -> Tensor:
    """The dense block of ``layers``, which concatenates after each layer.

    Masks and drop rates are as for the op. If ``bottlenecks`` is given, each layer's bottleneck is appended to it.
    """
    stages = sum(map(len, layers))
    drops = iter(zip(by_stage(masks, stages, None), by_stage(drop_rates, stages, 0.0)))
    for layer in layers:
        new = x
        for stage in layer:
            if bottlenecks is not None and new is not x:
                bottlenecks.append(new)
            new = bn_relu_conv(new, stage)
            mask, rate = next(drops)
            if rate > 0:
                new = new * mask * (1 / (1 - rate) if rate < 1 else 0.0)
        x = torch.cat([new, x] if prepend else [x, new], 1)
    return x


def needed_in_backward(grad: Tensor) -> bool:
    """Whether a backward pass must itself be differentiable, or ``grad`` is a batch (``is_grads_batched``)."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)


def _dense_strides(t: Tensor) -> tuple[int, ...] | None:
    """The strides of ``torch.empty_like(t)``. None for a tensor without memory of its own, which prescribes none."""
    return None if 0 in t.stride() and t.numel() > 1 else torch.empty_like(t, device="meta").stride()


def _stored_as(gradient: Tensor, stride: tuple[int, ...] | None) -> Tensor:
    """Returns ``gradient`` with ``stride``, if that is given, and never as a view."""
    right = stride in (None, gradient.stride()) and not gradient._is_view()
    if right or torch._C._functorch.is_legacy_batchedtensor(gradient):
        return gradient
    if stride is None:
        return torch.empty_like(gradient).copy_(gradient)
    return gradient.new_empty_strided(gradient.shape, stride).copy_(gradient)


class _Node(torch.autograd.Function):
    """Makes a tensor a node of its own, whose gradient is stored with ``stride``."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, stride: tuple[int, ...] | None) -> Tensor:
        ctx.stride = stride
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _stored_as(grad, ctx.stride), None


def differentiable_gradients(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    group: str | None,
) -> list[Tensor | None]:
    """Returns the gradients of ``function(*inputs)`` with respect to the inputs that require them.

    ``grads`` are the gradients of the function's outputs, None where there is none. If gradients are enabled, the
    results are differentiable themselves. The inputs are made nodes of their own first. So a derivative is partial even
    if one input was computed from another, or is the same tensor. A gradient is no view, and has the strides of
    ``torch.empty_like`` of its input.

    Raises:
        RuntimeError: the batch statistics are synchronised over a process group. Second derivatives of these are
            missing.
    """
    if group is not None:
        raise RuntimeError("create_graph: expected batch statistics of one process, got synchronised batch norm")
    create_graph = torch.is_grad_enabled()
    strides = [None if t is None else _dense_strides(t) for t in inputs]
    with torch.enable_grad():
        inputs = [None if t is None else _Node.apply(t, stride) for t, stride in zip(inputs, strides)]
        made, given = zip(*((output, grad) for output, grad in zip(function(*inputs), grads) if grad is not None))
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    gradients = iter(torch.autograd.grad(made, wanted, given, create_graph=create_graph, allow_unused=True))
    found = [next(gradients) if t is not None and t.requires_grad else None for t in inputs]
    return [None if g is None else _stored_as(g, stride) for g, stride in zip(found, strides)]
