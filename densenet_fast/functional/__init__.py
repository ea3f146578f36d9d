"""The fused ops as functions: what ``torch.nn.functional`` is to ``torch.nn``.

Like ``torch.nn.functional.batch_norm`` they update the running statistics that they are given in place, once per call,
with the unbiased variance. All take feature maps [N, C, *spatial] with 1, 2 or 3 spatial dimensions, in any memory
format, and return channels-last memory. Under autocast those with a convolution run in its dtype.

Each has a second form for the modules, ``run_...``, which takes operands that were gathered before. It checks them once
for each kind of input. An operation stands in the file of its name.
"""

from densenet_fast.functional.bn_conv1x1_avgpool import bn_conv1x1_avgpool, run_bn_conv1x1_avgpool
from densenet_fast.functional.bn_relu_conv1x1 import (
    bn_relu_conv1x1,
    bn_relu_conv1x1_avgpool,
    run_bn_relu_conv1x1,
    run_bn_relu_conv1x1_avgpool,
)
from densenet_fast.functional.bn_relu_global_avgpool import bn_relu_global_avgpool, run_bn_relu_global_avgpool
from densenet_fast.functional.bn_relu_maxpool import bn_relu_maxpool, run_bn_relu_maxpool, run_stem
from densenet_fast.functional.chain import run_dense_block_and_reader
from densenet_fast.functional.dense_block import dense_block, run_dense_block
from densenet_fast.functional.network import TrainingNetwork
from densenet_fast.functional.shared import BatchStatistics, Updates
from densenet_fast.operands import BatchNorm, BNReLUConv

__all__ = [
    "BatchNorm",
    "BatchStatistics",
    "BNReLUConv",
    "bn_conv1x1_avgpool",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_avgpool",
    "bn_relu_global_avgpool",
    "bn_relu_maxpool",
    "dense_block",
]
