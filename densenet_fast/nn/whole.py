"""The whole network in one chain: its convolutional part, and the head before the classifier."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from densenet_fast import functional, inference, reference
from densenet_fast.functional import BatchStatistics, Updates
from densenet_fast.nn import calls, fusion
from densenet_fast.nn.features import Features, Part, Stem, Step, rectified
from densenet_fast.operands import NormOperands


class Head(Step):
    """``norm5`` of ``model.features``, with the ReLU and the average behind it."""

    def __init__(self, model: nn.Module) -> None:
        self.norm = model.features.norm5
        super().__init__(self.norm)
        self.model, self.operands = weakref.ref(model), NormOperands(fusion.batch_norm(self.norm))

    def obstacle(self, x: Tensor) -> str | None:
        return fusion.input_obstacle(x, 2)

    def reads_statistics(self) -> bool:
        return self.operands.reads_statistics

    def reads_block(self) -> NormOperands:
        return self.operands

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, return_statistics: bool, updates: Updates | None
    ) -> tuple[Tensor, BatchStatistics | None]:
        return functional.run_bn_relu_global_avgpool(x, self.operands, statistics, updates), None

    def stock(self, x: Tensor) -> Tensor:
        return reference.average(rectified(self.norm(x)))

    def note(self, reason: str | None) -> None:
        calls.note(self.model(), reason, self.operands, "Head")


class Whole:
    """The steps of a network's features but the last, ``norm5``, and the head, which has that too."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._known = _Known([], [], None)

    def means(self, features: Features, images: Tensor) -> Tensor:
        """The means of the rectified features."""
        if torch.compiler.is_compiling():
            return features.through(images, [*features.steps()[:-1], self._head])
        made = self._by_kernels(features, images)
        if made is not None:
            return made
        given = features.steps()
        known = self._known
        if known.given is not given:
            steps = [*given[:-1], self._head]
            known = self._known = _Known(given, steps, _network(steps))
        updates = Updates()
        made = features.through(images, known.steps, updates)
        if known.network is not None and updates.room.served == len(known.steps):
            known.network.admit(images)
        return made

    def _by_kernels(self, features: Features, images: Tensor) -> Tensor | None:
        """The same by kernels of inference alone. None where they have not run all steps with such images before."""
        given, steps, network = self._known
        if network is None or not network.admits(images) or features.held_steps() is not given:
            return None
        try:
            made = network.run(images)
        except RuntimeError:  # the steps know what to do, or what is wrong
            return None
        for step in steps:
            step.note(None)
        return made


class _Known(NamedTuple):
    """The steps of the features that were given last, those with the head, and the network that they make, if they make
    one."""

    given: list[Step]
    steps: list[Step]
    network: inference.Network | None


def _network(steps: Sequence[Step]) -> inference.Network | None:
    """The steps as the kernels of inference take them. None unless they are a stem, dense blocks and transitions by
    turns, and a head."""
    stem, *parts, head = steps
    fused = isinstance(stem, Stem) and stem.convolution is not None and all(isinstance(part, Part) for part in parts)
    turns = len(parts) % 2 == 1 and all(part.keeps_output == (i % 2 == 0) for i, part in enumerate(parts))
    if not (fused and turns):
        return None
    return inference.Network(stem.convolution, [stem.operands, *(part.found.operands for part in parts), head.operands])
