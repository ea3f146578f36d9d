"""Synchronised batch normalisation that also works on CPUs."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

STOCK_DEVICES = ("cuda", "hpu", "xpu")


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """``torch.nn.SyncBatchNorm``, with CPU tensors (over gloo) as well; on other devices it is torch's.

    ``SyncBatchNorm.convert_sync_batchnorm(model)`` converts a model, as torch's does. Batches may differ in size from
    process to process; each weighs by its number of values. (It is not a subclass of torch's, which
    DistributedDataParallel refuses on CPUs.)
    """

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
        """Converts every batch normalisation in ``module``, keeping its parameters and buffers; returns the module."""
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for child in module.modules():
            if type(child) is nn.SyncBatchNorm:
                child.__class__ = cls
        return module

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type in STOCK_DEVICES:
            return nn.SyncBatchNorm.forward(self, x)
        group = self.process_group or dist.group.WORLD
        if not self.training or not dist.is_initialized() or dist.get_world_size(group) == 1:
            return super().forward(x)
        self._check_input_dim(x)
        self._check_non_zero_input_channels(x)
        values = x.movedim(1, -1).reshape(-1, x.shape[1]).to(torch.promote_types(x.dtype, torch.float32))
        count = values.new_full((), values.shape[0])
        dist.all_reduce(count, group=group)
        mean = all_reduce(values.sum(0), group=group) / count
        centred = values - mean
        var = all_reduce(centred.square().sum(0), group=group) / count
        self._update(mean.detach(), var.detach() * count / (count - 1))
        y = centred * torch.rsqrt(var + self.eps)
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)

    @torch.no_grad()
    def _update(self, mean: Tensor, unbiased: Tensor) -> None:
        if not self.track_running_stats:
            return
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - momentum).add_(mean * momentum)
        self.running_var.mul_(1 - momentum).add_(unbiased * momentum)
