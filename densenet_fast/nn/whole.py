"""The whole network in one chain: its convolutional part, and the head before the classifier."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from densenet_fast import functional, inference, reference
from densenet_fast.functional import BatchStatistics, Updates
from densenet_fast.nn import calls, fusion
from densenet_fast.nn.features import Features, Stem, Step, rectified
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
        self._known: _Known | None = None

    def means(self, features: Features, images: Tensor) -> Tensor:
        """The means of the rectified features."""
        if torch.compiler.is_compiling():
            return features.through(images, [*features.steps()[:-1], self._head])
        made = self._in_one_go(features, images)
        if made is not None:
            return made
        given = features.steps()
        steps, updates = [*given[:-1], self._head], Updates()
        made = features.through(images, steps, updates)
        if self._known is None or self._known.given is not given:
            self._known = _Known.of(given, steps)
        if len(updates.room.served) == len(steps) and self._known.inference is not None:
            self._known.inference.admit(images)
        if self._known.training is not None:
            self._known.training.admit(images)
        return made

    def _in_one_go(self, features: Features, images: Tensor) -> Tensor | None:
        """:meth:`means` without the steps. None unless such images have been admitted, and no module has changed
        since."""
        known = self._known
        network = None if known is None else known.network(images)
        if network is None or features.held_steps() is not known.given:
            return None
        try:
            made = network.run(images)
        except RuntimeError:  # the steps know what to do, or what is wrong
            return None
        for step in known.steps:
            step.note(None)
        return made


class _Known(NamedTuple):
    """The steps of the features, those of the whole, and the network that they make, if they make one: for inference
    and for training."""

    given: Sequence[Step]
    steps: Sequence[Step]
    inference: inference.Network | None
    training: functional.TrainingNetwork | None

    @classmethod
    def of(cls, given: Sequence[Step], steps: Sequence[Step]) -> "_Known":
        parts, stem = [step.operands for step in steps], steps[0]
        if not inference.Network.consists_of(parts) or not isinstance(stem, Stem) or stem.convolution is None:
            return cls(given, steps, None, None)
        training = None if stem.recomputed else functional.TrainingNetwork(stem.convolution, parts)
        return cls(given, steps, inference.Network(stem.convolution, parts), training)

    def network(self, images: Tensor) -> inference.Network | functional.TrainingNetwork | None:
        """The network that admits such images."""
        return next((n for n in (self.inference, self.training) if n is not None and n.admits(images)), None)
