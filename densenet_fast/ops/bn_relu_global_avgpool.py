"""densenet_fast::bn_relu_global_avgpool, the head: batch normalisation, ReLU and the mean over an image's pixels in one
op.

The op keeps its input alone for the backward pass.

    out = mean over pixels of relu(bn(x))
    D = grad / pixels * (bn(x) > 0)
    P = -s * sum D;  Q = -s * r^2 * sum D * (x - mu) / 2
    dx = s * D + (P + 2 * Q * (x - mu)) / M                                    (1), (2)
"""

from typing import NamedTuple

from torch import Tensor

from densenet_fast.backends.layout import to_matrix
from densenet_fast.ops import stock
from densenet_fast.ops.op import Parts, define
from densenet_fast.ops.single import Input, fake_gradients, fake_statistics, with_autograd
from densenet_fast.ops.stage import Stage, StageGradients

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Inputs(NamedTuple):
    """The arguments of the op.

    Args:
        x: [N, C, *spatial].
        mean, var: the batch statistics [C] of x, or None to compute them.
        tensors, eps: one stage without convolution, flattened.
        group: name of the process group whose batches are normalised together, None for this process's alone.
    """

    x: Tensor
    mean: Tensor | None
    var: Tensor | None
    tensors: list[Tensor]
    eps: list[float]
    group: str | None


@define("bn_relu_global_avgpool", Inputs)
def _forward(given: Inputs) -> Outputs:
    """Returns out [N, C], mean [C], var [C] and count [].

    ``mean`` and ``var`` are those that were given, else the batch's; zeros if the stage is frozen. ``count`` is the
    number of rows they are computed over, and empty without a group.
    """
    ready = Input(given)
    out = ready.backend.bn_relu_global_avgpool(ready.matrix, ready.affine, ready.grid)
    return out, *ready.own[:2], ready.count()


@_forward.fake
def _(given: Inputs) -> Outputs:
    return given.x.new_empty(given.x.shape[:2]), *fake_statistics(given)


class BackwardInputs(NamedTuple):
    """The arguments of the backward op: the gradient of out, the forward op's arguments and results, and ``needs``.

    ``needs`` says whether a gradient is needed: of x, of its statistics, and then of each tensor of the stage.
    """

    grad: Tensor
    x: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor
    tensors: list[Tensor]
    eps: list[float]
    group: str | None
    needs: list[bool]


@define("bn_relu_global_avgpool_backward", BackwardInputs)
def _backward(given: BackwardInputs) -> tuple[Tensor, list[Tensor]]:
    """Returns the gradient of x and those of the stage's tensors, empty where they are not needed.

    If the gradients of mean and var are needed, they follow those of the tensors, and the gradient of x leaves them
    out.
    """
    ready = Input(given, again=True)
    gradients = StageGradients(ready.stage, given.needs[2:])
    reader = ready.reader(gradients, given.needs)
    scaled, _ = ready.backend.bn_relu_global_avgpool_backward(
        to_matrix(given.grad), ready.matrix, ready.affine, ready.grid, reader
    )
    return ready.gradients(scaled, gradients, given.count, given.needs)


@_backward.fake
def _(given: BackwardInputs) -> tuple[Tensor, list[Tensor]]:
    return fake_gradients(given)


def _stock(x: Tensor, mean: Tensor | None, var: Tensor | None, stage: Stage) -> Tensor:
    return stock.bn_relu_global_avgpool(x, stage, mean, var)


bn_relu_global_avgpool = with_autograd(_forward, _backward, _stock, slice(1, 4))
parts = Parts(_forward, _backward, _stock)
