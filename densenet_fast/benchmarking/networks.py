"""The networks that are measured, by name: the paper's, for ImageNet and for CIFAR."""

import re
from typing import Any

from densenet_fast.reference import ARCHITECTURES

__all__ = ["KNOWN", "architecture", "bc"]

KNOWN = f"{', '.join(ARCHITECTURES)} or densenet_bc<L>, the paper's DenseNet-BC of depth L = 40, 46, 52, ... for CIFAR"


def architecture(name: str) -> dict[str, Any]:
    """The arguments of :class:`densenet_fast.reference.DenseNet` for the network called ``name``.

    ``densenet_bc100`` is the paper's DenseNet-BC (L = 100, k = 12) for images of 32x32; any other depth L with
    L - 4 divisible by 6 is called likewise.

    Raises:
        ValueError: there is no such network.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]._asdict()
    match = re.fullmatch(r"densenet_bc(\d+)", name)
    depth = int(match[1]) if match else 0
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"model: expected {KNOWN}, got {name}")
    return bc(depth)


def bc(depth: int, growth_rate: int = 12) -> dict[str, Any]:
    """The paper's DenseNet-BC of L = ``depth`` for CIFAR: L - 4 convolutions in layers of two, in three blocks. The
    stem, two transitions and the head are the other four."""
    return {
        "growth_rate": growth_rate,
        "block_config": ((depth - 4) // 6,) * 3,
        "num_init_features": 2 * growth_rate,
        "num_classes": 10,
        "small_inputs": True,
    }
