"""The Triton backend's results: on a GPU if there is one, else in the interpreter (TRITON_INTERPRET=1).

``test_interpreter.py`` runs this file on CPUs, ``make gpu`` on a GPU.
"""

import pytest
import torch
import torch.utils.checkpoint

import densenet_fast
from backends.triton.cases import LAYERS, TF32_ROUNDING, Layer
from densenet_fast import backends, functional
from densenet_fast.backends import aten
from densenet_fast.backends import triton as backend
from densenet_fast.backends.affine import Affine, empty_statistics
from densenet_fast.backends.triton import config, launch
from densenet_fast.functional import BatchNorm, BNReLUConv, shared
from densenet_fast.ops import ahead
from helpers import error, randomise, step, twin

DEVICE = "cpu" if backend.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
"""bfloat16 is wrong in Triton's interpreter."""

FORWARD = ["bn_relu_conv1x1", "combine_statistics", "bn_relu", "bn_relu_conv3x3"]
BACKWARD = [
    "bn_relu_conv3x3_grad_input",
    "sum_partials",
    "bn_relu_conv3x3_grad_weight",
    "bn_relu_conv1x1_backward",
    "sum_partials",
]


@pytest.fixture(scope="module", autouse=True)
def all_in_triton():
    """Triton makes the 3x3 products too, where CUDA C++ would serve."""
    with config.convolution_in_triton():
        yield


