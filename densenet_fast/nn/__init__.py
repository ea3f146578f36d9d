"""Modules for any network. Each runs fused where it can, and on stock torch ops elsewhere."""

from densenet_fast.nn.bn_relu_conv1x1 import BNReLUConv1x1, Transition
from densenet_fast.nn.dense_block import DenseBlock, DenseLayer
from densenet_fast.nn.sync_batch_norm import SyncBatchNorm

__all__ = ["BNReLUConv1x1", "DenseBlock", "DenseLayer", "SyncBatchNorm", "Transition"]
