"""What the kernels read and write, counted access by access in Triton's interpreter against the design's account.

``test_interpreter.py`` runs this file (TRITON_INTERPRET=1). It counts the bytes that the programs of a GPU's
configuration request. Where several neighbouring programs request the same, all but the first find it in the L2 cache.
"""

import pytest
import torch

from backends.plan.bodies import equal
from backends.triton import interpreter
from backends.triton.cases import LAYERS, Layer
from backends.triton.memory import watching
from densenet_fast.backends import triton as backend
from densenet_fast.backends.affine import empty_statistics
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.launch import recording
from densenet_fast.backends.triton.tune import Shape, Step
from launches.counts import Counts
from launches.triton_counts import COUNTING, count

HALF = 2
SINGLE = 4


def test_shortcuts_change_nothing():
    """Every kernel's results are the same bitwise."""
    layer, results = Layer(*LAYERS[2], torch.float16), []
    try:
        for values in (interpreter.AS_IT_IS, interpreter.SHORTCUTS):
            interpreter.take(values)
            results.append(layer.run(backend))
    finally:
        interpreter.take()
    assert results[0].keys() == results[1].keys() and equal(*(list(made.values()) for made in results))


@pytest.mark.parametrize("sizes", LAYERS[:3], ids=str)
def test_no_access_outside_the_matrices(sizes, monkeypatch):
    """No kernel touches a neighbouring column or row, or the space between rows."""
    with watching(monkeypatch) as traffic:
        Layer(*sizes, torch.float16).run(backend)
    assert len({kernel for kernel, _, _ in traffic}) >= 7


@pytest.mark.parametrize("generation", [80, 90])
def test_results_as_configured_for_gpus(generation):
    """Among the results is dW by either operand turned, of several ranges of rows."""
    layer = Layer((3, 9, 11), 40, 72, 12, torch.float16)
    with config.assume(config.Device(generation, 2)), launch.recording() as launches:
        found = layer.against_aten(backend, torch.float16)
    assert found and all(one.right for one in found), "\n".join(str(one) for one in found if not one.right)
    backward = [item for item in launches if item.name == "bn_relu_conv1x1_backward" and item.constants["INPUT"]]
    turned = [item.constants["TURNED"] for item in backward if item.constants["WEIGHT"]]
    assert turned and set(turned) == {generation == 80} and max(item.grid[1] for item in backward) > 1


