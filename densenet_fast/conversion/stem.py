"""Stems and heads of any library: their layouts, read from their modules alone, and their operands.

A stem is batch normalisation, ReLU and max pooling over windows of 3. The convolution before them belongs to the
stem if it is in the same module. A head is batch normalisation, ReLU, the mean over all pixels and a flattening.
"""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from densenet_fast import functional
from densenet_fast.conversion import layout
from densenet_fast.conversion.classes import Classes
from densenet_fast.conversion.expected import Expected, expected_of
from densenet_fast.conversion.layout import Dropout, NotRecognised
from densenet_fast.functional import BatchStatistics, Updates
from densenet_fast.nn import fusion
from densenet_fast.nn.memory_format import convolved, is_channels_last
from densenet_fast.operands import NormOperands

MEANS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


class StemLayout(NamedTuple):
    """See :class:`densenet_fast.conversion.layout.PartLayout`."""

    dims: int
    conv: str | None
    norm: str
    pool: str
    expected: Expected
    classes: Classes

    kind = "Stem"
    pools = True

    @property
    def convolves(self) -> bool:
        return self.conv is not None

    def channels(self, module: nn.Module) -> int:
        if self.conv is not None:
            return fusion.child(module, self.conv).in_channels
        return fusion.normalised_channels(fusion.child(module, self.norm))

    def obstacle(self, module: nn.Module) -> str | None:
        kind = None if self.conv is None else type(fusion.child(module, self.conv))
        if kind is not None and fusion.DIMENSIONS.get(kind) != self.dims:
            return f"{self.conv} is a {kind.__name__}, not a convolution of {self.dims} dimensions"
        return layout.norm_obstacle(module, self.norm, self.dims) or fusion.max_pool_obstacle(
            module, self.pool, self.dims
        )

    def dropouts(self) -> list[Dropout]:
        return []

    def operands_of(self, module: nn.Module) -> "StemOperands":
        convolution = None if self.conv is None else fusion.child(module, self.conv)
        return StemOperands(convolution, NormOperands(fusion.batch_norm(fusion.child(module, self.norm))))


class StemOperands:
    """The operands of a stem for many calls, and its ``convolution``, if it has one."""

    reads_statistics = False

    def __init__(self, convolution: nn.Module | None, operands: NormOperands) -> None:
        self.convolution, self.operands, self.outcome = convolution, operands, operands.outcome

    def channels_last(self, input_channels_last: bool) -> bool:
        """Whether the stock layers would return channels last, given whether their input is."""
        return input_channels_last or (self.convolution is not None and is_channels_last(self.convolution.weight))

    def reads_block(self) -> None:
        """None: a stem does not read a dense block."""
        return None

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, return_statistics: bool, updates: Updates | None
    ) -> tuple[Tensor, BatchStatistics | None]:
        """Runs the stem on ``x``. Returns the result and, if asked, its statistics."""
        if self.convolution is not None:
            output = None if return_statistics else functional.run_stem(x, self.convolution, self.operands, updates)
            if output is not None:
                return output, None
            x = convolved(self.convolution, x)
        return functional.run_bn_relu_maxpool(x, self.operands, return_statistics, updates)


class HeadLayout(NamedTuple):
    """See :class:`densenet_fast.conversion.layout.PartLayout`."""

    dims: int
    norm: str
    pool: str
    flatten: str
    expected: Expected
    classes: Classes

    kind = "Head"
    convolves = False
    pools = True

    def channels(self, module: nn.Module) -> int:
        return fusion.normalised_channels(fusion.child(module, self.norm))

    def obstacle(self, module: nn.Module) -> str | None:
        pool, flatten = fusion.child(module, self.pool), fusion.child(module, self.flatten)
        if type(pool) is not MEANS[self.dims]:
            return f"{self.pool} is a {type(pool).__name__}, not a mean over all pixels"
        sizes = pool.output_size if isinstance(pool.output_size, (tuple, list)) else [pool.output_size]
        if any(size != 1 for size in sizes):
            return f"{self.pool} is not a mean over all pixels: output_size={pool.output_size}"
        if (flatten.start_dim, flatten.end_dim) != (1, -1):
            return f"{self.flatten} is not a plain flattening: start_dim={flatten.start_dim}, end_dim={flatten.end_dim}"
        return layout.norm_obstacle(module, self.norm, self.dims)

    def dropouts(self) -> list[Dropout]:
        return []

    def operands_of(self, module: nn.Module) -> "HeadOperands":
        return HeadOperands(NormOperands(fusion.batch_norm(fusion.child(module, self.norm))))


