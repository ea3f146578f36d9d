"""The counts of a training step's launches: by hand for a small one, bounded for the networks; the model made of them.

What the bound of the blocks' traffic holds is their floor in ``traffic.py``: for each pixel and layer 4C + 6B + 5k
elements (C columns read, B of the bottleneck, k new), of which the 1x1 convolution is C + B, the 3x3 B + k, completing
dY 3k, the 3x3's backward k + 2B, the 1x1's 3C + 2B; and the block's input appended and its gradient completed. Bounded
are feature maps and their gradients, each once a launch. Weights and the kernels' partial results, which grow with the
processors and not with the batch, come on top: ``benchmarks/step_model.py`` prints all three.
"""

import functools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import step_model
from densenet_fast.backends.triton.config import Device
from densenet_fast.benchmarking.networks import architecture
from launches import kernel_times, roofline
from launches.audit import ALL, audited
from launches.conv3x3_counts import Conv3x3
from launches.counts import Counts
from launches.kernel_times import Time
from launches.roofline import Figure, Gpu
from launches.step_plan import counted_step, meta_network, torch_counts

HOPPER = Device(90, 132)
BLOCK = {"growth_rate": 4, "block_config": (2,), "num_init_features": 8, "small_inputs": True, "num_classes": 10}
SMALL = Device(90, 2)
STEPS = {
    "densenet121": (224, (32, 128, 256)),
    "densenet161": (224, (32, 64, 128)),
    "densenet201": (224, (32, 128, 256)),
    "densenet_bc100": (32, (64, 256, 1024)),
}


MOST = {32: 3.6e-3, 128: 9.5e-3}
"""Seconds of a step of DenseNet-121 on an H200 by the model, at most, by batch."""


@functools.cache
def network_of(name, memory_efficient):
    return meta_network(BLOCK if name == "block" else architecture(name), torch.bfloat16, memory_efficient)


def step_of(name, batch, size, device=HOPPER, native=True, memory_efficient=False):
    return counted_step(network_of(name, memory_efficient), batch, size, torch.bfloat16, device, native)


@pytest.fixture(scope="module")
def small():
    """Of 8 images of 5x5: 200 rows; C0 = 8, k = 4, B = 16; the layers read 8 and 12 columns; 2 bytes an element."""
    return step_of("block", 8, 5, SMALL)


def last(counts, kernel):
    return [one for one in counts if one.kernel == kernel][-1]


def test_a_small_step_by_hand(small):
    # The first layer's 1x1, last to come: tiles of 128 rows (2), 16 columns and 16 channels at a time.
    first = [one for one in small if one.kernel == "bn_relu_conv1x1"][0]
    expected = Counts("bn_relu_conv1x1", "blocks", read=2 * 200 * 8, asked=2 * 200 * 8, written=2 * 200 * 16)
    expected += Counts("", launches=0, weights=2 * 16 * 8, weights_asked=2 * 2 * 16 * 8)
    expected += Counts("", launches=0, partials=4 * 2 * 2 * 16, partials_asked=4 * 2 * 2 * 16, wgmma=256 * 16 * 16)
    assert first == expected
    # The last layer's backward pass: dZ and W1 once, F and G of 12 columns, G written; one range of rows.
    backward = [one for one in small if one.kernel == "bn_relu_conv1x1_backward"][0]
    expected = Counts("bn_relu_conv1x1_backward", "blocks", read=2 * 200 * (16 + 24), asked=2 * 200 * (16 + 24))
    expected += Counts("", launches=0, written=2 * 200 * 12, weights=2 * 16 * 12, weights_asked=2 * 16 * 12)
    sums = 4 * (16 + 2) * 12
    made = 224 * 64 * 16  # padded: tiles of 32 rows, 64 columns of dZ, 16 channels
    assert backward == expected + Counts("", launches=0, partials=sums, partials_asked=sums, wgmma=made, mma=made)
    # What follows adds up dW1, in float32, its sums, and dW2's one range; and completes 4 columns in 4 chunks of 64
    # rows, each of which adds up these columns' sums.
    summed = small[small.index(backward) + 1]
    partials = sums + 4 * 576
    expected = Counts("sum_partials", "blocks", read=2 * 2 * 200 * 4, asked=2 * 2 * 200 * 4, written=2 * 200 * 4)
    expected += Counts("", launches=0, weights=4 * (16 * 12 + 576), weights_asked=4 * (16 * 12 + 576))
    assert summed == expected + Counts("", launches=0, partials=partials, partials_asked=partials + 4 * 4 * 2 * 4)