@pytest.mark.parametrize("width, outputs", [(128, 32), (192, 48)])
@pytest.mark.parametrize("generation", [80, 90])
def test_traffic_of_a_layer(generation, width, outputs, monkeypatch):
    """Forward, each column of F and Z is read once and written once, but for the nine taps. Backward, F is read once,
    and G is read once and written once."""
    layer = Layer((2, 8, 10), 64, width, outputs, torch.float16)
    f, z, y = (layer.rows * columns * HALF for columns in (layer.channels, width, outputs))
    device = config.Device(generation, 2)
    with config.assume(device), watching(monkeypatch) as traffic:
        out, statistics = torch.empty_like(layer.z), empty_statistics(layer.z, width, 1e-5)
        backend.bn_relu_conv1x1(layer.features, layer.affine1, layer.w1, None, out, statistics)
        second = (layer.z, layer.affine2, layer.w2)
        statistics = empty_statistics(layer.buffer, outputs, 1e-5)
        backend.bn_relu_conv3x3(*second, None, layer.grid, layer.buffer[:, layer.new], statistics=statistics)
        dy, g = layer.gradient[:, layer.new], layer.gradient[:, : layer.channels]
        backend.bn_relu_conv3x3_backward(dy, *second, layer.grid, torch.empty_like(layer.z), need_weight=True)
        given = (layer.dz, layer.features, layer.affine1, layer.w1, g)
        backend.bn_relu_conv1x1_backward(*given, need_weight=True, need_sums=True)

    def tiles(kernel, columns):
        return -(-columns // config.tile(kernel, device, torch.float16, columns).columns)

    def requested(kernel):
        return {key[1:]: count for key, count in traffic.items() if key[0] == kernel and count}

    forward = requested("bn_relu_conv1x1")
    assert forward["load", "x"] == f and forward["store", "z"] == z
    assert forward["store", "partials"] <= z / 8

    rectify = requested("bn_relu")
    assert rectify["load", "x"] == z and rectify["store", "out"] == z

    convolve = requested("bn_relu_conv3x3")
    assert 6 * z < convolve["load", "a"] <= 9 * z and convolve["store", "out"] == y
    assert convolve["store", "partials"] <= y / 8

    grad_input = requested("bn_relu_conv3x3_grad_input")
    column_tiles = tiles("bn_relu_conv3x3_grad_input", width)
    assert grad_input["load", "z"] == grad_input["store", "scaled"] == grad_input["store", "a"] == z
    assert 6 * y * column_tiles < grad_input["load", "grad"] <= 9 * y * column_tiles

    grad_weight = requested("bn_relu_conv3x3_grad_weight")
    column_tiles, output_tiles = tiles("bn_relu_conv3x3_grad_weight", width), -(-outputs // 32)
    assert grad_weight["load", "a"] == 3 * z * output_tiles
    assert 6 * y * column_tiles < grad_weight["load", "grad"] <= 9 * y * column_tiles

    backward = requested("bn_relu_conv1x1_backward")
    assert backward["load", "x"] == backward["load", "source"] == backward["store", "source"] == f  # grad_x is source
    owners = -(-layer.channels // config.tile("bn_relu_conv1x1_backward", device, torch.float16, width).columns)
    assert backward["load", "grad"] == owners * z
    assert backward["load", "weight"] == width * layer.channels * HALF * ranges(backward, layer)


def ranges(requested, layer):
    """Row ranges of the 1x1 product's backward launch, from the partial results it leaves."""
    count, rest = divmod(requested["store", "partials"], (layer.width + 2) * layer.channels * SINGLE)
    assert rest == 0
    return count


@pytest.mark.parametrize("generation", [80, 90])
def test_traffic_of_a_transition(generation, monkeypatch):
    """F is read once forward, statistics of the result included. It is read once backward, and its gradient is written
    once."""
    layer = Layer((1, 10, 16), 64, 16, 32, torch.float16)
    arguments = (layer.features, layer.affine1, layer.transition)
    device = config.Device(generation, 2)
    with config.assume(device), watching(monkeypatch) as traffic:
        statistics = empty_statistics(layer.z, layer.outputs, 1e-5)
        out = backend.bn_relu_pool_conv1x1(*arguments, None, layer.grid, statistics)
        given = (torch.ones_like(out), *arguments, layer.grid)
        backend.bn_relu_pool_conv1x1_backward(*given, need_input=True, need_weight=True)
    f = layer.rows * layer.channels * HALF
    forward, backward = "bn_relu_pool_conv1x1", "bn_relu_pool_conv1x1_backward"
    assert traffic.of(forward, "load", "x") == traffic.of(backward, "load", "x") == f
    assert traffic.of(forward, "store", "out") == out.numel() * HALF
    row_tiles = -(-out.shape[0] // config.tile(forward, device, torch.float16, layer.outputs).rows)
    assert traffic.of(forward, "store", "partials") == row_tiles * 2 * layer.outputs * SINGLE
    assert not any(kernel == forward and kind == "load" and name == "out" for kernel, kind, name in +traffic)
    column_tiles = layer.channels // config.tile(backward, device, torch.float16, layer.channels).columns
    assert traffic.of(backward, "load", "grad") == column_tiles * out.numel() * HALF
    assert traffic.of(backward, "store", "scaled") == f and traffic.of(backward, "store", "pooled") == f / 4


KINDS = {
    "asked": {("load", name) for name in ("x", "grad", "source", "grad_x", "a", "z", "dz")},
    "written": {("store", name) for name in ("z", "out", "grad", "source", "grad_x", "scaled", "a", "dz", "pooled")},
    "weights_asked": {("load", "weight"), ("store", "grad_weight"), ("store", "grad_other")},
    "partials_asked": {(kind, name) for kind in ("load", "store") for name in ("partials", "others")},
}
"""What the counts of a launch hold, by access and by the first argument in that memory. The rest is vectors."""
PLAIN = ("bn_relu_conv1x1_backward", "store", "mean")
"""A plain product takes its partial results in the place of the vectors too."""


@pytest.mark.parametrize("generation, width, outputs", [(90, 128, 32), (80, 160, 24), (90, 288, 80)])
def test_counts_are_what_the_kernels_ask_for(generation, width, outputs, monkeypatch):
    """The counts that the model of a step is made of, but for the taps beyond the edges of images of 8x8."""
    step = Step(Shape(3, 8, 80, width, outputs, 24), torch.float16, torch.device("cpu"))
    with config.assume(config.Device(generation, 2)), watching(monkeypatch) as traffic, recording() as launches:
        step.run(backend)
    counted = {}
    for item in launches:
        one = count(item, generation)
        counted[item.name] = counted.get(item.name, Counts(item.name, launches=0)) + one
    assert counted.keys() == COUNTING.keys()
    traffic[PLAIN[0], "store", "partials"] += traffic.pop(PLAIN)
    for kernel, counts in counted.items():
        for kind, accesses in KINDS.items():
            asked = sum(size for key, size in traffic.items() if key[0] == kernel and key[1:] in accesses)
            least = 0.7 if "conv3x3" in kernel and kind == "asked" else 1
            assert least * getattr(counts, kind) <= asked <= getattr(counts, kind), (kernel, kind, asked, counts)
