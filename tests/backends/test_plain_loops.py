"""The CPU kernels against plain loops (csrc/cpu/plain_loops.cpp), in every instruction set of this processor.

The fast kernels are torch's ops, so the loops come to them: compiled twice, in double and in float, and called by
ctypes. A fast result may be off from the double loops by twice what the float loops are, and by its own rounding.

Run as a program with the folder of the compiled loops, this file compares on the instruction set in use, and prints
each result's error and the largest allowed, as JSON.
"""

import ctypes
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from densenet_fast.backends import extension

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc/cpu/plain_loops.cpp"
CXX = os.environ.get("CXX", "c++")
INSTRUCTION_SETS = {"default": "", "avx2": "avx2", "avx512": "avx512f", "avx512_bf16": "avx512_bf16"}
"""And the flag by which /proc/cpuinfo shows each; multiplying float32, amx_bf16 is avx512_bf16."""

GRIDS = [(1, 17, 19), (2, 5, 7), (3, 1, 4), (3, 37), (1, 2), (2, 3, 5, 6), (1, 2, 9, 33)]
"""Images, height and width, or other spatial sizes: lines, images and volumes, with odd ones among them."""
CHANNELS = [(37, 13), (5, 48)]
"""Columns that are read and made."""
BOTH_WAYS = ("bn_relu_conv1x1", "bn_relu_conv3x3", "bn_relu_pool_conv1x1", "bn_relu_maxpool", "bn_relu_global_avgpool")
ONE_WAY = ("statistics", "bn_relu", "mask", "finalise", "dropout", "convolution", "convolution_grad_weight")
KERNELS = {*ONE_WAY, *BOTH_WAYS, *(f"{k}_backward" for k in BOTH_WAYS)}

pytestmark = [pytest.mark.library, pytest.mark.skipif(shutil.which(CXX) is None, reason="no compiler")]

kernels = torch.ops.densenet_fast


class Input(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "mean", "scale", "shift")]
    _fields_ += [(name, ctypes.c_int64) for name in ("rows", "cols")]


class Windows(ctypes.Structure):
    _fields_ = [("images", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_int64 * 3) for name in ("sizes", "window", "stride", "padding")]


class Over(NamedTuple):
    """Windows of ``window`` pixels along each spatial size of a grid (N, *spatial), ``stride`` apart."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: int = 1
    padding: int = 0

    def outputs(self) -> int:
        along = [(s + 2 * self.padding - w) // self.stride + 1 for s, w in zip(self.grid[1:], self.window)]
        return torch.Size([self.grid[0], *along]).numel()

    def struct(self) -> Windows:
        sizes = self.grid[1:]
        given = sizes, self.window, (self.stride,) * len(sizes), (self.padding,) * len(sizes)
        missing = 1, 1, 1, 0
        fields = [(ctypes.c_int64 * 3)(*[m] * (3 - len(sizes)), *g) for g, m in zip(given, missing)]
        return Windows(self.grid[0], *fields)


class Map(NamedTuple):
    """A feature map x [M, C], and the vectors [C] that normalise it."""

    x: Tensor
    mean: Tensor
    scale: Tensor
    shift: Tensor


class Case(NamedTuple):
    """A kernel's results by name, and the call of the loops that makes the same, in the same order."""

    name: str
    fast: dict[str, Tensor]
    loops: str
    arguments: tuple


class Loops:
    """The plain loops in one type."""

    def __init__(self, library: Path, dtype: torch.dtype):
        self.library, self.dtype = ctypes.CDLL(str(library)), dtype
        self.real = {torch.float64: ctypes.c_double, torch.float32: ctypes.c_float}[dtype]

    def run(self, case: Case) -> dict[str, Tensor]:
        """Their results: tensors like the fast ones, in this type if those are floats."""
        made = {name: self.tensor(torch.zeros_like(fast)) for name, fast in case.fast.items()}
        held: list[Tensor] = []

        def pointer(t: Tensor) -> ctypes.c_void_p:
            held.append(self.tensor(t))
            return ctypes.c_void_p(held[-1].data_ptr())

        def as_c(argument):
            match argument:
                case Map():
                    return ctypes.byref(Input(*map(pointer, argument), *argument.x.shape))
                case Over():
                    return ctypes.byref(argument.struct())
                case Tensor():
                    return pointer(argument)
                case float():
                    return self.real(argument)
            return ctypes.c_int64(argument)

        getattr(self.library, case.loops)(*map(as_c, (*case.arguments, *made.values())))
        return made

    def tensor(self, t: Tensor) -> Tensor:
        return t.contiguous().to(self.dtype if t.is_floating_point() else t.dtype)


