"""The dense block and its layers."""

import torch
from torch import Tensor

from densenet_fast import functional, reference
from densenet_fast.functional import BatchStatistics, Updates
from densenet_fast.nn import calls, fusion
from densenet_fast.nn.memory_format import handed_out, is_channels_last
from densenet_fast.nn.recomputation import recomputable, recomputed
from densenet_fast.nn.snapshot import Found, Memory, all_below
from densenet_fast.operands import BlockOperands


class DenseLayer(reference.DenseLayer):
    """One dense layer; alone it runs on stock ops, within a :class:`DenseBlock` it runs fused.

    ``memory_efficient`` says whether its bottleneck is recomputed in the backward pass instead of kept; it may be
    changed at any time. See :class:`densenet_fast.reference.DenseLayer` for the other arguments.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int | None = 4,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
        *,
        bias: bool = False,
        spatial_dims: int = 2,
    ) -> None:
        super().__init__(num_input_features, growth_rate, bn_size, drop_rate, bias=bias, spatial_dims=spatial_dims)
        self.memory_efficient = memory_efficient

    def stages(self) -> list[tuple[str, str, str, int]]:
        """Its BN-ReLU-convolutions: names of the norm, the ReLU and the convolution, and the kernel size."""
        if self.bottleneck:
            return [("norm1", "relu1", "conv1", 1), ("norm2", "relu2", "conv2", 3)]
        return [("norm1", "relu1", "conv1", 3)]

    def units(self) -> list[functional.BNReLUConv]:
        """Its tensors as :func:`densenet_fast.functional.dense_block` takes them."""
        return [fusion.unit(self, norm, conv) for norm, _, conv, _ in self.stages()]

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        """BN-ReLU-convolution of the concatenated ``inputs``: the bottleneck, where there is one."""
        if not torch.jit.is_scripting():
            if self.memory_efficient and recomputable(inputs):
                return recomputed(self._bn_function, inputs, [self.norm1, self.relu1, self.conv1])
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def _bn_function(self, *inputs: Tensor) -> Tensor:
        return super().bn_function(inputs)


class DenseBlock(reference.DenseBlock):
    """A dense block as one fused op over one buffer: nothing is concatenated, no normalised copy is kept.

    Where it cannot run fused (see :meth:`obstacle`), it runs its layers one by one on stock ops, with the same result.

    Args:
        num_layers: number of layers, L.
        num_input_features: channels of its input, C0.
        bn_size: bottlenecks have bn_size * k channels; None for layers without a bottleneck.
        growth_rate: channels that each layer adds, k.
        drop_rate: dropout rate of each layer's new features.
        memory_efficient: whether to recompute the bottlenecks in the backward pass instead of keeping them: of all
            layers, or, set on one of them, of that layer.
        bias: whether the convolutions have biases.
        spatial_dims: 1, 2 or 3.
        prepend: whether each layer's features come before those that it reads, ``torch.cat([new, x], 1)``, instead of
            behind them.

    Input [N, C0, *spatial], output [N, C0 + L * k, *spatial], in its input's memory format. Under autocast the whole
    output has its dtype; the channels of a float32 input, which stock keeps in float32, are rounded to it.
    """

    layer_type = DenseLayer
    __jit_unused_properties__ = ["memory_efficient"]

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
        prepend: bool = False,
    ) -> None:
        options = {"memory_efficient": memory_efficient, "bias": bias, "spatial_dims": spatial_dims}
        super().__init__(num_layers, num_input_features, bn_size, growth_rate, drop_rate, prepend=prepend, **options)
        self.spatial_dims = spatial_dims

    @property
    def memory_efficient(self) -> bool:
        """Whether all layers are memory efficient; setting it sets it for each."""
        return bool(len(self)) and all(getattr(layer, "memory_efficient", False) for layer in self.values())

    @memory_efficient.setter
    def memory_efficient(self, value: bool) -> None:
        for layer in self.values():
            layer.memory_efficient = value

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

    def operands(self) -> BlockOperands:
        """What its op takes beside the input. Ask only where :meth:`obstacle` finds none."""
        layers = list(self.values())
        return BlockOperands(
            [layer.units() for layer in layers],
            [layer.drop_rate if layer.training else 0.0 for layer in layers],
            [layer.memory_efficient for layer in layers],
            prepend=self.prepend,
        )

    def found(self) -> Found:
        """Its obstacle now, or its operands. They are searched for again only after a change."""
        return _memory(self)

    def run(
        self,
        x: Tensor,
        operands: BlockOperands,
        statistics: BatchStatistics | None,
        return_statistics: bool,
        updates: Updates | None = None,
    ) -> tuple[Tensor, BatchStatistics | None]:
        """Runs as one op, which must be possible. ``statistics`` are the batch statistics of x, or None.

        Returns the result, channels last in memory, and with ``return_statistics`` its statistics. The backward pass
        needs the result unchanged.
        """
        return functional.run_dense_block(x, operands, statistics, return_statistics, updates)

    def forward(self, init_features: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self._forward(init_features)
        return self.one_by_one(init_features)

    def _forward(self, x: Tensor) -> Tensor:
        reason, operands = fusion.call_obstacle(x, self.spatial_dims), None
        if reason is None:
            reason, operands = self.found()
        calls.note(self, reason, operands)
        return fusion.run(self._alone, x, operands) if reason is None else self.one_by_one(x)

    def _alone(self, x: Tensor, operands: BlockOperands) -> Tensor:
        return handed_out(self.run(x, operands, None, return_statistics=False)[0], is_channels_last(x), kept=True)


def _examined(block: DenseBlock) -> Found:
    reason = block.obstacle()
    return Found(reason, block.operands() if reason is None else None)


_memory = Memory(_examined, all_below, (DenseBlock, DenseLayer))
fusion.watch(DenseLayer, "forward", "bn_function")
fusion.watch(DenseBlock, "forward", "one_by_one")
