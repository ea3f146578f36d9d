"""Where the columns, the statistics and the bottlenecks of a block's layers stand."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from densenet_fast.backends.contract import Backend
from densenet_fast.backends.inputs import Fixed
from densenet_fast.backends.layout import are_dense
from densenet_fast.ops.stage import STAGE_TENSORS, Stage, by_stage, unflatten


class BlockTensors:
    """The tensors of a block's stages, for a backend that runs whole blocks.

    ``tensors`` are those of all stages; an empty tensor stands for an absent one. ``present`` are those that are not
    absent, and ``places`` where they stand. ``is_trained`` says of each of ``tensors`` whether it has a gradient, and
    ``trained`` lists the places of those that have.
    """

    def __init__(self, stages: list[Stage]) -> None:
        empty = torch.empty(0)
        self.tensors = [empty if t is None else t for stage in stages for t in stage[:STAGE_TENSORS]]
        self.places = [i for i, t in enumerate(self.tensors) if t is not empty]
        self.present = [self.tensors[i] for i in self.places]
        self.is_trained = [i % STAGE_TENSORS in (0, 1, 4) and t is not empty for i, t in enumerate(self.tensors)]
        self.trained = [i for i, flag in enumerate(self.is_trained) if flag]
        self._vectors = [t for stage in stages for t in stage[:4] if t is not None]
        self._weights = [stage.conv_weight for stage in stages if stage.conv_weight is not None]
        self._dtypes = {weight.dtype for weight in self._weights}
        self._plain = all(stage.conv_bias is None for stage in stages) and all(
            t.dtype == torch.float32 for t in self._vectors
        )

    @classmethod
    def of(cls, tensors: list[Tensor], eps: list[float]) -> "BlockTensors":
        """Those of flattened stages. They are kept with ``tensors`` if that is a list that nobody changes."""

        def make() -> "BlockTensors":
            return cls(unflatten(tensors, eps))

        return tensors.made(cls, make) if type(tensors) is Fixed else make()

    def gradients(self, made: Iterable[Tensor]) -> list[Tensor | None]:
        """One gradient per tensor in its dtype, None where there is none, from those that were ``made`` in float32."""
        gradients: list[Tensor | None] = [None] * len(self.tensors)
        for i, gradient in zip(self.trained, made):
            gradients[i] = gradient
        if not self._dtypes <= {torch.float32}:
            for i in self.trained:
                gradients[i] = gradients[i].to(self.tensors[i].dtype)
        return gradients

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether the backend takes these tensors with features of ``dtype``."""
        return (
            self._plain
            and self._dtypes <= {dtype, torch.float32}
            and all(map(Tensor.is_contiguous, self._vectors))
            and are_dense(self._weights)
        )