def test_small_halos_by_hand(small):
    # Forward, one tile of 256 rows, whose halo is beyond the images; products of 16 columns for 4.
    forward = last(small, "bn_relu_conv3x3")
    expected = Counts("bn_relu_conv3x3", "blocks", read=2 * 200 * 16, asked=2 * 200 * 16, written=2 * 200 * 4)
    expected += Counts("", launches=0, weights=2 * 576, weights_asked=2 * 576)
    assert forward == expected + Counts(
        "", launches=0, partials=4 * 2 * 4, partials_asked=4 * 2 * 4, mma=256 * 9 * 16 * 16
    )
    # The input's gradient, 2 tiles of 128 rows in 2 blocks: dY, with 12 more rows each, and Z; 64 columns for 16.
    grad_input = last(small, "bn_relu_conv3x3_grad_input")
    expected = Counts("bn_relu_conv3x3_grad_input", "blocks", read=2 * 200 * 20, asked=2 * (224 * 4 + 200 * 16))
    expected += Counts("", launches=0, written=2 * 200 * 16, weights=2 * 576, weights_asked=2 * 2 * 576)
    sums, made = 4 * 2 * 2 * 16, 256 * 9 * 64 * 16
    assert grad_input == expected + Counts("", launches=0, partials=sums, partials_asked=sums, mma=made)
    # The weight's, both tiles in one range: dY with its halo, Z, scale * D; dZ is written.
    grad_weight = last(small, "bn_relu_conv3x3_grad_weight")
    expected = Counts("bn_relu_conv3x3_grad_weight", "blocks", read=2 * 200 * 36, asked=2 * (224 * 4 + 200 * 32))
    expected += Counts("", launches=0, written=2 * 200 * 16, partials=4 * 576, partials_asked=4 * 576)
    assert grad_weight == expected + Counts("", launches=0, mma=made)
    assert grad_weight.dram == 2 * 200 * 52 + 2304 and grad_weight.l2 == 2 * (896 + 6400 + 3200) + 2304


def test_triton_reads_nine_taps():
    counts = step_of("block", 8, 5, SMALL, native=False)
    forward, written = last(counts, "bn_relu_conv3x3"), last(counts, "bn_relu")
    assert (forward.read, forward.asked) == (2 * 200 * 16, 9 * 2 * 200 * 16)
    assert written.dram == 2 * 2 * 200 * 16
    assert not [one for one in step_of("block", 8, 5, SMALL) if one.kernel == "bn_relu"]


def test_wide_images_and_many_columns():
    # 80 columns of 16 pixels: 5 tiles across, of 16x16 for the forward pass and 8x16 backward, with a pixel around.
    layer = Conv3x3((2, 40, 80), 192, 96, 2, HOPPER)
    assert layer.forward_rows() == 64 and layer.tiles(256) == 2 * 5 * 3 and layer.tiles(128) == 2 * 5 * 5
    assert layer.shifted_rows(256) == 30 * 18 * 18 and layer.shifted_rows(128) == 50 * 10 * 18
    assert layer.column_blocks() == 3 and layer.row_blocks() == 50 and layer.ranges() == 10
    assert layer.forward(True).asked == 2 * 2 * layer.shifted_rows(64) * 192  # two blocks of new columns
    many = layer._replace(grid=(512, 40, 80))
    assert many.row_blocks() == 2 * 132 // 3 and many.ranges() == 2 * 132 // 3 // 2
    assert layer._replace(grid=(1, 7, 7)).input_rows() == 64


@pytest.mark.parametrize("network", STEPS)
def test_blocks_move_at_most_115_hundredths_of_their_floor(network):
    size, batches = STEPS[network]
    arguments = architecture(network)
    for memory_efficient in (False, True):
        for batch in batches:
            counts = step_of(network, batch, size, memory_efficient=memory_efficient)
            audit = audited(counts, arguments, batch, size, 2, memory_efficient)
            assert 1 <= audit.features <= 1.15, (batch, memory_efficient, str(audit))


