"""densenet_fast::bn_relu_global_avgpool (the head): batch normalisation, ReLU and the mean over all pixels of an image
in one op that saves its input alone.

    out = mean over pixels of relu(bn(x))
    D = grad / pixels * (bn(x) > 0)
    P = -s * sum D;  Q = -s * r^2 * sum D * (x - mu) / 2
    dx = s * D + (P + 2 * Q * (x - mu)) / M                                    (1), (2)
"""

from torch import Tensor

from densenet_fast.backends.layout import to_matrix
from densenet_fast.ops import stock
from densenet_fast.ops.op import Parts, define
from densenet_fast.ops.single import Input, fake_gradients, fake_statistics, with_autograd
from densenet_fast.ops.stage import Stage, StageGradients

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@define("bn_relu_global_avgpool")
def _forward(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    tensors: list[Tensor],
    eps: list[float],
    group: str | None,
) -> Outputs:
    """From x [N, C, *spatial] and one stage without convolution: out [N, C], mean [C], var [C], count [].

    ``mean`` and ``var`` are the batch's (zeros if the stage is frozen), the given ones if they are known, ``count`` the
    number of rows they are over, empty without a group. ``group`` names the process group whose batches are normalised
    together, None for this process's alone.
    """
    given = Input(x, tensors, eps, mean, var, group)
    out = given.backend.bn_relu_global_avgpool(given.matrix, given.affine, given.grid)
    return out, *given.own[:2], given.count()


@_forward.custom_op.register_fake
def _(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    tensors: list[Tensor],
    eps: list[float],
    group: str | None,
) -> Outputs:
    return x.new_empty(x.shape[:2]), *fake_statistics(x, group)


@define("bn_relu_global_avgpool_backward")
def _backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    tensors: list[Tensor],
    eps: list[float],
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of x and of the stage's tensors, empty where ``needs`` (x's, the statistics', then one per tensor)
    says so, and, if needed, those of mean and var, which x's then leaves out."""
    given = Input(x, tensors, eps, mean, var, group, again=True)
    gradients = StageGradients(given.stage, needs[2:])
    reader = given.reader(gradients, needs)
    scaled, _ = given.backend.bn_relu_global_avgpool_backward(
        to_matrix(grad), given.matrix, given.affine, given.grid, reader
    )
    return given.gradients(scaled, gradients, count, needs)


@_backward.custom_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    count: Tensor,
    tensors: list[Tensor],
    eps: list[float],
    group: str | None,
    needs: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    return fake_gradients(x, mean, tensors, needs)


def _stock(x: Tensor, mean: Tensor | None, var: Tensor | None, stage: Stage) -> Tensor:
    return stock.bn_relu_global_avgpool(x, stage, mean, var)


bn_relu_global_avgpool = with_autograd(_forward, _backward, _stock, slice(1, 4))
parts = Parts(_forward, _backward, _stock)