class HeadOperands:
    """The operands of a head for many calls."""

    def __init__(self, operands: NormOperands) -> None:
        self.operands, self.outcome, self.reads_statistics = operands, operands.outcome, operands.reads_statistics

    def channels_last(self, input_channels_last: bool) -> bool:
        """As the input: the output has no pixels, so its memory format does not matter."""
        return input_channels_last

    def reads_block(self) -> NormOperands:
        """Its operands, to run it in one call with the dense block before it."""
        return self.operands

    def run(
        self, x: Tensor, statistics: BatchStatistics | None, return_statistics: bool, updates: Updates | None
    ) -> tuple[Tensor, BatchStatistics | None]:
        """Runs the head on ``x``, whose ``statistics`` are given if they are known. Returns [N, C] and None."""
        return functional.run_bn_relu_global_avgpool(x, self.operands, statistics, updates), None


def stem_layouts(module: nn.Module) -> Iterator[StemLayout]:
    """The layout of ``module`` as a stem, by its modules.

    Raises:
        NotRecognised: ``module`` is built in another way.
    """
    leaves, expected = _read(module)
    kinds = {path: type(fusion.child(module, path)) for path in leaves.others}
    pools = [path for path, kind in kinds.items() if kind in fusion.MAX_POOLS.values()]
    other = next((path for path in leaves.others if path not in pools), None)
    if other is not None:
        raise NotRecognised(f"{other} is a {kinds[other].__name__}, not a part of convolution-BN-ReLU-maximum")
    if len(leaves.norms) != 1 or len(leaves.convs) > 1 or len(pools) != 1:
        raise NotRecognised("it is not one convolution, one batch normalisation, ReLU and a maximum over 3x3 windows")
    dims = next(d for d, kind in fusion.MAX_POOLS.items() if kinds[pools[0]] is kind)
    conv = leaves.convs[0] if leaves.convs else None
    yield _checked(module, StemLayout(dims, conv, leaves.norms[0], pools[0], *expected))


def is_stem_pool(module: nn.Module) -> bool:
    """Whether ``module`` is max pooling over windows of 3 with stride 2 and any padding."""
    settings = [getattr(module, name, None) for name in ("kernel_size", "stride")]
    return isinstance(module, (*fusion.MAX_POOLS.values(),)) and all(
        {*(setting if isinstance(setting, (tuple, list)) else [setting])} == {size}
        for setting, size in zip(settings, (3, 2))
    )


def resembles_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation of any kind."""
    return layout.is_norm(module) or "norm" in type(module).__name__.lower()


def resembles_stem(module: nn.Module) -> bool:
    """Whether ``module`` has a convolution, any normalisation, max pooling over windows of 3, perhaps an activation."""
    children = [child for child in module._modules.values() if child is not None]
    if not 3 <= len(children) <= 4 or len(layout.convolutions(module)) != 1:
        return False
    return any(map(is_stem_pool, children)) and any(map(resembles_norm, children))


def head_layouts(module: nn.Module) -> Iterator[HeadLayout]:
    """The layout of ``module`` as a head, by its modules.

    Raises:
        NotRecognised: ``module`` is built in another way.
    """
    leaves, expected = _read(module)
    kinds = [type(fusion.child(module, path)) for path in leaves.others]
    dims = next((d for d, kind in MEANS.items() if kinds == [kind, nn.Flatten]), None)
    if dims is None or len(leaves.norms) != 1 or leaves.convs:
        raise NotRecognised("it is not batch normalisation, ReLU, a mean over all pixels and a flattening")
    yield _checked(module, HeadLayout(dims, leaves.norms[0], *leaves.others, *expected))


def _read(module: nn.Module) -> tuple[layout.Leaves, tuple[Expected, Classes]]:
    """The modules that ``module`` consists of, and the last two fields of its layout."""
    leaves = layout.leaves_of(module, "")
    layout.refuse_tensors(module, "it")
    if leaves.dropouts:
        raise NotRecognised(f"{leaves.dropouts[0]} drops out")
    return leaves, (expected_of(module, {}), layout.classes_below(module))


def _checked(module: nn.Module, found: StemLayout | HeadLayout) -> StemLayout | HeadLayout:
    reason = found.obstacle(module)
    if reason is not None:
        raise NotRecognised(reason)
    return found
