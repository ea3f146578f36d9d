"""How much more dense blocks move than they must, and the 3x3 kernels ask of the L2 cache than they read."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from densenet_fast.benchmarking.traffic import training_step
from launches.counts import Counts, total

__all__ = ["Audit", "audited"]


class Audit(NamedTuple):
    """Ratios of a training step.

    Attributes:
        features: bytes of the blocks' feature maps and their gradients, divided by their floor. Each counts once a
            launch. The floor is about 4C + 6B + 5k elements for a pixel and a layer (``traffic.py``).
        weights: bytes of their weights and the weights' gradients, divided by that floor. Making the weights for the
            kernels and adding up the gradients counts.
        partials: bytes of their partial results, written and read, divided by that floor.
        asked: bytes of feature maps asked of the L2 cache, divided by those read, which count once a launch: for each
            kernel that convolves 3x3, and for all of them.
    """

    features: float
    weights: float
    partials: float
    asked: dict[str, float]

    def __str__(self) -> str:
        kernels = ", ".join(f"{name.removeprefix('bn_relu_')} {ratio:.3f}" for name, ratio in self.asked.items())
        return (
            f"Blocks move {self.features:.3f} times the floor of 4C + 6B + 5k elements a pixel and layer; for weights "
            f"{self.weights:.3f} of it on top, for partial results {self.partials:.3f}. Asked of the L2 cache, by what "
            f"is read: {kernels}."
        )


ALL = "all 3x3"


def audited(
    counts: Sequence[Counts],
    arguments: dict[str, Any],
    batch: int,
    size: int,
    itemsize: int,
    memory_efficient: bool = False,
) -> Audit:
    """Of the counts of a training step of ``DenseNet(**arguments)`` on [batch, 3, size, size]."""
    floor = block_bytes(arguments, batch, size, itemsize, memory_efficient)
    floor -= block_bytes(arguments, 0, size, itemsize, memory_efficient)
    blocks = [one for one in counts if one.part == "blocks"]
    whole, made = total(blocks), total(one for one in blocks if one.kernel == "prepare_kernel")
    features = whole.read + whole.written - made.dram
    weights = whole.weights + made.dram
    asked: dict[str, list[Counts]] = {}
    for one in blocks:
        if "conv3x3" in one.kernel:
            asked.setdefault(one.kernel, []).append(one)
    asked[ALL] = [one for ones in list(asked.values()) for one in ones]
    sums = {name: total(ones) for name, ones in asked.items()}
    ratios = {name: one.asked / one.read for name, one in sums.items()}
    return Audit(features / floor, weights / floor, whole.partials / floor, ratios)


def block_bytes(arguments: dict[str, Any], batch: int, size: int, itemsize: int, memory_efficient: bool) -> int:
    """The floor of all dense blocks. For no images it is that of the weights."""
    calls = training_step(arguments, batch, size, itemsize, memory_efficient)
    return sum(call.bytes for call in calls if call.part.startswith("block"))
