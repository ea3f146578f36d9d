"""Every backend keeps to the contract, and the table of what serves what is the one that follows from it."""

import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

from densenet_fast import backends
from densenet_fast.backends import BACKENDS, capabilities, serving
from densenet_fast.backends.affine import DTYPES
from densenet_fast.backends.contract import FUNCTIONS, Backend
from densenet_fast.backends.optional import OPTIONAL

ROOT = Path(backends.__file__).parents[2]
NAMED = pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)


def arguments(function):
    """Their names, kinds and defaults, without the types: (name, kind, default) each."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values() if p.name != "self"]


@NAMED
@pytest.mark.parametrize("function", [*FUNCTIONS, *OPTIONAL])
def test_every_backend_takes_the_same_arguments(backend, function):
    if backend.name == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert arguments(getattr(backend, function)) == arguments(getattr(Backend, function))


@pytest.mark.parametrize("function", [*FUNCTIONS, *OPTIONAL])
def test_the_contract_says_what_a_function_does_with_few_positional_arguments(function):
    assert inspect.getdoc(getattr(Backend, function))
    positional = [
        name for name, kind, _ in arguments(getattr(Backend, function)) if kind != inspect.Parameter.KEYWORD_ONLY
    ]
    assert len(positional) <= 8


def test_a_backend_that_lacks_a_function_cannot_be_made():
    incomplete = type("Incomplete", (Backend,), {"name": "incomplete"})
    with pytest.raises(TypeError, match="abstract method"):
        incomplete()


@NAMED
def test_dtypes_are_those_that_are_supported(backend):
    """On this device, if it is for it at all."""
    device = torch.get_default_device()
    if backend.unavailable() is None:
        supported = {dtype for dtype in DTYPES if backend.supports(device, dtype)}
        assert supported in ({*DTYPES} & {*backend.dtypes(device.type)}, set())


def test_capabilities_are_of_the_first_backend_that_has_its_own():
    aten, cpu = backends.aten, backends.cpu
    alone, on_gpu = capabilities([aten], torch.float32), [backends.cuda, backends.triton, aten]
    assert {alone[f] for f in FUNCTIONS} == {"aten"} and {alone[f] for f in OPTIONAL} == {None}
    assert capabilities([cpu, aten], torch.float32)["bn_relu_conv1x1"] == "cpu"
    half, single = (capabilities(on_gpu, dtype) for dtype in (torch.float16, torch.float32))
    assert (half["bn_relu_conv1x1"], half["bn_relu_conv3x3"], half["prepare"]) == ("triton", "cuda", "cuda")
    assert single["bn_relu_conv3x3"] == "triton"
    assert capabilities([backends.cuda, aten], torch.float16)["bn_relu_conv3x3"] == "aten"
    assert capabilities(on_gpu[1:], torch.float16)["prepare"] == "aten"


def test_those_that_serve_come_in_order():
    names = [backend.name for backend in serving(torch.device("cpu"), torch.float64)]
    assert names[-1] == "aten" and names == [b.name for b in BACKENDS if b.name in names]


COLUMNS = {
    "CPU, float32 and bfloat16": ("cpu", torch.float32, torch.bfloat16),
    "CPU, other dtypes": ("cpu", torch.float16, torch.float64),
    "NVIDIA, float16 and bfloat16": ("cuda", torch.float16, torch.bfloat16),
    "NVIDIA, float32": ("cuda", torch.float32),
    "NVIDIA, float64": ("cuda", torch.float64),
    "other devices": ("mps", *DTYPES),
}


def test_the_page_has_the_table():
    """docs/backends.md, for a machine that has everything."""
    columns = []
    for device, *dtypes in COLUMNS.values():
        found = [capabilities([b for b in BACKENDS if dtype in b.dtypes(device)], dtype) for dtype in dtypes]
        assert all(one == found[0] for one in found)
        columns.append(found[0])
    rows = [" | ".join(("", "function", *COLUMNS, "")).strip(), "|" + "---|" * (1 + len(COLUMNS))]
    rows += [f"| `{f}` | {' | '.join(c[f] or '-' for c in columns)} |" for f in (*FUNCTIONS, *OPTIONAL)]
    assert "\n".join(rows) in (ROOT / "docs/backends.md").read_text(), "\n" + "\n".join(rows)
