"""What a backend may have besides the functions of the contract: whole blocks in one call, and inference.

Matrices and grids are as in ``contract``.
"""

from typing import NamedTuple

from torch import Tensor


class Block(NamedTuple):
    """A dense block, for a backend that runs the whole of it in one call."""

    features: Tensor
    """[M, C_total]: the block's input and what its layers make of it."""
    tensors: list[Tensor]
    """The tensors of all stages in turn, as the ops pack them; an empty one stands for one that is absent."""
    eps: list[float]
    """One per stage."""
    grid: tuple[int, ...]
    bottlenecks: list[Tensor]
    """One [M, B] per layer; an empty one is not kept."""
    mean: Tensor
    """The batch's means: those of the features, then those of each bottleneck."""
    var: Tensor
    """Its biased variances, packed likewise."""
    prepend: bool
    """Whether the block's input stands in the last columns of the features, instead of the first."""


class BlockAndReader(NamedTuple):
    """A dense block and the stage that reads it, for a backend that runs both in one call."""

    tensors: list[Tensor]
    """Those of the block's stages that are not absent."""
    places: list[int]
    """Where they stand among the tensors of a :class:`Block`."""
    eps: list[float]
    grid: tuple[int, ...]
    """That of the block."""
    saved: list[bool]
    """Whether to keep each layer's bottleneck for the backward pass, or to compute it again."""
    prepend: bool
    read_tensors: list[Tensor]
    """Those of the reader's stage, an empty one for one that is absent. With a convolution it is a transition, without
    a head."""
    read_eps: float


class OneStage(NamedTuple):
    """The stage of an op, for a backend that runs the whole of it in one call."""

    tensors: list[Tensor]
    """As in :class:`Block`."""
    eps: float
    grid: tuple[int, ...]
    """That of the op's input."""


class NetworkParts(NamedTuple):
    """A network, for a backend that runs the whole of it in one call.

    Its stages are that of the stem, and by turns those of a dense block and that of its reader. The last reader is the
    head, the others are transitions.
    """

    tensors: list[Tensor]
    """The weight of the stem's convolution [k, c, h, h], and those of the stages' tensors that are not absent: all
    float32 and without gaps."""
    places: list[int]
    """Where the latter stand among the tensors of all stages, as in :class:`Block`."""
    eps: list[float]
    """One per stage."""
    layers: list[int]
    """The number of layers of each block."""
    saved: list[bool]
    """Of each layer, as in :class:`BlockAndReader`."""
    prepend: list[bool]
    """Of each block, as in :class:`Block`."""
    stride: int
    padding: int
    """Those of the stem's convolution."""


class Tracked(NamedTuple):
    """The running statistics that a step of a network updates."""

    vectors: list[Tensor]
    """Of each normalisation its mean and its variance."""
    counters: list[Tensor]
    """The numbers of batches, int64 []."""
    momenta: list[float]
    starts: list[int]
    """Where the statistics of each stand in the packed ones of its part."""
    counts: list[int]
    """How many there are in the stem, and in each block with its reader."""
    largest_variance: float
    """If a variance of the batch is not at most this, nothing is returned or updated."""


