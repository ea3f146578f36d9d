"""What a backend offers the ops: each function once, with its arguments, what it writes and what may be absent.

A feature map is a matrix: one row per pixel (M = N * prod(spatial) rows), one column per channel. A matrix may be a
range of columns of a wider buffer: its rows may stand at any distance, its columns are adjacent. ``grid`` is
(N, *spatial), with 1, 2 or 3 spatial dimensions.

In the equations ``relu(bn(x))`` is what the :class:`Affine` makes of x. Statistics are those of what was stored, after
rounding; they are written only if they are asked for. An argument that is absent is None.
"""

import abc
from collections.abc import Collection, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from densenet_fast.backends.affine import (
    Affine,
    Completion,
    Job,
    Reader,
    Statistics,
    ThroughStatistics,
    Unfinished,
    Update,
)
from densenet_fast.backends.optional import OptionalFunctions

Sums: TypeAlias = tuple[Tensor, Tensor]
"""The sums over all rows of D and of D * (x - mean), [C] each."""


class Serving(abc.ABC):
    """Where a backend runs."""

    name: str
    """What it is called in ``python -m densenet_fast info``."""

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""
        return None

    @abc.abstractmethod
    def describe(self) -> str:
        """What its kernels are made of."""

    @abc.abstractmethod
    def dtypes(self, device_type: str) -> Collection[torch.dtype]:
        """The dtypes that it has kernels for on devices of a type, such as "cpu" or "cuda"."""

    def supports(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it has kernels for ``dtype`` on this very device."""
        return dtype in self.dtypes(device.type)

    def has(self, function: str, dtype: torch.dtype, beside: Collection["Backend"]) -> bool:
        """Whether it has a kernel of its own for this function of the contract, or takes another backend's. ``beside``
        are the backends that run the same tensors."""
        definer = next(c for c in type(self).__mro__ if function in vars(c))
        return getattr(definer, "name", None) == self.name


class Backend(Serving, OptionalFunctions):
    """What every backend has, as functions of its own or inherited ones."""

    TAPS_FIRST: bool = False
    """Whether the 3x3 kernels want a weight [k, B, 3, 3] with channels last in memory: [k, 3, 3, B]."""

    def empty(self, like: Tensor, size: Sequence[int], strides: Sequence[int], kept: bool = False) -> Tensor:
        """An uninitialised tensor of ``size`` without gaps between its elements, with the dtype and the device of
        ``like``. It may be ``kept`` for the backward pass of what reads ``like``: where that ends, the backward pass of
        what made ``like`` is next. A backend may keep the memory of large tensors for the next ones."""
        return like.new_empty_strided(size, strides)

    @abc.abstractmethod
    def channel_statistics(self, x: Tensor, out: Statistics) -> None:
        """``out`` becomes the statistics of the columns of x [M, C]."""

    @abc.abstractmethod
    def append_features(
        self,
        new: Tensor,
        out: Tensor,
        statistics: Statistics | None,
        mask: Tensor | None = None,
        keep_scale: float = 1.0,
    ) -> None:
        """out [M, k] = new, for new [N, k, *spatial] of any strides.

        With a dropout ``mask`` of new's shape, out = new * mask * keep_scale. ``statistics`` are those of out. ``new``
        may have the memory of out.
        """

    @abc.abstractmethod
    def bn_relu_conv1x1(
        self,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        statistics: Statistics | None,
        *,
        then: Affine | None = None,
    ) -> None:
        """out [M, B] = relu(bn(x)) @ weight^T + bias, for x [M, C], weight [B, C] and bias [B].

        ``statistics`` are those of out. With ``then``, relu(then(out)) is stored instead of out; there are no
        statistics of that.
        """

    @abc.abstractmethod
    def bn_relu_conv1x1_backward(
        self,
        grad: Tensor,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        grad_x: Tensor | None,
        *,
        need_weight: bool,
        need_sums: bool,
        source: Tensor | None = None,
        reader: Reader | None = None,
        completion: Completion | None = None,
        unfinished: Unfinished | None = None,
        like: Tensor | None = None,
    ) -> tuple[Tensor | None, Sums | None]:
        """Writes grad_x [M, C] and returns dW [B, C] and the sums, for grad [M, B] and x [M, C].

            D = (grad @ weight) * (bn(x) > 0)
            grad_x = source + scale * D
            dW = grad^T @ relu(bn(x))

        Args:
            grad_x: None if it is not needed.
            need_weight: whether dW is needed; None is returned for it otherwise.
            need_sums: whether the sums are needed though grad_x is not.
            source: [M, C], or one row, expanded. It is grad_x itself if there is none: scale * D is added in place.
            reader: gets the sums. None is returned for them then.
            completion: columns of grad_x that are completed as soon as the ``reader`` has the sums.
            unfinished: what the 3x3 convolution left undone. It is done first: the completion may overwrite grad.
            like: the convolution's weight. dW may then come in its dtype, shape and strides.
        """

    @abc.abstractmethod
    def bn_relu_conv3x3(
        self,
        x: Tensor,
        affine: Affine | None,
        weight: Tensor,
        bias: Tensor | None,
        grid: tuple[int, ...],
        out: Tensor,
        *,
        mask: Tensor | None = None,
        keep_scale: float = 1.0,
        statistics: Statistics | None = None,
    ) -> None:
        """out [M, k] = conv(relu(bn(x)), weight, padding=1) + bias, for x [M, B] and weight [k, B, 3, ...].

        Without an ``affine``, x is rectified already. With a dropout ``mask`` [N, k, *spatial], the result is
        multiplied by mask * keep_scale. ``statistics`` are those of out.
        """

    @abc.abstractmethod
    def bn_relu_conv3x3_backward(
        self,
        grad: Tensor,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        grid: tuple[int, ...],
        out: Tensor | None,
        *,
        need_weight: bool,
        reader: Reader | None = None,
        unfinished: Unfinished | None = None,
        like: Tensor | None = None,
        source: Tensor | None = None,
    ) -> tuple[Tensor | None, Sums | None]:
        """Writes out [M, B] and returns dW [k, B, 3, ...] and the sums, for grad [M, k] and x [M, B].

            D = conv_input_grad(grad, weight) * (bn(x) > 0)
            out = source + scale * D
            dW = conv_weight_grad(grad, relu(bn(x)))

        Args:
            out: None if it is not needed; then there are no sums.
            need_weight: whether dW is needed; None is returned for it otherwise.
            reader: gets the sums. None is returned for them then.
            unfinished: what may be done here or be left to :meth:`bn_relu_conv1x1_backward`.
            like: as for :meth:`bn_relu_conv1x1_backward`.
            source: [M, B], zero if there is none. It may be out.
        """

    @abc.abstractmethod
    def finalise_gradient(self, grad: Tensor, through: ThroughStatistics, out: Tensor) -> Tensor:
        """out = grad + (p + 2 * q * (x - mean)) / count, for grad and out [M, n]; returns out, which may be grad.

        This adds what reaches x through its batch statistics.
        """

    @abc.abstractmethod
    def bn_relu_pool_conv1x1(
        self,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        bias: Tensor | None,
        grid: tuple[int, ...],
        statistics: Statistics | None,
    ) -> Tensor:
        """Returns mean2x2(relu(bn(x))) @ weight^T + bias [M', C'], for x [M, C] and weight [C', C].

        Pooling and a 1x1 convolution are linear and commute, so the pooling comes first; the means are not rounded.
        The pooling drops the last row or column of an odd size. ``statistics`` are those of the result.
        """

    @abc.abstractmethod
    def bn_relu_pool_conv1x1_backward(
        self,
        grad: Tensor,
        x: Tensor,
        affine: Affine,
        weight: Tensor,
        grid: tuple[int, ...],
        *,
        need_input: bool,
        need_weight: bool,
        reader: Reader | None = None,
        like: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Sums | None]:
        """Returns scale * D [M, C], dW [C', C] and the sums, for grad [M', C'] and x [M, C].

            D = unpool(grad @ weight) * (bn(x) > 0)
            dW = grad^T @ mean2x2(relu(bn(x)))

        D is zero where the pooling dropped a row or column. Without ``need_input`` None is returned for the first and
        the last, without ``need_weight`` for dW. ``reader`` and ``like`` are those of
        :meth:`bn_relu_conv1x1_backward`.
        """

    @abc.abstractmethod
    def bn_relu_maxpool(
        self, x: Tensor, affine: Affine, grid: tuple[int, ...], statistics: Statistics | None
    ) -> tuple[Tensor, Tensor]:
        """Returns the maxima of relu(bn(x)) over windows of 3 at distance 2, padded by 1, and where they stood.

        Both are [M', C], for x [M, C]. A position is uint8: it counts within its window, from 0; of equal values the
        first is meant. ``statistics`` are those of the maxima.
        """

    @abc.abstractmethod
    def bn_relu_maxpool_backward(
        self,
        grad: Tensor,
        argmax: Tensor,
        x: Tensor,
        affine: Affine,
        grid: tuple[int, ...],
        reader: Reader | None = None,
    ) -> tuple[Tensor, Sums | None]:
        """Returns scale * D [M, C] and the sums, for grad [M', C] and the positions ``argmax`` [M', C].

            D = unpool(grad) * (bn(x) > 0)

        A maximum's gradient goes to its position. The ``reader`` gets the sums; None is returned for them then.
        """

    @abc.abstractmethod
    def bn_relu_global_avgpool(self, x: Tensor, affine: Affine, grid: tuple[int, ...]) -> Tensor:
        """Returns the means of relu(bn(x)) over each image's pixels [N, C], for x [M, C]."""

    @abc.abstractmethod
    def bn_relu_global_avgpool_backward(
        self, grad: Tensor, x: Tensor, affine: Affine, grid: tuple[int, ...], reader: Reader | None = None
    ) -> tuple[Tensor, Sums | None]:
        """Returns scale * D [M, C] and the sums, for grad [N, C] and x [M, C].

            D = (grad / pixels of an image) * (bn(x) > 0)

        The ``reader`` gets the sums; None is returned for them then.
        """

    @abc.abstractmethod
    def prepare(self, jobs: Sequence[Job]) -> None:
        """Does the jobs, none of which reads what another makes.

        Raises:
            ValueError: a job's kind is not known.
        """

    @abc.abstractmethod
    def update_running_statistics(self, updates: Sequence[Update]) -> None:
        """batches += 1 and running += momentum * (batch - running), for the mean and the unbiased variance of each.

        Running statistics that come twice, as those of several layers, are updated by each in turn.
        """


FUNCTIONS = tuple(n for n, member in vars(Backend).items() if getattr(member, "__isabstractmethod__", False))
"""The names of the functions that every backend has."""
