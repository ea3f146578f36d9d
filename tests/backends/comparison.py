"""Results of a backend beside ``aten``'s, both measured against ``aten``'s in float64."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_fast.backends import serving
from densenet_fast.backends.contract import Backend
from helpers import error


def served(dtypes: Sequence[torch.dtype]) -> dict[str, tuple[Backend, torch.dtype]]:
    """Every backend with every one of ``dtypes`` that it runs here, under the names that tests have for them."""
    device = torch.get_default_device()
    return {f"{b.name}-{dtype}": (b, dtype) for dtype in dtypes for b in serving(device, dtype)}


class Comparison(NamedTuple):
    """Relative errors of one result against float64: ours, stock's, and what is allowed."""

    name: str
    ours: float
    stock: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.ours <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: off by {self.ours:.2e}, stock by {self.stock:.2e}, allowed {self.allowed:.2e}"


def compare(
    truth: dict[str, Tensor],
    theirs: dict[str, Tensor],
    ours: dict[str, Tensor],
    dtype: torch.dtype,
    rounding: float = 0.0,
    rounded: dict[str, Tensor] | None = None,
) -> list[Comparison]:
    """Each result of ``ours``; allowed are twice stock's error in ``dtype`` and the rounding of one result.

    Args:
        truth: results in float64, those of ``theirs`` and ``ours`` in ``dtype``; NaN where nobody writes.
        rounding: relative, of operands that are rounded more than ``dtype`` says.
        rounded: what is exact for operands rounded so; what that changes is allowed twice, too.

    Raises:
        AssertionError: another shape or dtype than stock's, or NaN elsewhere than in the truth.
    """
    found = []
    for name, exact in truth.items():
        stock, got = theirs[name], ours[name]
        assert got.dtype == stock.dtype and got.shape == stock.shape, (name, got.dtype, got.shape, stock.shape)
        assert got.isnan().equal(exact.isnan()), f"{name}: NaN in other places than in the truth"
        near = exact if rounded is None else rounded[name]
        exact, stock, got, near = (t.double().nan_to_num(0) for t in (exact, stock, got, near))
        norm = exact.norm().item()
        conditioned = 2 * (stock - exact).norm().item() + 2 * (near - exact).norm().item()
        allowed = conditioned + (2 * torch.finfo(dtype).eps + rounding) * norm + 1e-6
        found.append(Comparison(name, error(got, exact), error(stock, exact), allowed / max(norm, 1e-300)))
    return found