@pytest.fixture(params=["tf32", "ieee"] if DEVICE == "cuda" else ["tf32"])
def precision(request):
    """torch's setting for convolutions; the interpreter rounds neither way."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


def assert_as_aten(layer, dtype, precision):
    """The error against ``aten`` in float64 is at most twice that of ``aten`` in ``dtype`` and the rounding of one
    result. What nobody writes is still NaN."""
    rounded = DEVICE == "cuda" and dtype == torch.float32 and precision == "tf32"
    for result in layer.against_aten(backend, dtype, TF32_ROUNDING if rounded else 0.0):
        assert result.right, result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LAYERS, ids=str)
def test_every_kernel_against_aten(sizes, dtype, precision):
    assert_as_aten(Layer(*sizes, dtype, DEVICE), dtype, precision)


@pytest.mark.parametrize("generation", [80, 90])
def test_every_kernel_in_the_tiles_of_a_gpu(generation, precision):
    """Tiles are much larger than the matrices or, in rows, smaller."""
    with config.assume(config.Device(generation, 3)):
        assert_as_aten(Layer((1, 11, 13), 40, 192, 20, torch.float16, DEVICE), torch.float16, precision)


def test_statistics_over_many_tiles():
    """There are more tiles than are combined at once, and the mean is large against the deviation."""
    x = torch.randn(2100, 3, device=DEVICE) * 1e-2 + 30
    ones, zeros = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    weight = torch.eye(3, device=DEVICE)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    z = torch.empty_like(x)
    statistics = empty_statistics(z, 3, 1e-5)
    backend.bn_relu_conv1x1(x, Affine(zeros, ones, zeros), weight, None, z, statistics)
    mean, var, rstd, _ = statistics
    torch.backends.cudnn.conv.fp32_precision = before
    true_var, true_mean = torch.var_mean(z.double(), 0, correction=0)
    assert z.equal(x) and error(mean, true_mean) < 1e-6 and error(var, true_var) < 1e-5
    assert error(rstd, torch.rsqrt(var.double() + 1e-5)) < 1e-6


def test_a_nan_stays_a_nan():
    layer = Layer((1, 4, 4), 8, 16, 4, torch.float32, DEVICE)
    layer.buffer[5, 3] = torch.nan
    z = torch.empty_like(layer.z)
    statistics = empty_statistics(z, 16, 1e-5)
    backend.bn_relu_conv1x1(layer.features, layer.affine1, layer.w1, None, z, statistics)
    assert z[5].isnan().all() and z[:5].isfinite().all() and z[6:].isfinite().all()
    assert all(t.isnan().all() for t in statistics[:3])


def test_wide_dropout_mask_of_any_strides(precision):
    layer = Layer((2, 4, 3), 8, 16, 6, torch.float32, DEVICE)
    results = []
    for mask in (layer.mask, layer.mask.to(memory_format=torch.channels_last)):
        out = layer.buffer[:, layer.new]
        backend.bn_relu_conv3x3(layer.z, layer.affine2, layer.w2, None, layer.grid, out, mask=mask, keep_scale=3.0)
        results.append(out.clone())
    assert results[0].equal(results[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_training_step_of_a_network(dtype, memory_efficient, monkeypatch):
    """The output, every gradient and running statistics are no further from float64 than on ``aten``."""

    def make():
        net = densenet_fast.DenseNet(
            4, (2, 1), 6, 3, memory_efficient=memory_efficient, num_classes=3, small_inputs=True
        )
        return net.to(DEVICE, dtype)

    ours = randomise(make())
    theirs, exact = twin(ours, make()), twin(ours, make()).double()
    x = torch.randn(2, 3, 7, 6, device=DEVICE).to(dtype)
    truth = dict(step(exact, x.double()))
    with launch.recording() as launches:
        got = dict(step(ours, x))
    if config.precision(dtype) != "ieee":
        assert {item.name for item in launches} >= {*FORWARD, *BACKWARD, "bn_relu_pool_conv1x1"}
    monkeypatch.setattr(backends, "BACKENDS", (aten,))
    reference = dict(step(theirs, x))
    for name, expected in truth.items():
        expected = expected.double()
        allowed = 2 * (reference[name].double() - expected).norm() + 8 * torch.finfo(dtype).eps * expected.norm()
        assert (got[name].double() - expected).norm() <= allowed, name


def block(depth, device=DEVICE, dtype=torch.float32):
    def unit(channels, out, kernel):
        weight = torch.randn(out, channels, kernel, kernel, device=device, dtype=dtype)
        norm = BatchNorm(torch.rand(channels, device=device), torch.rand(channels, device=device))
        return BNReLUConv(
            norm._replace(weight=norm.weight.to(dtype), bias=norm.bias.to(dtype)), weight.requires_grad_()
        )

    return [(unit(8 + 4 * i, 16, 1), unit(16, 4, 3)) for i in range(depth)]


def test_launches_of_a_layer(precision):
    """Forward there are two products, relu(bn(Z)) and two reductions. Backward there are three products and two
    reductions, and one product more with recomputation."""
    if precision == "ieee":
        pytest.skip("the 3x3 product is the library's")
    x = torch.randn(2, 8, 4, 4, device=DEVICE, requires_grad=True)
    for memory_efficient in (False, True):
        with launch.recording() as launches:
            output = functional.dense_block(x, block(3), memory_efficient=memory_efficient)
        forward = [*FORWARD, "combine_statistics"]
        assert [item.name for item in launches] == [*forward, *forward, *FORWARD]
        with launch.recording() as launches:
            output.backward(torch.ones_like(output))
        names = [item.name for item in launches]
        assert names == 3 * [*(["bn_relu_conv1x1"] * memory_efficient), *BACKWARD]


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_a_first_step_launches_what_was_compiled_ahead(memory_efficient, precision, monkeypatch):
    """All that a network's training step and its inference launch is compiled ahead, and only once."""
    compiled = []
    monkeypatch.setattr(ahead, "DEVICE", DEVICE)
    monkeypatch.setattr(ahead, "_compiled_kinds", set())
    monkeypatch.setattr(launch, "compile_all", lambda items, device: compiled.extend(items))
    monkeypatch.setattr(launch, "run", lambda item: None)
    monkeypatch.setattr(shared, "beyond_range", lambda *_: False)  # values that nothing was written to
    net = densenet_fast.DenseNet(16, (2, 1), 32, 2, memory_efficient=memory_efficient, num_classes=3, small_inputs=True)
    net, x = net.to(DEVICE), torch.randn(2, 3, 8, 6, device=DEVICE, requires_grad=True)
    with launch.recording() as launches:
        net(x).sum().backward()
        with torch.no_grad():
            net.eval()(x)
    assert {item.variant for item in launches} <= {item.variant for item in compiled}
    assert all(item.arguments[0].is_meta for item in compiled)
    count = len(compiled)
    assert count
    net.train()(torch.randn(3, 3, 12, 6, device=DEVICE)).sum().backward()
    assert len(compiled) == count


