"""Every configuration of the table, compiled for the GPU it is for and read back; no device is needed.

Kernels have no stack, so no spills, and their shared memory is within bounds. In half precision they have tensor core
instructions and 16-byte asynchronous copies. The assembler does not warn that it serialises products. Where rows are of
aligned lengths nothing is loaded or stored by the element.

The backward pass of the 1x1 convolution has no more programs than run at once. In half precision for up to 128 columns
a multiprocessor runs two of them, and all that they read is in flight.

Launches are planned on meta tensors of DenseNet-121's, DenseNet-161's and DenseNet-BC's (k = 12) sizes.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from backends.triton.ahead_of_time import SHARED_BYTES, compile_launch, resident
from backends.triton.cases import Layer
from densenet_fast.backends import triton as backend
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.config import Tile
from densenet_fast.backends.triton.tune import DTYPES, Shape, Step, row_of

PAIR = ("bn_relu_conv1x1", "bn_relu_conv1x1_backward")
PRODUCTS = tuple(config.TABLE)
PROCESSORS = 132
NETWORKS = {
    # the kernels to compile, None for all products; of the first, everything
    "121": (Shape(32, 28, 256, 128, 32, 128), "bf16", None),
    "161": (Shape(32, 28, 384, 192, 48, 192), "bf16", None),
    "BC with k = 12": (Shape(64, 32, 24, 48, 12, 12), "bf16", None),
    "wide bottleneck": (Shape(32, 28, 128, 320, 80, 320), "bf16", PAIR),
    "121 in float16": (Shape(32, 28, 256, 128, 32, 128), "fp16", None),
    "121 in TF32": (Shape(32, 28, 256, 128, 32, 128), "tf32", None),
    "161 in TF32": (Shape(32, 28, 384, 192, 48, 192), "tf32", PAIR),
    "121 in float32": (Shape(32, 28, 256, 128, 32, 128), "fp32", None),
}


@pytest.mark.parametrize("generation", [80, 90])
@pytest.mark.parametrize("network", NETWORKS)
def test_configurations_compile_well(network, generation):
    shape, name, kernels = NETWORKS[network]
    dtype, precision = DTYPES[name]
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        with config.assume(config.Device(generation, PROCESSORS)):
            launches = {str(item): item for item in Step(shape, dtype, torch.device("meta")).launches()}.values()
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    complaints = []
    for item in launches:
        if item.name in (kernels or PRODUCTS) or network == "121":
            got = compile_launch(item, generation, disassemble=dtype != torch.float32)
            complaints += [f"sm_{generation} {item}: {c}; {got}" for c in faults(item, got, dtype, generation, shape)]
    assert not complaints, "\n".join(complaints)


def faults(item, got, dtype, generation, shape):
    """What is wrong with what the compiler made of a launch."""
    if got.spilled or got.stack:
        yield "registers spill"
    if got.shared > SHARED_BYTES[generation]:
        yield "too much shared memory"
    if got.hazards:
        yield f"{len(got.hazards)} registers of unfinished products are used: {got.hazards[0]}"
    if got.races:
        yield f"{len(got.races)} races: {got.races[0]}"
    constants = item.constants
    rectifies = "norm_bias" in item.kernel.arg_names and constants.get("WEIGHT", True) and not constants.get("PLAIN")
    if rectifies and not got.keeps_nan:
        yield "the ReLU hides a NaN"
    aligned = all(unit >= 8 for name, unit in item.constants.items() if name.endswith("UNIT"))
    if aligned and got.by_the_element:
        yield f"{got.by_the_element} loads and stores of one element"
    at_once = resident(item, got, generation)
    if item.name == "bn_relu_conv1x1_backward" and math.prod(item.grid[:2]) > PROCESSORS * at_once:
        yield f"{item.grid[:2]} programs for a block of columns, of which a multiprocessor runs {at_once} at once"
    if "PRECISION" not in item.constants or dtype == torch.float32:
        return
    if item.name == "bn_relu_conv1x1_backward" and constants["INPUT"] and constants["WIDTH"] <= 128:
        if at_once < 2:
            yield "one block a multiprocessor"
        if aligned and got.in_flight != {"grad", "x", "source"}:
            yield f"while products run, only {got.in_flight} are in flight"
    asynchronous = generation >= 90 and item.constants["ROWS"] >= 64  # a warp group's least
    if not got.products or (asynchronous and got.products != {"HGMMA"}):
        yield f"products by {got.products or 'no tensor core'}"
    if aligned and not got.wide_copies:
        yield "no 16-byte asynchronous copies"
    reads_early = dtype == torch.float16 and item.name == "bn_relu_conv3x3"
    if got.warnings and not reads_early:
        yield "the assembler warns"


def test_what_is_waited_for_is_not_in_flight():
    """With two stages each tile waits for its own copies. Without a number of stages G is loaded in place."""
    name = "bn_relu_conv1x1_backward"

    def found(stages, loop="num_stages=STAGES"):
        with row_of(name, (90, "half"), Tile(32, 64, 128, 4, stages)), config.assume(config.Device(90, PROCESSORS)):
            launches = Step(NETWORKS["121"][0], torch.bfloat16, torch.device("meta")).launches()
        item = next(item for item in launches if item.name == name)
        kernel = triton.jit(item.kernel.fn, do_not_specialize=item.kernel.do_not_specialize)
        assert ", num_stages=STAGES)" in kernel.src
        kernel._unsafe_update_src(kernel.src.replace("num_stages=STAGES", loop))
        return compile_launch(item._replace(kernel=kernel), 90, disassemble=False).in_flight

    assert found(3) == {"grad", "x", "source"}
    assert found(2) == set() and found(3, "num_stages=None") == {"grad", "x"}


@pytest.mark.parametrize("sizes", [((2, 5, 7), 33, 20, 12), ((1, 2, 2), 1, 1, 1)], ids=str)
def test_every_variant_compiles(sizes):
    """The variants are with and without bias, mask, statistics and each gradient. Nothing divides the first sizes. The
    others are ones, which Triton compiles in as constants."""
    with config.assume(config.Device(90, 132)), launch.planning() as launches:
        Layer(*sizes, torch.bfloat16).run(backend)
    for item in {str(item): item for item in launches}.values():
        assert compile_launch(item, 90, disassemble=False).registers, str(item)