class OptionalFunctions:
    """What a backend may have. A caller of one of these functions first asks the flag or the function above it."""

    RECOMPUTES_WIDE_BOTTLENECKS: bool = False
    """Whether the backward pass recomputes a bottleneck that has more channels than its layer reads, instead of keeping
    it. That costs a product of little depth, and the bottleneck is as large as any other."""

    CONVOLVES: bool = False
    """Whether it has :meth:`convolution` and :meth:`convolution_grad_weight`."""

    def convolution(self, images: Tensor, taps: Tensor, stride: int, padding: int) -> Tensor:
        """Returns the convolution [N * H' * W', k] of images [N, c, H, W] and taps [k, h, h, c].

        Windows are ``stride`` apart, and the images are padded by ``padding`` zeros on each side. There are few c.
        """
        raise NotImplementedError

    def convolution_grad_weight(self, grad: Tensor, images: Tensor, taps: Tensor, stride: int, padding: int) -> Tensor:
        """Returns the gradient of the taps, float32 [k, h, h, c], from that of :meth:`convolution`'s result."""
        raise NotImplementedError

    def runs_whole_blocks(self, grid: tuple[int, ...]) -> bool:
        """Whether it has the functions ``dense_block*`` below, and they take blocks on this grid."""
        return False

    def dense_block(
        self,
        block: Block,
        in_channels: int,
        *,
        return_statistics: bool,
        x: Tensor | None = None,
        x_mean: Tensor | None = None,
        x_var: Tensor | None = None,
    ) -> None:
        """Runs all layers of a block: fills its features, its bottlenecks and its statistics.

        The stages have no convolution's bias. Their other vectors are contiguous and float32; their weights are float32
        or in the features' dtype.

        Args:
            in_channels: how many columns of the features are the block's input.
            return_statistics: whether to compute the statistics of all features, not only of those that a layer reads.
            x: the block's input [M, C0], which is copied among the features; without it, the input is there already,
                and so are its statistics.
            x_mean, x_var: the statistics of x [C0], if they are known.
        """
        raise NotImplementedError

    def dense_block_backward(
        self,
        grad: Tensor,
        total: Tensor,
        block: Block,
        count: Tensor | int,
        grad_x: Tensor,
        gradients: list[Tensor],
        p: Tensor,
        q: Tensor,
        *,
        return_statistics: bool,
    ) -> None:
        """Runs the backward pass of all layers, for grad [M, C_total].

        Args:
            total: where the gradient of the features stands meanwhile, [M, C_total]; it may be grad.
            block: as :meth:`dense_block` filled it. A bottleneck that is empty is computed again; so are all of them if
                the list is.
            count: the number of rows that the statistics are over.
            grad_x: becomes the gradient of the block's input, [M, C0].
            gradients: become those of the stages' weights, biases and convolutions, float32, in the places of the
                block's ``tensors``.
            p, q: the gradients with respect to the packed statistics. The block's own are added to them.
            return_statistics: whether the forward pass returned the statistics of all features. If not, p and q are
                zero.
        """
        raise NotImplementedError

    def dense_block_and_reader(
        self,
        x: Tensor,
        x_mean: Tensor | None,
        x_var: Tensor | None,
        parts: BlockAndReader,
        *,
        return_statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
        """Runs all layers of a block and what reads it, for x [M, C0] and its statistics, if they are known.

        The tensors are as :meth:`dense_block` takes them.

        Returns:
            What :meth:`dense_block` fills: the features, as [N, C_total, *spatial], the packed mean and variance, and
            the bottlenecks that are saved. Then the reader's result, [N, C', *spatial'] or [N, C_total], and with
            ``return_statistics`` its mean and variance, which are empty otherwise.
        """
        raise NotImplementedError

    def dense_block_and_reader_backward(
        self,
        grad: Tensor,
        features: Tensor,
        mean: Tensor,
        var: Tensor,
        bottlenecks: list[Tensor],
        in_channels: int,
        parts: BlockAndReader,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Runs the backward pass of both, for grad [M', C'] or [N, C_total], the features [M, C_total] and what else
        :meth:`dense_block_and_reader` returned.

        Returns:
            The gradient of the block's input [N, C0, *spatial]. Two lists of gradients, float32: those of the block's
            tensors and of the reader's, of each weight and bias of a normalisation and weight of a convolution that is
            there.
        """
        raise NotImplementedError

    RUNS_STAGES: bool = False
    """Whether it has the functions ``*_stage*``. Their tensors are as :meth:`dense_block` takes them."""

    def bn_relu_maxpool_stage(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None, stage: OneStage, *, return_statistics: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns what :meth:`bn_relu_maxpool` does, the maxima as [N, C, *spatial'].

        Then the mean and variance of x [M, C], which are copies of those given, if any, and zero if the stage is
        frozen; and with ``return_statistics`` those of the maxima, which are empty otherwise.
        """
        raise NotImplementedError

    def bn_relu_maxpool_stage_backward(
        self, grad: Tensor, argmax: Tensor, x: Tensor, mean: Tensor, var: Tensor, stage: OneStage
    ) -> tuple[Tensor, list[Tensor]]:
        """Returns the complete gradient of x [N, C, *spatial], and those of weight and bias, of each that is there."""
        raise NotImplementedError

    RUNS_NETWORKS: bool = False
    """Whether it has the functions ``network*``. They take images with sizes that leave each block at least two lines
    and two columns."""

    def network(self, images: Tensor, parts: NetworkParts, tracked: Tracked) -> tuple[Tensor, list[Tensor]]:
        """Runs a network on images [N, c, H, W] with adjacent channels.

        Returns:
            The means [N, C] of the rectified features, and what the backward pass needs besides. The latter is empty if
            a variance is too large.
        """
        raise NotImplementedError

    def network_backward(self, grad: Tensor, images: Tensor, kept: list[Tensor], parts: NetworkParts) -> list[Tensor]:
        """Returns the gradients of the parts' tensors, of each weight and bias of a normalisation and weight of a
        convolution, for grad [N, C] and what :meth:`network` returned."""
        raise NotImplementedError

    INFERS: bool = False
    """Whether it has the functions ``*_inference``, which normalise by running statistics and keep nothing for a
    backward pass. Their ``tensors`` are those of all stages in turn: of each the normalisation's four, then the
    convolution's weight, if it has one; an empty one stands for one that is absent."""

    def dense_block_inference(
        self,
        features: Tensor,
        in_channels: int,
        tensors: list[Tensor],
        eps: list[float],
        grid: tuple[int, ...],
        prepend: bool,
    ) -> None:
        """Fills the columns of features [M, C_total] but the block's input, which is there already."""
        raise NotImplementedError

    def bn_relu_pool_conv1x1_inference(
        self, x: Tensor, tensors: list[Tensor], eps: float, grid: tuple[int, ...], out: Tensor
    ) -> None:
        """Writes what :meth:`bn_relu_pool_conv1x1` returns for x [M, C] to out [M', C']."""
        raise NotImplementedError

    def bn_relu_global_avgpool_inference(self, x: Tensor, tensors: list[Tensor], eps: float, images: int) -> Tensor:
        """Returns what :meth:`bn_relu_global_avgpool` does, for x [M, C] of so many images."""
        raise NotImplementedError

    def stem_inference(
        self, images: Tensor, taps: Tensor, tensors: list[Tensor], eps: float, stride: int, padding: int, out: Tensor
    ) -> None:
        """Writes the maxima that :meth:`bn_relu_maxpool` returns for a convolution's result to out [M', k].

        The convolution is that of images [N, c, H, W] and taps [k, h, w, c].
        """
        raise NotImplementedError


OPTIONAL = tuple(
    name for name, member in vars(OptionalFunctions).items() if callable(member) and name != "runs_whole_blocks"
)
"""The names of the functions that a backend may have."""