def test_no_hook_of_the_caller_sees_what_is_planned(monkeypatch):
    """Checkpointing, which counts saved tensors, does not see it either. Anomaly detection looks at values, so nothing
    is planned under it. A plan that fails is reported and stops nothing."""
    compiled, seen = [], []
    monkeypatch.setattr(ahead, "DEVICE", DEVICE)
    monkeypatch.setattr(launch, "compile_all", lambda items, device: compiled.append(len(items)))
    x, layers = torch.randn(2, 8, 4, 4, device=DEVICE, requires_grad=True), block(2)

    def first():
        monkeypatch.setattr(ahead, "_compiled_kinds", set())
        return functional.dense_block(x, layers)

    expected = first()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.device.type) or t, lambda t: t):
        first()
    assert set(seen) == {torch.device(DEVICE).type} and len(compiled) == 2
    torch.utils.checkpoint.checkpoint(first, use_reentrant=False).sum().backward()
    assert len(compiled) == 4 and x.grad.isfinite().all()
    with torch.autograd.detect_anomaly(check_nan=True):
        first().sum().backward()
    assert len(compiled) == 4

    def fails(*_):
        raise NotImplementedError("no meta")

    monkeypatch.setattr(ahead, "plan", fails)
    with pytest.warns(UserWarning, match="compiled one by one: NotImplementedError: no meta"):
        assert first().equal(expected)


WITHOUT_VALUES = {
    *("as_strided", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "slice", "select", "unbind", "narrow", "transpose", "t"),
    *("movedim", "permute", "flatten", "expand", "detach", "alias", "unsqueeze", "set_", "view_as", "contiguous"),
    "fill_",  # of what is empty, while tests are run
}
"""Operations of torch that allocate or view and launch nothing."""


def test_no_operation_of_torch_in_a_layer(precision, monkeypatch):
    """What works on values is done once for the block, however deep. Nothing is launched, so values are wrong."""
    if precision == "ieee":
        pytest.skip("the 3x3 product is the library's")
    monkeypatch.setattr(backend, "prepare", lambda jobs: None)  # one launch for all layers
    monkeypatch.setattr(launch, "run", lambda item: None)
    monkeypatch.setattr(shared, "beyond_range", lambda *_: False)

    def counted(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = run()
        names = [(event.key.removeprefix("aten::"), event.count) for event in profile.key_averages()]
        skipped = "::", "cuda"  # other libraries' operations, and calls of CUDA's runtime
        found = [(name, count) for name, count in names if not any(word in name for word in skipped)]
        return result, {name: count for name, count in found if name not in WITHOUT_VALUES}

    def operations(depth):
        x, layers = torch.randn(2, 8, 4, 4, device=DEVICE, requires_grad=True), block(depth)
        output, forward = counted(lambda: functional.dense_block(x, layers))
        return forward, counted(lambda: output.backward(torch.ones_like(output)))[1]

    for shallow, deep in zip(operations(2), operations(5)):
        assert {name: count - shallow.get(name, 0) for name, count in deep.items() if count != shallow.get(name)} == {}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: interpreted programs run in one order")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_over_ten_runs(dtype):
    layer = Layer((8, 28, 28), 160, 128, 32, dtype, DEVICE)
    first = layer.run(backend)
    for _ in range(9):
        assert all(a.nan_to_num(0).equal(first[name].nan_to_num(0)) for name, a in layer.run(backend).items())


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: four gigabytes of features")
def test_more_than_two_to_the_31_elements():
    rows, width = (1 << 31) // 1024 + 77, 1024
    buffer = torch.zeros(rows, width, dtype=torch.bfloat16, device=DEVICE)
    layer = Layer((1, 1, 77), 64, 128, 32, torch.bfloat16, DEVICE)
    buffer[-77:, -64:] = layer.features
    z = torch.empty(rows, 128, dtype=torch.bfloat16, device=DEVICE)
    backend.bn_relu_conv1x1(buffer[:, -64:], layer.affine1, layer.w1, None, z, None)
    backend.bn_relu_conv1x1(layer.features.contiguous(), layer.affine1, layer.w1, None, layer.z, None)
    assert z[-77:].equal(layer.z)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
def test_captured_in_a_cuda_graph():
    layer = Layer((2, 14, 14), 64, 128, 32, torch.bfloat16, DEVICE)
    expected = layer.run(backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer.run(backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.run(backend)
    graph.replay()
    torch.cuda.synchronize()
    assert all(value.nan_to_num(0).equal(captured[name].nan_to_num(0)) for name, value in expected.items())
