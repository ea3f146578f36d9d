"""A whole network in training as one node of autograd, for a backend that runs it in one call.

A network of small images spends as much time between its parts as in some of their kernels. The kernels are those of
the parts, so the results are theirs.
"""

import operator
from collections.abc import Sequence
from functools import partial
from itertools import compress
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_fast.backends.optional import NetworkParts, OptionalFunctions, Tracked
from densenet_fast.ops import stock
from densenet_fast.ops.op import direct_call, seen_by_dispatcher
from densenet_fast.ops.stage import STAGE_TENSORS, unflatten

__all__ = ["Network"]

Value = TypeVar("Value")

_requires_grad = operator.attrgetter("requires_grad")


class Network:
    """A network as a backend takes it, with the running statistics that are ``tracked``."""

    def __init__(self, parts: NetworkParts, tracked: Tracked) -> None:
        self.parts, self.tracked = parts, tracked
        self._flags = [True, *(place % STAGE_TENSORS in (0, 1, 4) for place in parts.places)]
        self._trained = self.of_trained(parts.tensors)

    def is_trained(self) -> bool:
        """Whether all of its parameters require a gradient."""
        return all(map(_requires_grad, self._trained))

    def of_trained(self, values: Sequence[Value]) -> list[Value]:
        """Those of the parameters, from one value for each tensor."""
        return [*compress(values, self._flags)]

    def run(self, backend: OptionalFunctions, images: Tensor) -> Tensor:
        """The means [N, C] of the rectified features, from images [N, c, H, W] with adjacent channels.

        Raises:
            RuntimeError: a tensor does not fit the others, or a variance is beyond float32's range. Nothing is updated.
        """
        return _apply(self, backend, images, *self._trained)

    def on_stock(self, images: Tensor, weight: Tensor, *tensors: Tensor) -> list[Tensor]:
        """:meth:`run` by stock torch functions, of other tensors in the places of the network's."""
        parts = self.parts
        flat: list[Tensor | None] = [None] * (STAGE_TENSORS * len(parts.eps))
        for place, tensor in zip(parts.places, tensors):
            flat[place] = tensor
        stem, *stages = unflatten(flat, parts.eps)
        x = F.conv2d(images, weight.to(images.dtype), None, parts.stride, parts.padding)
        x = stock.bn_relu_maxpool(x, stem, None, None)
        for i, (layers, prepend) in enumerate(zip(parts.layers, parts.prepend)):
            own, reader, stages = stages[: 2 * layers], stages[2 * layers], stages[2 * layers + 1 :]
            x = stock.dense_block(x, [*zip(own[::2], own[1::2])], [], [], prepend)
            last = i + 1 == len(parts.layers)
            x = (stock.bn_relu_global_avgpool if last else stock.bn_relu_conv_pool)(x, reader, None, None)
        return [x]


class _Node(torch.autograd.Function):
    """A network with autograd. Autograd does not look into it, so the tensors that it trains are passed once more."""

    @staticmethod
    def forward(ctx: Any, network: Network, backend: OptionalFunctions, images: Tensor, *_: Tensor) -> Tensor:
        means, kept = backend.network(images, network.parts, network.tracked)
        if not kept:
            raise RuntimeError("images: expected variances within the range of float32")
        ctx.network, ctx.backend = network, backend
        ctx.save_for_backward(images, *network.parts.tensors, *kept)
        return means

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        network: Network = ctx.network
        images, *saved = ctx.saved_tensors
        count = len(network.parts.tensors)
        if stock.needed_in_backward(grad) or seen_by_dispatcher([grad]):
            run = partial(network.on_stock, images)
            gradients = network.of_trained(stock.differentiable_gradients(run, saved[:count], [grad], None))
        else:
            parts = network.parts._replace(tensors=saved[:count])
            gradients = ctx.backend.network_backward(grad.contiguous(), images, saved[count:], parts)
        return None, None, None, *gradients


_apply = direct_call(_Node, "densenet_fast::network")