def elementwise(m: Map) -> Iterator[Case]:
    """What holds no product and no window."""
    rows, cols = m.x.shape
    grad, (p, q), keep = torch.randn_like(m.x), torch.randn(2, cols), torch.rand(rows, cols) > 0.3

    statistics = {name: torch.empty(cols) for name in ("mean", "var", "rstd")}
    kernels.cpu_statistics(m.x, *statistics.values(), 1e-3)
    yield Case("statistics", statistics, "statistics", (m.x, rows, cols, 1e-3))

    yield Case("bn_relu", {"a": kernels.cpu_bn_relu(*m)}, "bn_relu", (m,))

    scaled = torch.empty_like(m.x)
    sums = kernels.cpu_mask(grad, *m, scaled)
    yield Case("mask", {"grad x": scaled, "sums": sums}, "mask", (m, grad))

    completed = torch.empty_like(m.x)
    kernels.cpu_finalise(grad, m.x, m.mean, p, q, 7.0, completed)
    yield Case("finalise", {"grad x": completed}, "finalise", (m, grad, p, q, 7.0))

    dropped = m.x.clone()
    kernels.cpu_dropout(dropped, keep, 1.25)
    yield Case("dropout", {"out": dropped}, "dropout", (m.x, keep, rows * cols, 1.25))


def convolutions(m: Map, grid: tuple[int, ...], made: int) -> Iterator[Case]:
    (rows, cols), dims = m.x.shape, len(grid) - 1
    grad, bias = torch.randn(rows, made), torch.randn(made)

    over, weight = Over(grid, (1,) * dims), torch.randn(made, cols) / cols**0.5
    out, scaled = torch.empty(rows, made), torch.zeros_like(m.x)
    kernels.cpu_bn_relu_conv1x1(*m, weight, bias, out, None, None, None, 0.0, None, None, None)
    yield Case("bn_relu_conv1x1", {"out": out}, "bn_relu_conv", (m, over, weight, bias, made))
    options = True, True, None, None, None, None, 1.0, None
    grad_weight, sums = kernels.cpu_bn_relu_conv1x1_backward(grad, *m, weight, scaled, *options)
    fast = {"grad x": scaled, "sums": sums, "grad weight": grad_weight}
    yield Case("bn_relu_conv1x1_backward", fast, "bn_relu_conv_backward", (m, over, weight, grad, made))

    over, weight = Over(grid, (3,) * dims, padding=1), torch.randn(made, cols, *(3,) * dims) / (3 * cols**0.5)
    out, scaled, grad_weight = torch.empty(rows, made), torch.empty_like(m.x), torch.empty_like(weight)
    kernels.cpu_bn_relu_conv3x3(*m, weight, bias, grid, out)
    yield Case("bn_relu_conv3x3", {"out": out}, "bn_relu_conv", (m, over, weight, bias, made))
    sums = kernels.cpu_bn_relu_conv3x3_backward(grad, *m, weight, grid, scaled, grad_weight, None)
    fast = {"grad x": scaled, "sums": sums, "grad weight": grad_weight}
    yield Case("bn_relu_conv3x3_backward", fast, "bn_relu_conv_backward", (m, over, weight, grad, made))

    if dims == 2:  # of values that BN-ReLU would leave as they are
        images = m._replace(x=m.x.abs(), mean=torch.zeros(cols), scale=torch.ones(cols), shift=torch.zeros(cols))
        over, weight = Over(grid, (7, 7), stride=2, padding=3), torch.randn(made, cols, 7, 7) / (7 * cols**0.5)
        taps, image = weight.permute(0, 2, 3, 1).contiguous(), images.x.view(*grid, cols).permute(0, 3, 1, 2)
        out = kernels.cpu_convolution(image, taps, over.stride, over.padding)
        yield Case("convolution", {"out": out}, "bn_relu_conv", (images, over, weight, torch.zeros(made), made))
        grad = torch.randn_like(out)
        grad_weight = kernels.cpu_convolution_grad_weight(grad, image, taps, over.stride, over.padding)
        fast = {"grad weight": grad_weight.permute(0, 3, 1, 2)}
        yield Case("convolution_grad_weight", fast, "bn_relu_conv_grad_weight", (images, over, grad, made))


def poolings(m: Map, grid: tuple[int, ...], made: int) -> Iterator[Case]:
    cols, dims, images = m.x.shape[1], len(grid) - 1, grid[0]

    over, weight, bias = Over(grid, (2,) * dims, stride=2), torch.randn(made, cols) / cols**0.5, torch.randn(made)
    if over.outputs() > 0:
        grad = torch.randn(over.outputs(), made)
        out = kernels.cpu_bn_relu_pool_conv1x1(*m, weight, bias, grid, None, None, None, 0.0)
        yield Case("bn_relu_pool_conv1x1", {"out": out}, "bn_relu_pool_conv1x1", (m, over, weight, bias, made))
        scaled, grad_weight, sums = kernels.cpu_bn_relu_pool_conv1x1_backward(grad, *m, weight, grid, True, True)
        fast = {"grad x": scaled, "sums": sums, "grad weight": grad_weight}
        name = "bn_relu_pool_conv1x1_backward"
        yield Case(name, fast, name, (m, over, weight, grad, made))

    over = Over(grid, (3,) * dims, stride=2, padding=1)
    out, argmax = kernels.cpu_bn_relu_maxpool(*m, grid, None, None, None, 0.0)
    yield Case("bn_relu_maxpool", {"out": out, "argmax": argmax}, "bn_relu_maxpool", (m, over))
    grad = torch.randn_like(out)
    scaled, sums = kernels.cpu_bn_relu_maxpool_backward(grad, argmax, *m, grid)
    name = "bn_relu_maxpool_backward"
    yield Case(name, {"grad x": scaled, "sums": sums}, name, (m, over, grad, argmax))

    over, grad = Over(grid, grid[1:]), torch.randn(images, cols)
    out = kernels.cpu_bn_relu_global_avgpool(*m, images)
    yield Case("bn_relu_global_avgpool", {"out": out}, "bn_relu_mean", (m, over))
    scaled, sums = kernels.cpu_bn_relu_global_avgpool_backward(grad, *m)
    fast = {"grad x": scaled, "sums": sums}
    yield Case("bn_relu_global_avgpool_backward", fast, "bn_relu_mean_backward", (m, over, grad))