def test_the_3x3_kernels_ask_the_cache_for_at_most_1_4_times_what_they_read():
    size, batches = STEPS["densenet121"]
    arguments = architecture("densenet121")
    for batch in batches:
        ours, tritons = (
            audited(step_of("densenet121", batch, size, native=native), arguments, batch, size, 2)
            for native in (True, False)
        )
        assert ours.asked[ALL] <= 1.4 < tritons.asked[ALL], (batch, str(ours), str(tritons))


@pytest.mark.parametrize("batch", MOST)
def test_the_model_of_a_step_on_an_h200(batch):
    counts = step_of("densenet121", batch, 224)
    counts += torch_counts(architecture("densenet121"), batch, 224, 2, HOPPER.generation)
    rows = roofline.by_kernel(counts, roofline.GPUS["h200"], torch.bfloat16)
    assert MOST[batch] / 2 < sum(row.seconds for row in rows) <= MOST[batch]


def test_the_launches_are_those_that_a_gpu_ran():
    batch, measured = kernel_times.read_page(step_model.RUN)
    counts = step_of("densenet121", batch, 224, native=False)
    planned = {}
    for one in counts:
        planned[one.kernel] = planned.get(one.kernel, Time()).plus(0.0, one.launches)
    planned = kernel_times.by_function(planned)
    assert len(planned) == 17
    assert {name: time.launches for name, time in planned.items()} == {n: measured[n].launches for n in planned}


@pytest.fixture
def convolutions():
    """Torch's setting for them, put back."""
    before = torch.backends.cudnn.conv.fp32_precision
    yield torch.backends.cudnn.conv
    torch.backends.cudnn.conv.fp32_precision = before


def test_pixels_that_a_transition_drops_are_zeroed():
    arguments = BLOCK | {"block_config": (1, 1)}
    zeroed = []
    for size in (6, 7):
        counts = counted_step(meta_network(arguments, torch.bfloat16), 2, size, torch.bfloat16, HOPPER)
        made = [one.written for one in counts if (one.part, one.kernel) == ("transitions", "prepare_kernel")]
        zeroed.append(2 * 2 * size * size * 12 in made)  # the gradient of 12 columns
    assert zeroed == [False, True]


def test_float32_is_counted_with_tf32_alone(convolutions):
    model = meta_network(BLOCK, torch.float32)
    convolutions.fp32_precision = "ieee"
    with pytest.raises(ValueError, match="torch's libraries convolve"):
        counted_step(model, 2, 8, torch.float32, HOPPER)
    convolutions.fp32_precision = "tf32"
    counts = counted_step(model, 2, 8, torch.float32, HOPPER)
    assert last(counts, "bn_relu").dram == 2 * 4 * 128 * 16  # Triton's: those in CUDA C++ are for 16 bits
    assert last(counts, "bn_relu_conv1x1_backward").read == 4 * 128 * (16 + 2 * 8)


GPU = Gpu(SMALL, *(Figure(value, "given") for value in (10.0, 100.0, 1000.0, 500.0, 1.0)))


def test_the_slowest_of_three_bounds_a_launch():
    memory = Counts("a", read=50, asked=60, written=10)  # 6 s of memory, 0.7 of the cache
    products = Counts("a", read=10, asked=10, wgmma=1000, mma=500)  # 1 s, 0.1, and 1 + 1 of products
    start = Counts("b", partials=5, partials_asked=5)  # half a second, less than to start
    a, b = roofline.by_kernel([memory, start, products], GPU, torch.bfloat16)
    assert (a.counts.kernel, a.counts.launches, a.seconds, a.bound_by) == ("a", 2, 6 + 1 + 2 + 1, "memory")
    assert (b.seconds, b.bound_by) == (1.5, "start")
    (halved,) = roofline.by_kernel([products], GPU, torch.float32)
    assert (halved.seconds, halved.bound_by) == (4 + 1, "products")
    (cached,) = roofline.by_kernel([Counts("c", read=10, asked=1000)], GPU, torch.bfloat16)
    assert (cached.seconds, cached.bound_by) == (10 + 1, "L2")
    (unknown,) = roofline.by_kernel([Counts("c", read=10, asked=1000)], GPU._replace(cached=None), torch.bfloat16)
    assert unknown.seconds == 1 + 1
    last_line = roofline.model_table([a, b]).splitlines()[-1]
    assert [cell.strip() for cell in last_line.split("|")[1:3]] == ["total", "3"] and "11500.000" in last_line


