"""The floor: the traffic model against what is counted by hand, kernels that run, times that add up; the profile."""

import math

import pytest
import torch

from densenet_fast.__main__ import main
from densenet_fast.benchmarking import floor
from densenet_fast.benchmarking.ceilings import Ceilings, measure_ceilings
from densenet_fast.benchmarking.networks import architecture
from densenet_fast.benchmarking.profile import part_of
from densenet_fast.benchmarking.traffic import training_step
from densenet_fast.reference import ARCHITECTURES
from paper_counts import count

BLOCK = {"growth_rate": 4, "block_config": (2,), "num_init_features": 8, "small_inputs": True, "num_classes": 10}
TINY = ["bench", "--model", "densenet_bc10", "--batch", "2", "--size", "16", "--repeats", "1", "--threads", "1"]


def test_a_block_of_two_layers_counted_by_hand():
    # 3 images of 5x5: 75 rows; C0 = 8, k = 4, B = 16: the layers read 8 and 12 columns; 4 bytes an element.
    calls = [c for c in training_step(BLOCK, 3, 5, 4) if c.part == "block 1"]
    expected = {
        ("append_features", 8): (75 * (8 + 8), 0),
        ("bn_relu_conv1x1", 8): (75 * (8 + 16) + 128, 75 * 128),
        ("bn_relu_conv3x3", 16): (75 * (16 + 4) + 576, 75 * 576),
        ("bn_relu_conv1x1", 12): (75 * (12 + 16) + 192, 75 * 192),
        ("finalise_gradient", 4): (75 * 3 * 4, 0),
        ("bn_relu_conv3x3_backward", 16): (75 * (4 + 16 + 16) + 2 * 576, 2 * 75 * 576),
        ("bn_relu_conv1x1_backward", 12): (75 * (16 + 16 + 12 + 12 + 12) + 2 * 192, 2 * 75 * 192),
        ("bn_relu_conv1x1_backward", 8): (75 * (16 + 16 + 8 + 8 + 8) + 2 * 128, 2 * 75 * 128),
        ("finalise_gradient", 8): (75 * 3 * 8, 0),
    }
    assert {(c.kernel, c.inputs): (c.bytes // 4, c.products) for c in calls} == expected
    times = [(c.kernel, c.inputs) for c in calls]
    twice = {("bn_relu_conv3x3", 16), ("bn_relu_conv3x3_backward", 16)}
    assert all(times.count(key) == (2 if key in twice else 1) for key in expected)
    again = [c.kernel for c in training_step(BLOCK, 3, 5, 4, memory_efficient=True)]
    assert again.count("bn_relu_conv1x1") == 4 and len(again) == len(training_step(BLOCK, 3, 5, 4)) + 2


def test_the_dense_blocks_of_densenet121_move_67_million_elements_an_image():
    calls = training_step(ARCHITECTURES["densenet121"]._asdict(), 1000, 224, 2)
    moved = sum(c.bytes for c in calls if c.part.startswith("block")) / 2 / 1000
    assert moved == pytest.approx(67e6, rel=0.05)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "densenet_bc100"])
def test_products_are_those_of_the_layers(name):
    arguments = architecture(name)
    size = 32 if "bc" in name else 224
    forward = 0
    for call in training_step(arguments, 1, size, 4):
        if not call.kernel.endswith("backward"):
            forward += call.products * (4 if "pool_conv" in call.kernel else 1)  # ours pools first
    assert forward == count(arguments, size)[1]


@pytest.mark.parametrize("name, size", [("densenet_bc10", 16), ("densenet121", 64)])
def test_every_call_runs(name, size):
    arguments = architecture(name)
    arguments["block_config"] = (1,) * len(arguments["block_config"])
    calls = training_step(arguments, 2, size, 4)
    seconds = floor.measure_calls(calls, torch.device("cpu"), torch.float32, 1)
    assert len(seconds) == len(calls) and min(seconds) > 0


def test_lines_add_the_calls_up_and_name_the_largest_gap():
    calls = training_step(BLOCK, 3, 5, 4)
    ceilings = Ceilings(bandwidth=1e6, products=1e6)
    lines = floor.summarise(calls, [0.5] * len(calls), ceilings, 16 / 36)
    by_name = {line.kernel: line for line in lines}
    three = by_name["bn_relu_conv3x3"]
    assert (three.calls, three.measured) == (2, 1.0)
    assert three.floor == pytest.approx(2 * 75 * 576 * 16 / 36 / 1e6) and three.bound == "products"
    finalise = by_name["finalise_gradient"]
    assert finalise.floor == pytest.approx(4 * 75 * 3 * (4 + 8 + 16) / 1e6) and finalise.bound == "memory"
    worst = max(lines, key=lambda line: line.measured - line.floor)
    assert floor.largest_gap(lines).startswith(f"The largest gap: {worst.kernel}, {1e3 * worst.gap:.1f} ms above")
    assert math.isclose(sum(line.measured for line in lines), 0.5 * len(calls))


def test_ceilings_are_measured():
    ceilings = measure_ceilings(torch.device("cpu"), torch.float32, 1)
    assert 1e8 < ceilings.bandwidth < 1e13 and 1e8 < ceilings.products < 1e14
    assert ceilings.floor(ceilings.bandwidth, 0) == 1 and ceilings.floor(1, 2 * ceilings.products) == 2


def test_the_report_of_the_floor(tmp_path, capsys):
    assert main([*TINY, "--floor", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "The largest gap: " in out and "whole step" in out and "GB/s copied" in out
    assert sorted(path.suffix for path in tmp_path.rglob("*.*")) == [".csv", ".md", ".png"]


@pytest.mark.library
def test_the_profile_tells_the_parts_apart(tmp_path, capsys):
    assert main([*TINY, "--profile", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for part in ("stem", "blocks: bn_relu_conv1x1", "blocks: bn_relu_conv3x3_backward", "transitions", "optimizer"):
        assert f"| {part} " in out
    assert [path.name.split("_")[-1] for path in tmp_path.rglob("*.gz")] == ["trace.json.gz"]


@pytest.mark.parametrize(
    "names, kernel, part",
    [
        (["aten::copy_", "densenet_fast::dense_block", "DenseBlock"], "", "blocks: torch operations"),
        (["densenet_fast::dense_block_backward"], "bn_relu_conv1x1_kernel", "blocks: bn_relu_conv1x1"),
        (["densenet_fast::cpu_finalise", "densenet_fast::dense_block_backward"], "", "blocks: finalise"),
        (["densenet_fast::cpu_bn_relu_pool_conv1x1", "densenet_fast::bn_relu_conv1x1"], "", "transitions"),
        (["aten::mkldnn_convolution", "aten::convolution", "aten::conv2d"], "", "stem"),
        (["aten::addmm", "aten::linear"], "", "head"),
        (["aten::mul_", "Optimizer.step#SGD.step"], "", "optimizer"),
        (["aten::add_"], "", "rest"),
    ],
)
def test_parts(names, kernel, part):
    assert part_of(names, kernel) == part