class Plan:
    """The layers of a block and where their columns stand.

    All statistics are packed into one vector: the columns of F, then each layer's bottleneck in turn.
    ``return_statistics`` says that something behind the block reads the statistics of F.
    """

    def __init__(
        self,
        x: Tensor,
        tensors: list[Tensor],
        eps: list[float],
        bottleneck: bool,
        drop_rates: list[float],
        return_statistics: bool = False,
        prepend: bool = False,
    ) -> None:
        self.stages, per_layer = unflatten(tensors, eps), 2 if bottleneck else 1
        self.return_statistics, self.prepend = return_statistics, prepend
        self.layers = [tuple(self.stages[i : i + per_layer]) for i in range(0, len(self.stages), per_layer)]
        self.bottleneck = bottleneck
        self.grid = (x.shape[0], *x.shape[2:])
        self.drop_rates = by_stage(drop_rates, len(self.stages), 0.0)
        self.keep_scales = [1 / (1 - p) if p < 1 else 0.0 for p in self.drop_rates]
        self.widths = [x.shape[1]]
        """How many columns layer l reads. The last entry is the number of all columns."""
        for layer in self.layers:
            self.widths.append(self.widths[-1] + layer[-1].conv_weight.shape[0])
        self.columns = self.widths[-1]
        self.bottlenecks = []
        """The range of each layer's bottleneck in the packed statistics."""
        packed = self.columns
        for layer in self.layers if bottleneck else ():
            self.bottlenecks.append(slice(packed, packed + layer[0].conv_weight.shape[0]))
            packed = self.bottlenecks[-1].stop
        self.packed = packed
        self.ranges = [
            columns for i in range(len(self.layers)) for columns in (self.read(i), *self.bottlenecks[i : i + 1])
        ]
        """The range of each stage's input in the packed statistics."""
        self.eps = next((stage.eps for stage in self.stages if not stage.frozen), 0.0)
        """The eps with which rstd is computed together with the statistics. A stage with another eps computes its
        own."""

    @functools.cached_property
    def block_tensors(self) -> BlockTensors:
        """The tensors for a backend that runs the whole block."""
        return BlockTensors(self.stages)

    def runs_whole_on(self, backend: Backend, dtype: torch.dtype, group: str | None) -> bool:
        """Whether the backend runs the whole block in one call."""
        return (
            backend.runs_whole_blocks(self.grid)
            and self.bottleneck
            and group is None
            and not any(self.drop_rates)
            and self.block_tensors.fits(dtype)
        )

    def read(self, i: int) -> slice:
        """The columns that layer i reads. Layer 0 reads the block's input."""
        return slice(self.columns - self.widths[i], self.columns) if self.prepend else slice(0, self.widths[i])

    def new(self, i: int) -> slice:
        """The columns that layer i writes."""
        if self.prepend:
            return slice(self.columns - self.widths[i + 1], self.columns - self.widths[i])
        return slice(self.widths[i], self.widths[i + 1])

    def last_read(self, i: int) -> slice:
        """The part of layer i's input that no earlier layer reads, counted from the input's first column."""
        new = self.widths[i] - (self.widths[i - 1] if i else 0)
        return slice(0, new) if self.prepend else slice(self.widths[i] - new, self.widths[i])

    def masks(self, masks: list[Tensor]) -> list[Tensor | None]:
        """The dropout mask of each stage, from the masks that the op was given; None where nothing is dropped."""
        return [m if p > 0 else None for m, p in zip(by_stage(masks, len(self.stages), None), self.drop_rates)]

    def bottleneck_buffer(self, features: Tensor, backend: Backend) -> Tensor:
        """A buffer for the largest of the bottlenecks."""
        size = features.shape[0] * max((c.stop - c.start for c in self.bottlenecks), default=0)
        return backend.empty(features, (size,), (1,))

    def bottleneck_in(self, buffer: Tensor | Backend, i: int, features: Tensor) -> Tensor:
        """An uninitialised matrix [M, B] for layer i's bottleneck, in a buffer or newly allocated by a backend."""
        rows, columns = features.shape[0], self.bottlenecks[i].stop - self.bottlenecks[i].start
        if isinstance(buffer, Tensor):
            return buffer[: rows * columns].view(rows, columns)
        return buffer.empty(features, (rows, columns), (columns, 1))

    def without_statistics(self) -> list[slice]:
        """The packed ranges for which no statistics are computed."""
        columns = (self.read(0), *map(self.new, range(len(self.layers))))
        unread = [c for i, c in enumerate(columns) if not self.normalised_by_batch(i)]
        return unread + [c for c, layer in zip(self.bottlenecks, self.layers) if layer[1].frozen]

    def normalised_by_batch(self, i: int) -> bool:
        """Whether layer i, a later layer or a reader behind the block normalises its input by batch statistics."""
        return self.return_statistics or any(not layer[0].frozen for layer in self.layers[i:])


def plan_of(
    x: Tensor,
    tensors: list[Tensor],
    eps: list[float],
    bottleneck: bool,
    drop_rates: list[float],
    return_statistics: bool,
    prepend: bool,
) -> Plan:
    """The :class:`Plan` of a block. It is kept with ``tensors`` if that is a list that nobody changes."""

    def make() -> Plan:
        return Plan(x, tensors, eps, bottleneck, drop_rates, return_statistics, prepend)

    if not (type(tensors) is type(eps) is type(drop_rates) is Fixed):
        return make()
    kind = (tuple(x.shape), bottleneck, eps.split[1], drop_rates.split[1], return_statistics, prepend)
    return tensors.made(kind, make)


def own_features(features: Tensor, in_channels: int, prepend: bool) -> Tensor:
    """The block's input, as a view of its ``features`` [N, C_total, *spatial]."""
    return features[:, features.shape[1] - in_channels :] if prepend else features[:, :in_channels]


def for_each_layer(bottlenecks: list[Tensor], saved: list[bool], like: Tensor) -> list[Tensor]:
    """One bottleneck per layer, empty where it was not ``saved``, from the list of saved ones."""
    kept, empty = iter(bottlenecks), like.new_empty(0)
    return [next(kept) if flag else empty for flag in saved]
