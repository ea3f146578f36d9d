"""What a first training step compiles, counted by Triton's own just-in-time compiler for a GPU that is not there."""

import contextlib
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

import densenet_fast
from backends.triton.absent_gpu import absent_gpu
from densenet_fast import backends
from densenet_fast.backends import triton as backend
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.kernels.bn_relu import bn_relu

META = torch.device("meta")


@pytest.fixture
def planned(monkeypatch):
    """Plans the launches of a network's step in bfloat16 on an H100. Without ``train`` they are those of its
    evaluation, with ``gradients`` one whose backward pass does not come."""
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    monkeypatch.setattr(backends, "BACKENDS", (backend,))

    def launches(batch, size=224, train=True, gradients=False):
        with META:
            model = densenet_fast.densenet121().to(torch.bfloat16, memory_format=torch.channels_last).train(train)
            x = torch.empty(batch, 3, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        with (
            config.assume(config.Device(90, 132)),
            launch.planning() as found,
            torch.set_grad_enabled(train or gradients),
        ):
            output = model(x)
            if train:
                output.sum().backward()
        return found

    return launches


@contextlib.contextmanager
def compilations():
    """The names of the kernels that are compiled meanwhile."""
    names = []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: names.append(fn.name)
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


def test_compilations_of_densenet121(planned):
    """There are at most 14 for the first step, 3 for an odd last batch and none for other sizes. Inference's products
    without statistics come on top."""
    with absent_gpu(90):
        for most, step in ((14, (32,)), (3, (31,)), (0, (64,)), (0, (256,)), (0, (5, 160)), (5, (32, 224, False))):
            launches = planned(*step)
            with compilations() as names:
                launch.compile_all(launches, META)
            assert len(names) <= most, (step, names)
            with compilations() as names:
                for item in launches:
                    launch.compiled(item)
            assert not names, (step, names)


@pytest.mark.parametrize("gradients", [False, True])
def test_launches_of_an_evaluation(planned, gradients):
    """A layer has two and no statistics: the first product makes its second normalisation and ReLU. Where gradients may
    be wanted these are a third launch, because the backward pass needs Z."""
    launches = planned(32, train=False, gradients=gradients)
    counts = Counter(item.name for item in launches)
    assert counts.pop("bn_relu_pool_conv1x1") == 3
    assert counts == {"bn_relu_conv1x1": 58, "bn_relu_conv3x3": 58} | ({"bn_relu": 58} if gradients else {})
    assert not any(item.constants.get("STATISTICS") for item in launches)
    assert all(item.constants["THEN"] != gradients for item in launches if item.name == "bn_relu_conv1x1")


def test_equal_variants_are_compiled_once_and_others_not(planned):
    """A launch's ``variant`` says what Triton specialises on."""
    launches = planned(32, 64)
    variants = {item.variant: item for item in launches}
    with absent_gpu(90), compilations() as names:
        launch.compile_all(launches, META)
    assert len(names) == len(variants)


@pytest.fixture
def slow_compiler(monkeypatch):
    """Each kernel takes 0.6 s when it is first compiled, one after the other."""
    pool, known = ThreadPoolExecutor(1), set()

    def compiled(item):
        if item.variant in known:
            return SimpleNamespace()
        known.add(item.variant)
        return SimpleNamespace(future=pool.submit(time.sleep, 0.6))

    monkeypatch.setattr(launch, "compiled", compiled)
    yield
    pool.shutdown()


def test_progress_is_shown_where_it_takes_long(planned, slow_compiler, capsys):
    launches = list({item.name: item for item in planned(32, 64)}.values())
    launch.compile_all(launches[:1], META)
    assert capsys.readouterr().err == ""
    launch.compile_all(launches[:4], META)
    assert "compiling kernels, once" in capsys.readouterr().err
    launch.compile_all(launches[:4], META)
    assert capsys.readouterr().err == ""


def test_other_threads_launch_while_one_plans(monkeypatch):
    ran = []
    monkeypatch.setattr(launch, "run", ran.append)
    launch_bn_relu, named = launch.launcher(bn_relu), dict.fromkeys(bn_relu.arg_names, 0)
    with launch.planning() as planned, launch.recording() as recorded, config.assume(config.Device(80, 4)):
        launch_bn_relu((1,), config.BN_RELU, **named)
        other = threading.Thread(target=launch_bn_relu, args=((2,), config.BN_RELU), kwargs=named)
        other.start(), other.join()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(config.assumed).result() is None
    assert [item.grid for item in planned] == [(1,)] and [item.grid for item in recorded] == [(2,)]
    assert [item.grid for item in ran] == [(2,)]
