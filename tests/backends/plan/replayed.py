"""Replays over a driver that writes launches down, against Triton's own launcher over the same. ``test_plan.py`` runs
this file with the stub driver and the emulated library."""

from types import SimpleNamespace

import pytest
import torch

from backends.plan.bodies import inputs_of, layer
from backends.plan.stub import driver, launched, stub_gpu
from backends.triton.cases import LAYERS
from densenet_fast.backends import plan
from densenet_fast.backends import triton as backend
from densenet_fast.backends.affine import Affine
from densenet_fast.backends.recording import tensors_in
from densenet_fast.backends.symbolic import Unplannable
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.launch import Launch
from densenet_fast.backends.triton.parameters import PLAIN, parameters

CPU = torch.device("cpu")
"""Its tensors stand in for a GPU's: nobody reads their addresses."""


@pytest.fixture(params=[80, 90])
def gpu(request):
    """Of a generation, with 132 multiprocessors."""
    with stub_gpu(request.param) as found:
        yield found


@pytest.fixture
def tf32():
    """Products of float32 by Triton, also in convolutions."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def planned(sizes, dtype):
    """A plan and its inputs."""
    inputs = inputs_of(*sizes, dtype)
    return plan.make(layer, inputs, CPU), inputs


@pytest.mark.parametrize(
    "sizes, dtype",
    [
        (((2, 5, 7), 33, 20, 12), torch.float16),
        (((1, 16, 8), 64, 128, 32), torch.bfloat16),
        (((2, 5, 7), 33, 20, 12), torch.float32),
    ],
    ids=str,
)
def test_a_replay_launches_what_tritons_launcher_does(sizes, dtype, gpu, tf32):
    """On the same memory: the same functions, grids, blocks, shared memory and parameters, byte by byte, in order."""
    with config.convolution_in_triton():
        made, inputs = planned(sizes, dtype)
    memory, tensors = made._allocate(), list(tensors_in(inputs))
    assert not launched()
    assert torch.ops.densenet_fast.cuda_replay(made._handle, tensors, *memory, 0)
    replayed = launched()
    for i, step in enumerate(made.steps):
        if isinstance(step, Launch):
            made.launch(i, tensors, *memory)
    by_triton = launched()
    assert len(replayed) >= 9 and replayed == by_triton
    assert len({name for name, *_ in replayed}) >= 7 and any(shared > 0 for *_, shared, _, _ in replayed)


def test_a_replay_launches_what_the_body_does(gpu):
    """But for the addresses of what is allocated."""
    made, inputs = planned(LAYERS[0], torch.float16)
    assert made.run(inputs) is not None
    replayed = launched()
    layer(*inputs)
    direct = launched()
    moved = [{at for at, *_ in call.relocations} for call in made.calls if not call.own]
    assert len(replayed) == len(direct) == len(moved)
    given = {t.data_ptr() for t in tensors_in(inputs)}
    for one, other, places in zip(replayed, direct, moved):
        assert one[:-1] == other[:-1]
        for at in range(0, len(one[-1]), 4):
            same = one[-1][at : at + 4] == other[-1][at : at + 4]
            assert same or at in places or at - 4 in places, (one[0], at)
        for at in places:
            addresses = [int.from_bytes(data[at : at + 8], "little") for data in (one[-1], other[-1])]
            assert addresses[0] == addresses[1] or not given & set(addresses)


def test_inputs_of_another_kind_launch_nothing(gpu):
    made, inputs = planned(LAYERS[0], torch.float16)
    x, rest = inputs[0], inputs[1:]
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    for other in (x[:-1], x.float(), x.t().contiguous().t(), shifted):
        assert made.run([other, *rest]) is None
    assert made.run(rest) is None
    assert not launched()
    assert made.run(inputs) is not None and launched()


def test_an_error_names_the_kernel_and_says_what_the_driver_says(gpu):
    made, inputs = planned(LAYERS[0], torch.float16)
    driver().stub_fail(1)
    try:
        with pytest.raises(RuntimeError, match="the kernel bn_relu_conv1x1: launch failed, says the stub"):
            made.run(inputs)
    finally:
        driver().stub_fail(0)


def test_parameters_that_the_driver_does_not_confirm(gpu):
    driver().stub_silence(1)
    try:
        with pytest.raises(Unplannable, match="bn_relu_conv1x1 has parameters at .*, the driver says nothing"):
            planned(LAYERS[0], torch.float16)
    finally:
        driver().stub_silence(0)


@pytest.mark.parametrize("field, value", [(name, 128 if plain == 0 else 2) for name, plain in PLAIN.items()])
def test_launches_of_another_kind_cannot_be_planned(field, value):
    item = Launch(SimpleNamespace(__name__="kernel", arg_names=["n"]), (1,), (3,), {}, config.BN_RELU)
    compiled = SimpleNamespace(metadata=SimpleNamespace(), src=SimpleNamespace(signature={"n": "i32"}))
    assert parameters(item, compiled).data == bytes([3]) + bytes(7 + 16)
    compiled.metadata = SimpleNamespace(**{field: value})
    with pytest.raises(NotImplementedError, match=f"kernel has {field} = {value}"):
        parameters(item, compiled)


def test_every_replay_has_memory_of_its_own(gpu):
    """Two forward passes before a backward pass: results that are alive share no memory."""
    made, inputs = planned(LAYERS[0], torch.float16)
    results = [list(tensors_in(made.run(inputs))) for _ in range(2)]
    first, second = ({t.untyped_storage().data_ptr() for t in result} for result in results)
    assert not first & second


def test_a_plan_that_goes_is_forgotten(gpu):
    made, inputs = planned(LAYERS[0], torch.float16)
    handle, tensors, memory = made._handle, list(tensors_in(inputs)), made._allocate()
    assert plan.kernels.cuda_replay(handle, tensors, *memory, 0)
    del made
    with pytest.raises(RuntimeError, match=f"there is no plan {handle}"):
        plan.kernels.cuda_replay(handle, tensors, *memory, 0)


def test_a_constant_of_one_is_no_parameter(gpu):
    """Where Triton makes a constant of an integer that is 1."""
    x = torch.randn(40, 16).half()

    def body(x, affine, weight):
        z = x.new_empty(40, 1)
        backend.bn_relu_conv1x1(x, Affine(*affine), weight, None, z, None)
        return z

    inputs = [x, list(torch.randn(3, 16)), x[:1].clone()]
    made = plan.make(body, inputs, CPU)
    made.run(inputs)
    ((*_, replayed),) = launched()
    (item,) = made.steps
    with launch.current(CPU):
        body(*inputs)
    ((*_, direct),) = launched()
    assert item.arguments[-2] == 1 and len(replayed) == len(direct)
