"""The dense block and its layers."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from densenet_fast import functional, reference
from densenet_fast.functional import BatchStatistics
from densenet_fast.nn import fusion


class DenseLayer(reference.DenseLayer):
    """One dense layer; alone it runs on stock ops, within a :class:`DenseBlock` it runs fused.

    See :class:`densenet_fast.reference.DenseLayer` for the arguments.
    """

    __prepare_scriptable__ = fusion.refuse_scripting

    def stages(self) -> list[tuple[str, str, str, int]]:
        """Its BN-ReLU-convolutions: names of the norm, the ReLU and the convolution, and the kernel size."""
        if self.bottleneck:
            return [("norm1", "relu1", "conv1", 1), ("norm2", "relu2", "conv2", 3)]
        return [("norm1", "relu1", "conv1", 3)]

    def units(self) -> list[functional.BNReLUConv]:
        """Its tensors as :func:`densenet_fast.functional.dense_block` takes them."""
        return [fusion.unit(self, norm, conv) for norm, _, conv, _ in self.stages()]


class DenseBlock(reference.DenseBlock):
    """A dense block as one fused op over one buffer: nothing is concatenated, no normalised copy is kept.

    Where it cannot run fused (see :meth:`obstacle`), it runs its layers one by one on stock ops, with the same result.

    Args:
        num_layers: number of layers, L.
        num_input_features: channels of its input, C0.
        bn_size: bottlenecks have bn_size * k channels; None for layers without a bottleneck.
        growth_rate: channels that each layer adds, k.
        drop_rate: dropout rate of each layer's new features.
        memory_efficient: whether to recompute the bottlenecks in the backward pass instead of keeping them.
        bias: whether the convolutions have biases.
        spatial_dims: 1, 2 or 3.

    Input [N, C0, *spatial], output [N, C0 + L * k, *spatial], channels last in memory when it ran fused. Under autocast
    the whole output has its dtype; the channels of a float32 input, which stock keeps in float32, are rounded to it.
    """

    layer_type = DenseLayer
    __prepare_scriptable__ = fusion.refuse_scripting

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None = 4,
        growth_rate: int = 32,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        *,
        bias: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__(
            num_layers, num_input_features, bn_size, growth_rate, drop_rate, bias=bias, spatial_dims=spatial_dims
        )
        self.memory_efficient = memory_efficient
        self.spatial_dims = spatial_dims

    def obstacle(self) -> str | None:
        """Why its layers cannot run as one op, or None: a hook on one of them, a replaced module, ..."""
        if not len(self):
            return "it has no layers"
        for name, layer in self.items():
            if type(layer) is not DenseLayer:
                return f"{name} is a {type(layer).__name__}, not a DenseLayer"
            if fusion.has_hooks(layer):
                return f"{name} has a hook or a forward of its own"
            for stage in layer.stages():
                reason = fusion.structural_obstacle(layer, *stage)
                if reason is not None:
                    return f"{name}.{reason}"
        if len({layer.bottleneck for layer in self.values()}) != 1:
            return "some of its layers have a bottleneck and some none"
        return None

    def reads_statistics(self) -> bool:
        """Whether it normalises its input by the batch's statistics, when it runs fused."""
        return any(fusion.normalises_by_batch(layer.norm1) for layer in self.values())

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, describe: bool
    ) -> tuple[Tensor, BatchStatistics | None]:
        """``forward`` with x's statistics, where they are known, and those of its result, if asked to describe it."""
        if fusion.call_obstacle(x, self.spatial_dims) or self.obstacle():
            return super().forward(x), None
        layers: Sequence[Any] = list(self.values())
        result = functional.dense_block(
            x,
            [layer.units() for layer in layers],
            [layer.drop_rate if layer.training else 0.0 for layer in layers],
            self.memory_efficient,
            statistics=statistics,
            return_statistics=describe,
        )
        return result if describe else (result, None)

    def forward(self, init_features: Tensor) -> Tensor:
        return self.run(init_features, None, describe=False)[0]
