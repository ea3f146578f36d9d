"""What a training step keeps for its backward pass."""

import torch

import densenet_fast
from densenet_fast import reference
from saved_memory import saved_bytes


def test_a_training_step_keeps_a_fraction_of_the_references_memory():
    x = torch.randn(2, 3, 224, 224)
    stock = saved_bytes(reference.densenet121(), x)
    ours = saved_bytes(densenet_fast.densenet121(), x)
    efficient = saved_bytes(densenet_fast.densenet121(memory_efficient=True), x)
    assert ours <= 0.25 * stock
    assert efficient <= 0.08 * stock
    features = 4 * 2 * 56 * 56 * (256 + 512 / 4 + 1024 / 16 + 1024 / 64)
    assert features <= efficient <= 1.02 * features


def test_inference_keeps_nothing():
    with torch.no_grad():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda t: t):
            densenet_fast.DenseNet(8, (2, 2), 12).eval()(torch.randn(2, 3, 40, 40))
    assert not kept
