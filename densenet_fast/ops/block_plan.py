"""The layers of a dense block as its op walks over them: where their columns, statistics and bottlenecks stand."""

import functools

import torch
from torch import Tensor

from densenet_fast.backends.contract import Backend
from densenet_fast.backends.inputs import Fixed
from densenet_fast.backends.layout import are_dense
from densenet_fast.ops.stage import STAGE_TENSORS, Stage, by_stage, unflatten


class Walk:
    """What a backend that walks over a whole block takes of its stages: their ``tensors``, an empty one for one that is
    absent. ``trained`` are the places of those that have gradients there, ``is_trained`` says of each whether it is one
    of them."""

    def __init__(self, stages: list[Stage]) -> None:
        empty = torch.empty(0)
        self.tensors = [empty if t is None else t for stage in stages for t in stage[:STAGE_TENSORS]]
        self.is_trained = [i % STAGE_TENSORS in (0, 1, 4) and t is not empty for i, t in enumerate(self.tensors)]
        self.trained = [i for i, flag in enumerate(self.is_trained) if flag]
        self._vectors = [t for stage in stages for t in stage[:4] if t is not None]
        self._weights = [stage.conv_weight for stage in stages]
        self._dtypes = {weight.dtype for weight in self._weights}
        self._plain = all(stage.conv_bias is None for stage in stages) and all(
            t.dtype == torch.float32 for t in self._vectors
        )

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether it takes them beside features of ``dtype``."""
        return (
            self._plain
            and self._dtypes <= {dtype, torch.float32}
            and all(map(Tensor.is_contiguous, self._vectors))
            and are_dense(self._weights)
        )


class Plan:
    """The layers of a block and where their columns stand.

    Statistics are packed into one vector: the columns of F, then each layer's bottleneck in turn. With ``described``,
    those of F have a reader behind the block.
    """

    def __init__(
        self,
        x: Tensor,
        tensors: list[Tensor],
        eps: list[float],
        bottleneck: bool,
        drop_rates: list[float],
        described: bool = False,
        prepend: bool = False,
    ) -> None:
        self.stages, per_layer = unflatten(tensors, eps), 2 if bottleneck else 1
        self.described, self.prepend = described, prepend
        self.layers = [tuple(self.stages[i : i + per_layer]) for i in range(0, len(self.stages), per_layer)]
        self.bottleneck = bottleneck
        self.grid = (x.shape[0], *x.shape[2:])
        self.drop_rates = by_stage(drop_rates, len(self.stages), 0.0)
        self.keep_scales = [1 / (1 - p) if p < 1 else 0.0 for p in self.drop_rates]
        self.widths = [x.shape[1]]
        """How many columns layer l reads; behind those of all layers, how many there are."""
        for layer in self.layers:
            self.widths.append(self.widths[-1] + layer[-1].conv_weight.shape[0])
        self.columns = self.widths[-1]
        self.bottlenecks = []
        """The packed range of each layer's bottleneck."""
        packed = self.columns
        for layer in self.layers if bottleneck else ():
            self.bottlenecks.append(slice(packed, packed + layer[0].conv_weight.shape[0]))
            packed = self.bottlenecks[-1].stop
        self.packed = packed
        self.ranges = [
            columns for i in range(len(self.layers)) for columns in (self.read(i), *self.bottlenecks[i : i + 1])
        ]
        """The packed range that each stage normalises."""
        self.eps = next((stage.eps for stage in self.stages if not stage.frozen), 0.0)
        """Of the batch normalisations, whose r is computed with the statistics; a stage of another has its own."""

    @functools.cached_property
    def walk(self) -> Walk:
        """What a backend that :meth:`walked_by` asks for takes."""
        return Walk(self.stages)

    def walked_by(self, backend: Backend, dtype: torch.dtype, group: str | None) -> bool:
        """Whether the backend walks over the whole block by itself, faster than it is done here."""
        return (
            backend.walks(self.grid)
            and self.bottleneck
            and group is None
            and not any(self.drop_rates)
            and self.walk.fits(dtype)
        )

    def read(self, i: int) -> slice:
        """The columns that layer i reads; the block's input for the first."""
        return slice(self.columns - self.widths[i], self.columns) if self.prepend else slice(0, self.widths[i])

    def new(self, i: int) -> slice:
        """The columns that layer i writes."""
        if self.prepend:
            return slice(self.columns - self.widths[i + 1], self.columns - self.widths[i])
        return slice(self.widths[i], self.widths[i + 1])

    def last_read(self, i: int) -> slice:
        """Of the columns that layer i reads, from 0, those that no earlier layer reads."""
        new = self.widths[i] - (self.widths[i - 1] if i else 0)
        return slice(0, new) if self.prepend else slice(self.widths[i] - new, self.widths[i])

    def masks(self, masks: list[Tensor]) -> list[Tensor | None]:
        """Of each stage the dropout mask, None where nothing is dropped, from an op's."""
        return [m if p > 0 else None for m, p in zip(by_stage(masks, len(self.stages), None), self.drop_rates)]

    def bottleneck_buffer(self, features: Tensor) -> Tensor:
        """Room for any layer's bottleneck, for one at a time."""
        return features.new_empty(features.shape[0] * max((c.stop - c.start for c in self.bottlenecks), default=0))

    def bottleneck_in(self, buffer: Tensor | None, i: int, features: Tensor) -> Tensor:
        """An uninitialised [M, B] for layer i's bottleneck, in ``buffer`` or newly allocated."""
        shape = features.shape[0], self.bottlenecks[i].stop - self.bottlenecks[i].start
        return features.new_empty(shape) if buffer is None else buffer[: shape[0] * shape[1]].view(shape)

    def without_statistics(self) -> list[slice]:
        """The packed ranges of whose columns no statistics are made."""
        columns = (self.read(0), *map(self.new, range(len(self.layers))))
        unread = [c for i, c in enumerate(columns) if not self.normalised_by_batch(i)]
        return unread + [c for c, layer in zip(self.bottlenecks, self.layers) if layer[1].frozen]

    def normalised_by_batch(self, i: int) -> bool:
        """Whether layer i or a later one, or a reader behind the block, normalises its input by batch statistics."""
        return self.described or any(not layer[0].frozen for layer in self.layers[i:])


def plan_of(
    x: Tensor,
    tensors: list[Tensor],
    eps: list[float],
    bottleneck: bool,
    drop_rates: list[float],
    described: bool,
    prepend: bool,
) -> Plan:
    """The :class:`Plan`, which is kept with tensors that nobody exchanges."""

    def make() -> Plan:
        return Plan(x, tensors, eps, bottleneck, drop_rates, described, prepend)

    if not (type(tensors) is type(eps) is type(drop_rates) is Fixed):
        return make()
    kind = (tuple(x.shape), bottleneck, eps.parted[1], drop_rates.parted[1], described, prepend)
    return tensors.made(kind, make)


def own_features(features: Tensor, in_channels: int, prepend: bool) -> Tensor:
    """The block's input among its ``features`` [N, C_total, *spatial]; a view."""
    return features[:, features.shape[1] - in_channels :] if prepend else features[:, :in_channels]
