"""The launch layer and the table: no kernel is run."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.kernels.bn_relu import bn_relu

NAMED = {name: i for i, name in enumerate(bn_relu.arg_names)}


def test_arguments_stand_in_the_kernels_order():
    """The order in which a launch names them makes no difference."""
    with launch.planning() as launches:
        launch.launcher(bn_relu)((1,), config.BN_RELU, **dict(reversed(NAMED.items())))
    ((_, grid, arguments, constants, tile),) = launches
    assert (grid, tile) == ((1,), config.BN_RELU)
    assert dict(zip(bn_relu.arg_names, arguments)) | constants == NAMED
    assert list(constants) != [] and all(name == name.upper() for name in constants)


@pytest.mark.parametrize(
    "lost, added, message",
    [
        (["rstd"], [], "got missing rstd$"),
        (["rstd"], ["std"], "got missing rstd and unknown std$"),
        (["ROWS", "COLUMNS"], ["ROW"], "got missing COLUMNS, ROWS and unknown ROW$"),
        ([], ["eps"], "got unknown eps$"),
    ],
)
def test_a_wrong_name_is_an_error_of_the_first_launch(lost, added, message):
    """The error names the kernel and the argument."""
    named = {name: i for name, i in NAMED.items() if name not in lost} | dict.fromkeys(added, 0)
    with launch.planning(), pytest.raises(TypeError, match=f"^bn_relu: expected each argument by its name, {message}"):
        launch.launcher(bn_relu)((1,), config.BN_RELU, **named)


def test_a_name_given_twice_is_an_error():
    """Python's own error names the kernel and the argument."""
    with launch.planning(), pytest.raises(TypeError, match=r"bn_relu\(\) got multiple values .* 'rstd'"):
        launch.launcher(bn_relu)((1,), config.BN_RELU, **NAMED, **{"rstd": 0})


@pytest.mark.parametrize("stride", [0, 1, 7, 8, 12, 16, 48, 56, 1 << 40])
def test_units(stride):
    count, unit = launch.units(stride)
    assert count * unit == stride and unit == max(u for u in (1, 2, 4, 8, 16) if stride % u == 0)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 6272, 100352])
@pytest.mark.parametrize("programs", [1, 4, 16, 999])
def test_ranges_cover_the_rows_and_none_is_empty(rows, programs):
    count, each = config.ranges(config.Device(90, 132), rows, 64, programs)
    assert each % 64 == 0 and (count - 1) * each < rows <= count * each
    assert count * programs <= max(programs, 2 * 132 + programs)


@pytest.mark.parametrize("size, side", [(1, 16), (16, 16), (17, 32), (48, 64), (128, 128), (192, 128)])
def test_fit(size, side):
    assert config.fit(size, 128) == side


def test_precision_follows_torch():
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "ieee"), ("none", "ieee")):
            torch.backends.cudnn.conv.fp32_precision = setting
            assert config.precision(torch.float32) == expected
            assert config.convolution_by_torch((1, 2, 2), torch.float32) == (expected == "ieee")
        assert config.precision(torch.bfloat16) == config.precision(torch.float16) == "half"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_the_table_serves_every_width_on_every_device():
    for kernel, rows in config.TABLE.items():
        assert {generation for generation, _ in rows} == {0, 80, 90}
        for (generation, precision), classes in rows.items():
            limits = [limit for limit, _ in classes]
            assert limits == sorted(limits) and limits[-1] == config.ANY, (kernel, generation, precision)
            for _, tile in classes:
                assert all(side & (side - 1) == 0 and side >= 16 for side in tile[:3])


@pytest.mark.parametrize(
    "capability, generation, borrowed",
    [((8, 0), 80, None), ((8, 6), 80, "8.6"), ((9, 0), 90, None), ((10, 0), 90, "10.0"), ((12, 0), 80, "12.0")],
)
def test_a_gpu_without_rows_of_its_own_says_whose_it_borrows(monkeypatch, capability, generation, borrowed):
    properties = SimpleNamespace(major=capability[0], multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert config._cuda_device.__wrapped__(0) == config.Device(generation, 7)
    said = config.borrowed(0)
    assert said is None if borrowed is None else borrowed in said and f"of {generation / 10}" in said