def cases(grid: tuple[int, ...], cols: int, made: int) -> Iterator[Case]:
    """All cases on a random map [M, cols] of a grid, for convolutions to ``made`` columns."""
    x = torch.randn(torch.Size(grid).numel(), cols)
    m = Map(x, torch.randn(cols) * 0.3, torch.rand(cols) + 0.5, torch.randn(cols) * 0.5)
    return itertools.chain(elementwise(m), convolutions(m, grid, made), poolings(m, grid, made))


def compare(folder: Path) -> dict[str, tuple[float, float]]:
    """Of each result of each kernel its distance from the loops in double, and the largest that is allowed: twice that
    of the loops in float, and half a unit in the last place of each value, which is how it is stored."""
    assert extension.unavailable() is None, extension.unavailable()  # and loads the library
    exact, single = Loops(folder / "double.so", torch.float64), Loops(folder / "float.so", torch.float32)
    found = {}
    torch.manual_seed(0)
    with torch.device("cpu"):
        for grid, (cols, made) in itertools.product(GRIDS, CHANNELS):
            for case in cases(grid, cols, made):
                truth, plain = exact.run(case), single.run(case)
                for name, value in truth.items():
                    off, plain_off = ((got[name].double() - value.double()).norm() for got in (case.fast, plain))
                    allowed = 2 * plain_off + torch.finfo(torch.float32).eps / 2 * value.double().norm()
                    found[f"{case.name} {grid} {cols} -> {made}: {name}"] = off.item(), allowed.item()
    return found


def compiled(folder: Path, text: str) -> Path:
    """``folder`` with the loops in double and in float, of their text."""
    source = folder / "plain_loops.cpp"
    source.write_text(text)
    for name in ("double", "float"):
        command = [CXX, "-std=c++20", "-O1", "-shared", "-fPIC", f"-DREAL={name}", source, "-o", folder / f"{name}.so"]
        subprocess.run(command, check=True)
    return folder


def wrong(found: dict[str, tuple[float, float]]) -> list[str]:
    """The results that are too far off."""
    return [f"{name}: {off} > {allowed}" for name, (off, allowed) in found.items() if not off <= allowed]


def test_kernels_of_every_instruction_set_equal_plain_loops(tmp_path):
    folder = compiled(tmp_path, SOURCE.read_text())
    cpuinfo = Path("/proc/cpuinfo")
    flags = [*(cpuinfo.read_text().split() if cpuinfo.exists() else ()), ""]
    for name in [name for name, flag in INSTRUCTION_SETS.items() if flag in flags]:
        environment = {**os.environ, "DENSENET_FAST_CPU": name, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        run = subprocess.run([sys.executable, __file__, folder], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        found = json.loads(run.stdout)
        assert {key.split(" ")[0] for key in found} >= KERNELS and not wrong(found), (name, wrong(found))


def test_every_loop_has_a_kernel_held_to_it():
    assert extension.unavailable() is None, extension.unavailable()
    loops = re.findall(r"^void (\w+)\(", SOURCE.read_text(), re.MULTILINE)
    assert loops and {case.loops for case in cases((2, 5, 7), *CHANNELS[0])} == {*loops}


FAULTS = {
    "a tap has the wrong sign": (
        "in.a(pixel, c) * weight[",
        "(tap == 5 ? -1 : 1) * in.a(pixel, c) * weight[",
        {"bn_relu_conv3x3"},
    ),
    "the last row is dropped": (
        "for (int64_t m = 0; m < in.rows; ++m)",
        "for (int64_t m = 0; m < in.rows - 1; ++m)",
        {"bn_relu", "mask", "finalise"},
    ),
    "the variance is unbiased": ("squares / rows", "squares / (rows - 1)", {"statistics"}),
}
"""A text of the loops, what takes its place, and kernels whose results then differ."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(tmp_path, monkeypatch, fault):
    """Where the loops compute something else, the comparison fails."""
    old, new, kernels = FAULTS[fault]
    source = SOURCE.read_text()
    assert old in source
    monkeypatch.setattr(sys.modules[__name__], "GRIDS", [(2, 5, 7)])
    found = wrong(compare(compiled(tmp_path, source.replace(old, new))))
    assert {name.split(" ")[0] for name in found} >= kernels


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]))))
