"""Independent random streams, each named by what it is for."""

import hashlib

import torch

__all__ = ["generator", "stream_seed"]


def stream_seed(*names: int | str) -> int:
    """A 63-bit seed that depends on ``names`` alone, as ``stream_seed(seed, "order", epoch)``."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*names: int | str) -> torch.Generator:
    """A CPU generator seeded with :func:`stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(*names))
