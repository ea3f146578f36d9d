"""The custom ops, ``torch.ops.densenet_fast``: functional, with fake kernels and autograd."""

from densenet_fast.ops.bn_conv1x1_avgpool import bn_conv1x1_avgpool
from densenet_fast.ops.bn_relu_conv1x1 import bn_relu_conv1x1
from densenet_fast.ops.bn_relu_global_avgpool import bn_relu_global_avgpool
from densenet_fast.ops.bn_relu_maxpool import bn_relu_maxpool
from densenet_fast.ops.dense_block import dense_block
from densenet_fast.ops.flops import register

register()

__all__ = ["bn_conv1x1_avgpool", "bn_relu_conv1x1", "bn_relu_global_avgpool", "bn_relu_maxpool", "dense_block"]
