"""Tensor subclasses as input: what stock layers carry through, ours carry through."""

import pytest
import torch
from integration.support import assert_close, images, pair
from monai.data import MetaTensor
from torch.testing._internal.common_subclass import subclass_db
from torch.testing._internal.logging_tensor import LoggingTensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

from densenet_fast.nn import BNReLUConv1x1, DenseBlock, Transition


class Plain(torch.Tensor):
    """Inherits everything."""


class Tagged(torch.Tensor):
    """Hands its tag on to every result."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        if isinstance(result, cls):
            given = tree_leaves((args, kwargs))
            result.tag = next((a.tag for a in given if isinstance(a, cls) and hasattr(a, "tag")), None)
        return result


def tagged(x):
    x = x.as_subclass(Tagged)
    x.tag = "seen"
    return x


FOR_IMAGES = {k.__name__: info for k, info in subclass_db.items() if k.__name__ != "DiagTensorBelow"}
"""torch's own, without the one that is a diagonal matrix."""
MAKE = {
    "Plain": lambda x: x.as_subclass(Plain),
    "Tagged": tagged,
    "MetaTensor": lambda x: MetaTensor(x, meta={"filename": "image"}),
    "TwoTensor": lambda x: TwoTensor(x, x.clone()),
    "LoggingTensor": LoggingTensor,
    **{name: (lambda x, info=info: info.create_fn(x.shape)) for name, info in FOR_IMAGES.items()},
}


def facts(y):
    """What a user sees of a result."""
    meta = dict(y.meta)["filename"] if isinstance(y, MetaTensor) else None
    return [type(y).__name__, getattr(y, "tag", None), meta, tuple(y.shape)]


def values(y):
    for attribute in ("a", "elem", "data"):
        inner = getattr(y, attribute, None)
        if type(inner) is torch.Tensor:
            return inner
    return torch.Tensor.as_subclass(y, torch.Tensor)


def outcome(call, x):
    """What ``call(x)`` shows; of an error its class alone."""
    try:
        y = call(x)
        return facts(y), values(y)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MAKE)
def test_models_and_their_parts_do_as_stock(kind, training):
    ours, stock = pair(training=training)
    for name, shape in (("", (2, 3, 40, 36)), ("features", (2, 3, 40, 36)), ("features.denseblock1", (2, 6, 9, 8))):
        x = images(*shape)
        with torch.no_grad():
            expected, got = (outcome(model.get_submodule(name), MAKE[kind](x)) for model in (stock, ours))
        if isinstance(expected, tuple):
            assert isinstance(got, tuple), (name, got)
            assert got[0] == expected[0], name
            if "Logging" not in kind and kind not in FOR_IMAGES:
                assert_close(got[1], expected[1])


@pytest.mark.parametrize("kind", ["Plain", "Tagged", "MetaTensor"])
@pytest.mark.parametrize("make", [lambda: DenseBlock(2, 6), lambda: Transition(6, 4), lambda: BNReLUConv1x1(6, 4)])
def test_gradients_and_metadata_of_parts(kind, make):
    part, x = make().double(), images(2, 6, 8, 6).requires_grad_()
    expected = part(x)
    (grad,) = torch.autograd.grad(expected.sin().sum(), x)
    given = MAKE[kind](x)
    got = part(given)
    assert type(got) is type(given) and facts(got)[1:3] == facts(given)[1:3]
    assert_close(torch.autograd.grad(torch.Tensor.as_subclass(got, torch.Tensor).sin().sum(), x)[0], grad)