def test_the_model_beside_what_was_measured():
    rows = roofline.by_kernel(
        [Counts("bn_relu", read=10), Counts("bn_relu_conv3x3", read=30), Counts("torch: conv0", read=10)],
        GPU,
        torch.bfloat16,
    )
    measured = {"bn_relu_conv3x3": Time(12.0, 2), "cudnn": Time(4.0, 1), "sum_partials": Time(1.0, 3)}
    lines = [[cell.strip() for cell in line.split("|")] for line in step_model.beside(rows, measured, "x").splitlines()]
    assert lines[2][1:-1] == ["bn_relu_conv3x3", "2", "2", "6000.000", "12000.000", "0.50"]
    assert lines[3][1:-1] == [step_model.TORCH, "1", "4", "2000.000", "5000.000", "0.40"]
    assert lines[4][1:-1] == ["total", "3", "6", "8000.000", "17000.000", "0.47"]
    assert step_model.mixed(rows, measured) == 4.0 + 1.0 + 4.0  # the bn_relu launch is not among CUDA C++'s


def test_kernels_that_the_profiler_saw_and_a_page_without_any(tmp_path):
    seen = kernel_times.measure(lambda: torch.ones(8).exp_(), torch.device("cpu"))
    assert seen["exp_"].launches == 1 and seen["exp_"].seconds > 0
    event = SimpleNamespace(
        key="void (anonymous namespace)::finalise_kernel<c10::BFloat16, 8>(Finalise)",
        device_type=torch.autograd.DeviceType.CUDA,
        self_device_time_total=6e6,
        count=6,
    )
    op = SimpleNamespace(**{**vars(event), "key": "densenet_fast::bn_relu_conv1x1"})
    (time,) = kernel_times.by_function(kernel_times.by_kernel([event, op, event], "cuda", 3)).items()
    assert time == ("finalise_gradient", Time(4.0, 4.0))
    page = tmp_path / "page.txt"
    page.write_text("batch 8: no kernels\n")
    with pytest.raises(ValueError, match="expected a table of kernels"):
        kernel_times.read_page(page)


def test_the_command(capsys, convolutions):
    step_model.main(["--network", "densenet_bc10", "--batch", "2", "--size", "16", "--gpu", "rtx3090"])
    out = capsys.readouterr().out
    milliseconds = [float(line.split("|")[7]) for line in out.split("\n\n")[1].splitlines()[2:]]
    assert milliseconds[-1] == pytest.approx(sum(milliseconds[:-1]), abs=0.02) and "| total " in out
    assert "Blocks move 1." in out and "not known" in out and "measured on an H200 |" not in out


def test_every_launch_is_of_a_part():
    counts = step_of("densenet_bc100", 64, 32)
    launches = {}
    for one in counts:
        launches.setdefault(one.part, []).append(one.kernel)
    assert set(launches) == {"blocks", "transitions", "head", "vectors"}
    # Apart from its layers' kernels a block appends its input, and completes what its last layer made.
    assert launches["blocks"].count("append_kernel") == launches["blocks"].count("finalise_kernel") == 3
    assert launches["blocks"].count("prepare_kernel") == launches["transitions"].count("prepare_kernel") + 2 == 6
    assert launches["head"] == ["prepare_kernel", "bn_relu_global_avgpool_kernel"] + [
        "prepare_kernel",
        "bn_relu_pool_backward_kernel",
        "combine_sums_kernel",
    ]
    stem = [one.kernel for one in step_of("densenet121", 32, 224) if one.part == "stem"]
    statistics, sums = "combine_statistics_kernel", "combine_sums_kernel"
    forward = ["append_kernel", statistics, "bn_relu_maxpool_kernel", statistics]
    assert stem == [*forward, "prepare_kernel", "bn_relu_pool_backward_kernel", sums, "finalise_kernel"]
