"""BN-ReLU-Conv1x1 as a module of its own, and the transition between dense blocks."""

import torch
from torch import Tensor, nn

from densenet_fast import functional, reference
from densenet_fast.functional import BatchStatistics, Updates
from densenet_fast.nn import calls, fusion
from densenet_fast.nn.memory_format import handed_out, is_channels_last
from densenet_fast.nn.snapshot import Found, Memory, all_below
from densenet_fast.operands import ConvOperands


class _Fusible(nn.Sequential):
    """A Sequential around one 1x1 convolution, ``conv``, that runs as one op unless there is an obstacle."""

    def obstacle(self) -> str | None:
        """Why its children cannot run as one op, or None."""
        raise NotImplementedError

    def found(self) -> Found:
        """Its obstacle now, or its operands. They are searched for again only after a change."""
        raise NotImplementedError

    def _op(self, x: Tensor, operands: ConvOperands) -> Tensor:
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self._forward(input)
        for module in self:
            input = module(input)
        return input

    def _forward(self, input: Tensor) -> Tensor:
        reason, operands = fusion.call_obstacle(input, self.spatial_dims), None
        if reason is None:
            reason, operands = self.found()
        calls.note(self, reason, operands)
        return fusion.run(self._alone, input, operands) if reason is None else super().forward(input)

    def _alone(self, x: Tensor, operands: ConvOperands) -> Tensor:
        return handed_out(self._op(x, operands), is_channels_last(x) or is_channels_last(self.conv.weight), kept=False)


class BNReLUConv1x1(_Fusible):
    """Batch normalisation, ReLU and a 1x1 convolution in one op that saves its input alone for the backward pass.

    Args:
        in_channels: channels of its input, C.
        out_channels: channels of its output, C'.
        bias: whether the convolution has a bias.
        spatial_dims: 1, 2 or 3.

    Input [N, C, *spatial], output [N, C', *spatial], in the memory format of its input, or of a channels-last weight.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = False, spatial_dims: int = 2) -> None:
        super().__init__()
        self.norm = reference.BATCH_NORMS[spatial_dims](in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = reference.CONVOLUTIONS[spatial_dims](in_channels, out_channels, kernel_size=1, bias=bias)
        self.spatial_dims = spatial_dims

    def obstacle(self) -> str | None:
        """Why its children cannot run as one op, or None."""
        if list(self._modules) != ["norm", "relu", "conv"]:
            return f"its children are {', '.join(self._modules)}"
        return fusion.structural_obstacle(self, "norm", "relu", "conv", 1)

    def found(self) -> Found:
        """Its obstacle now, or its operands. They are searched for again only after a change."""
        return _alone_memory(self)

    def _op(self, x: Tensor, operands: ConvOperands) -> Tensor:
        return functional.run_bn_relu_conv1x1(x, operands)


class Transition(_Fusible, reference.Transition):
    """BN-ReLU-Conv1x1-AvgPool2 in one op, which pools first and saves its input alone for the backward pass.

    Args:
        num_input_features: channels of its input, C.
        num_output_features: channels of its output, C'.
        bias: whether the convolution has a bias.
        spatial_dims: 1, 2 or 3.

    Input [N, C, *spatial], output [N, C', *spatial // 2], in the memory format of its input, or of a
    channels-last weight.
    """

    def __init__(
        self, num_input_features: int, num_output_features: int, *, bias: bool = False, spatial_dims: int = 2
    ) -> None:
        super().__init__(num_input_features, num_output_features, bias=bias, spatial_dims=spatial_dims)
        self.spatial_dims = spatial_dims

    def obstacle(self) -> str | None:
        """Why its children cannot run as one op, or None."""
        if list(self._modules) != ["norm", "relu", "conv", "pool"]:
            return f"its children are {', '.join(self._modules)}"
        return (
            fusion.hook_obstacle(self, "pool")
            or fusion.average_pool_obstacle(self, "pool", self.spatial_dims)
            or fusion.structural_obstacle(self, "norm", "relu", "conv", 1)
        )

    def found(self) -> Found:
        """Its obstacle now, or its operands. They are searched for again only after a change."""
        return _transition_memory(self)

    def run(
        self,
        x: Tensor,
        operands: ConvOperands,
        statistics: BatchStatistics | None,
        return_statistics: bool,
        updates: Updates | None = None,
    ) -> tuple[Tensor, BatchStatistics | None]:
        """Runs as one op, which must be possible. ``statistics`` are the batch statistics of x, or None.

        Returns the result, channels last in memory, and with ``return_statistics`` its statistics.
        """
        return functional.run_bn_relu_conv1x1_avgpool(x, operands, statistics, return_statistics, updates)

    def _op(self, x: Tensor, operands: ConvOperands) -> Tensor:
        return self.run(x, operands, None, return_statistics=False)[0]


def _examined(part: _Fusible) -> Found:
    reason = part.obstacle()
    return Found(reason, ConvOperands(fusion.unit(part, "norm", "conv")) if reason is None else None)


_alone_memory = Memory(_examined, all_below, (BNReLUConv1x1,))
_transition_memory = Memory(_examined, all_below, (Transition,))
fusion.watch(BNReLUConv1x1, "forward")
fusion.watch(Transition, "forward")
