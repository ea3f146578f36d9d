"""Random dense blocks by their plans against the same walked, bitwise. ``test_plan.py`` runs this file in Triton's
interpreter and with the emulated library: a part of the blocks, or, with the environment variable
DENSENET_FAST_ALL_BLOCKS=1, all of them."""

import os
import random
import time

import torch

from backends.plan.bodies import equal
from backends.plan.walks import plans, tf32
from densenet_fast import functional
from densenet_fast.functional import BatchNorm, BatchStatistics, BNReLUConv

BLOCKS = 500
SECONDS = 8
"""Of CPU time, after which the ordinary run stops."""
LEAST = 8
"""Blocks that it runs all the same."""


class Block:
    """A random block; equal for equal seeds."""

    def __init__(self, seed: int) -> None:
        draw = self.draw = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = draw.choice([torch.float32, torch.float16])
        self.bias, self.bottleneck = draw.random() < 0.1, draw.random() < 0.9
        channels, shape = draw.randint(1, 9), (draw.randint(1, 2), draw.randint(1, 6), draw.randint(1, 6))
        self.x = self.normal(shape[0], channels, *shape[1:])
        if draw.random() < 0.5:
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.x.requires_grad_(draw.random() < 0.8)
        self.frozen = 1.0 if self.x[:, 0].numel() == 1 else draw.choice([0, 0, 0.3, 1])
        self.needs = draw.choice([1, 1, 0.5, 0.1])
        self.layers, self.leaves = [], [self.x]
        read = channels
        for _ in range(draw.choice([1, 1, 2, 3])):
            new = draw.randint(1, 5)
            width = draw.randint(1, 9)
            sizes = [(read, width, 1), (width, new, 3)] if self.bottleneck else [(read, new, 3)]
            self.layers.append([self.unit(*each) for each in sizes])
            read += new
        self.recomputed = [draw.random() < 0.4 for _ in self.layers]
        self.given, self.returned, self.prepend = draw.random() < 0.4, draw.random() < 0.5, draw.random() < 0.3
        self.grads = [self.normal(shape[0], read, *shape[1:]), *(self.normal(read).float() for _ in range(2))]
        self.grads[0] = self.grads[0].contiguous(memory_format=torch.channels_last)
        self.read = [True, *(self.returned and draw.random() < 0.6 for _ in range(2))]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def leaf(self, t: torch.Tensor) -> torch.Tensor:
        self.leaves.append(t.requires_grad_(self.draw.random() < self.needs))
        return t

    def unit(self, read: int, new: int, kernel: int) -> BNReLUConv:
        draw, vectors = self.draw, self.draw.choice([self.dtype, torch.float32])
        frozen, affine = draw.random() < self.frozen, draw.random() < 0.8
        mean, var = self.normal(read).to(vectors), self.normal(read).abs().add(0.5).to(vectors)
        norm = BatchNorm(
            self.leaf(self.normal(read).to(vectors)) if affine else None,
            self.leaf(self.normal(read).to(vectors)) if affine else None,
            *((mean, var, torch.tensor(0)) if frozen or draw.random() < 0.7 else (None, None, None)),
            training=not frozen,
            eps=draw.choice([1e-5, 1e-5, 1e-3]),
        )
        weight = self.normal(new, read, kernel, kernel) / read**0.5
        if draw.random() < 0.5:
            weight = weight.contiguous(memory_format=torch.channels_last)
        return BNReLUConv(norm, self.leaf(weight), self.leaf(self.normal(new)) if self.bias else None)

    def reasons(self) -> set[str]:
        """Why its bodies may be walked: the backward pass sums to the gradient of a bias, or adds to gradients where
        there is no bottleneck, or stores a weight's gradient with strides that a dimension of one leaves open; the
        second normalisation of a layer has a weight and the first has none, or the other way round."""
        sizes = [size for layer in self.layers for unit in layer for size in unit.weight.shape[:2]]
        mixed = any(len({unit.norm.weight is None for unit in layer}) == 2 for layer in self.layers)
        reasons = {
            "aten.sum.dim_IntList": self.bias,
            "aten.add.out": not self.bottleneck,
            "aten.copy_.default": 1 in sizes,
            "aten.mul.Tensor": mixed,
        }
        return {f"it calls {operation}" for operation, possible in reasons.items() if possible}

    def run(self) -> list[torch.Tensor | None]:
        """The features, their statistics if returned, all gradients and the running statistics."""
        statistics = None
        if self.given:
            var, mean = torch.var_mean(self.x.detach().float(), [0, 2, 3], correction=0)
            statistics = BatchStatistics(mean, var)
        options = dict(prepend=self.prepend, statistics=statistics, return_statistics=self.returned)
        made = functional.dense_block(self.x, self.layers, None, self.recomputed, **options)
        made = [made[0], *made[1][:2]] if self.returned else [made]
        found = list(made)
        asked = [(t, g) for t, g, read in zip(made, self.grads, self.read) if read and t.requires_grad]
        wanted = [t for t in self.leaves if t.requires_grad]
        if asked and wanted:
            outputs, grads = map(list, zip(*asked))
            found += torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
        for layer in self.layers:
            for unit in layer:
                found += [unit.norm.running_mean, unit.norm.running_var, unit.norm.num_batches_tracked]
        return found


def test_random_blocks():
    """All bodies are planned, but for those that do what :meth:`Block.reasons` says."""
    everything = os.environ.get("DENSENET_FAST_ALL_BLOCKS") == "1"
    seeds = random.Random(0).sample(range(BLOCKS), BLOCKS)
    start, count, planned = time.process_time(), 0, 0
    with tf32():
        for seed in seeds:
            if not everything and count >= LEAST and time.process_time() - start > SECONDS:
                break
            expected = Block(seed).run()
            with plans() as bodies:
                block = Block(seed)
                made = block.run()
            for i, (one, other) in enumerate(zip(made, expected, strict=True)):
                assert equal(one, other), f"block {seed}: {i} of {len(made)}"
            assert bodies.reasons() <= block.reasons(), f"block {seed}: {bodies.walked}"
            count, planned = count + 1, planned + len(bodies.planned)
    assert planned > count
    print(f"{count} blocks, {planned} planned bodies, {time.process_time() - start:.0f} s of CPU time")
