"""Networks in each style that people copy: converted, they compute what they did, and are the same objects."""

import copy
import io
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import densenet_fast
from conversion.styles import STYLES
from helpers import assert_same, error, randomise

GROWTH, LAYERS = 4, (2, 3, 2)
PAGE = Path(densenet_fast.__file__).parents[1] / "docs/conversion-styles.md"


def make(name):
    """A tiny network in float64, and its input."""
    style = STYLES[name]
    size = 8 if style.small else 32
    model = randomise(style.make(GROWTH, LAYERS, size).double())
    return model, torch.randn(2, style.channels, *[size] * style.dims, dtype=torch.float64)


def fused_parts(model):
    return Counter(row.kind for row in densenet_fast.explain(model) if row.fused)


@pytest.mark.parametrize("name", STYLES)
def test_equals_the_unconverted_model(name):
    stock, x = make(name)
    model = densenet_fast.convert(stock, inplace=False)
    for module in stock.modules():
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = False  # with it, stock updates running statistics twice
    for training in (True, False):
        assert_same(model.train(training), stock.train(training), x, 1e-9)
    report = densenet_fast.explain(model)
    assert fused_parts(model) == STYLES[name].parts(len(LAYERS)), report
    assert all((row.last_call, row.backend) == ("fused", "aten") for row in report if row.fused), report


@pytest.mark.parametrize("name", STYLES)
def test_is_the_same_object_with_its_state_and_hooks_and_can_be_restored(name):
    model, x = make(name)
    model.eval()
    modules, classes = dict(model.named_modules()), {n: type(m) for n, m in model.named_modules()}
    state, text = model.state_dict(keep_vars=True), repr(model)
    expected, seen = outputs(model, x)

    assert densenet_fast.convert(model) is model
    assert dict(model.named_modules()) == modules and repr(model) == text
    now = model.state_dict(keep_vars=True)
    assert list(now) == list(state) and all(value is state[key] for key, value in now.items())
    changed = [n for n, m in model.named_modules() if type(m) is not classes[n]]
    assert len(changed) >= len(LAYERS)
    got, hooked = outputs(model, x, [*changed, ""])
    assert error(got, expected) < 1e-12 and hooked.keys() == {*changed, ""} & seen.keys()
    assert all(error(value, seen[n]) < 1e-12 for n, value in hooked.items())
    assert fused_parts(model) == STYLES[name].parts(len(LAYERS)), densenet_fast.explain(model)

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    for other in copies:
        assert error(other(x), expected) < 1e-12 and fused_parts(other) == fused_parts(model)
        assert not any(value.data_ptr() == state[key].data_ptr() for key, value in other.state_dict().items())

    assert densenet_fast.restore(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert all(not hasattr(m, "_densenet_fast") for m in model.modules()) and error(model(x), expected) == 0
    assert not fused_parts(model)


def outputs(model, x, names=None):
    """What ``model`` makes of ``x``, and by name what each module of ``names``, or every module, does."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if names is None or name in names:
            keep = lambda module, args, output, name=name: seen.__setitem__(name, output)  # noqa: E731
            handles.append(module.register_forward_hook(keep))
    result = model(x)
    for handle in handles:
        handle.remove()
    return result, seen


def test_the_page_has_every_style():
    text = PAGE.read_text().partition("<!-- style table -->")[2].partition("<!-- end of style table -->")[0]
    assert re.findall(r"^\| (.*?) \|", text, re.MULTILINE)[1:] == list(STYLES)
