"""What a launch moves and multiplies, counted: bytes of memory, bytes asked of the L2 cache, multiply-adds."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

__all__ = ["Counts", "tiles_of", "total"]


@dataclass(frozen=True)
class Counts:
    """The counts of one launch, or of several added up. All but the products are bytes.

    A kernel asks of the L2 cache all that its blocks load, hits in L1 aside. Halos, and operands that several blocks
    read, count once for each block. What it stores it stores once. Vectors of one value a column are left out.

    Attributes:
        kernel: its name on the GPU.
        part: of the network: ``blocks``, ``transitions``, ``stem``, ``head``.
        launches: how many.
        read, asked: of feature maps and their gradients, each once; and as asked of the L2 cache.
        written: of feature maps and their gradients.
        weights, weights_asked: of convolutions' weights and their gradients, each once; as asked.
        partials, partials_asked: of partial results that are written or read, each once; as asked.
        wgmma, mma: multiply-adds by a warp group's asynchronous instruction and by a warp's own (``mma.sync``). What
            tiles of powers of two add is included.
    """

    kernel: str
    part: str = ""
    launches: int = 1
    read: int = 0
    asked: int = 0
    written: int = 0
    weights: int = 0
    weights_asked: int = 0
    partials: int = 0
    partials_asked: int = 0
    wgmma: int = 0
    mma: int = 0

    @property
    def dram(self) -> int:
        """Bytes that memory moves if the cache keeps what a launch reads twice, and nothing from launch to launch."""
        return self.read + self.written + self.weights + self.partials

    @property
    def l2(self) -> int:
        """Bytes that the L2 cache serves."""
        return self.asked + self.written + self.weights_asked + self.partials_asked

    @property
    def products(self) -> int:
        return self.wgmma + self.mma

    def of(self, part: str) -> "Counts":
        """The same, of that part of the network."""
        return replace(self, part=part)

    def __add__(self, other: "Counts") -> "Counts":
        """Both, under this one's name."""
        numbers = [f.name for f in fields(self) if f.name not in ("kernel", "part")]
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in numbers})


def total(counts: Iterable[Counts], kernel: str = "total") -> Counts:
    """All added up."""
    return sum(counts, Counts(kernel, launches=0))


def tiles_of(size: int, side: int) -> int:
    return -(-size // side)
