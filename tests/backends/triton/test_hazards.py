"""Registers of unfinished products: machine code written by hand, kernels as they should not be, and every version of
Triton that the package may meet."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from backends.triton.absent_gpu import absent_gpu
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.config import Tile
from densenet_fast.backends.triton.hazards import disassembled, register_hazards
from densenet_fast.backends.triton.tune import Shape, Step, row_of

ROOT = Path(__file__).parents[3]
"""What torch 2.11 brings, and the newest, beside the one that is installed."""

PRODUCT = "HGMMA.64x32x16.F32.BF16 R24, R88, gdesc[UR4], R24, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def code(*lines):
    """Machine code as it is disassembled; a line that ends in a colon is a label."""
    numbered = (line if line.endswith(":") else f"        /*{16 * i:04x}*/   {line} ;" for i, line in enumerate(lines))
    return "\n".join(numbered)


def loop(*body):
    return code(
        "MOV R1, c[0x0][0x28]", ".L_x_0:", *body, "@P0 BRA `(.L_x_0)", WAIT, "STG.E desc[UR6][R2.64], R24", "EXIT"
    )


FOUND = {
    "written at once": (code(PRODUCT, "FADD R90, R1, R2", WAIT, "EXIT"), 1),
    "written behind the wait": (code(PRODUCT, WAIT, "FADD R90, R1, R2", "EXIT"), 0),
    "beside the operand": (code(PRODUCT, "FADD R92, R1, R2", WAIT, "EXIT"), 0),
    "by a wide load": (code(PRODUCT, "LDS.128 R85, [R3]", WAIT, "EXIT"), 1),
    "by a matrix load": (code(PRODUCT, "LDSM.16.M88.4 R84, [R3]", "LDSM.16.M88.2 R86, [R3]", WAIT, "EXIT"), 0),
    "by a product's address": (code(PRODUCT, "IMAD.WIDE R90, R1, R2, RZ", WAIT, "EXIT"), 1),
    "under a predicate": (code(PRODUCT, "@!P1 MOV R91, R2", WAIT, "EXIT"), 1),
    "the result behind predicates": (code(PRODUCT, "SHFL.BFLY PT, R88, R1, 0x1, 0x1f", WAIT, "EXIT"), 1),
    "compared": (code(PRODUCT, "ISETP.NE.AND P0, PT, R88, R89, PT", WAIT, "EXIT"), 0),
    "the sum used": (code(PRODUCT, "F2FP.BF16.F32.PACK_AB R1, R25, R24", WAIT, "EXIT"), 1),
    "the sum stored": (code(PRODUCT, "STS [R3], R39", WAIT, "EXIT"), 1),
    "the sum multiplied on": (code(PRODUCT, PRODUCT, WAIT, "EXIT"), 0),
    "in the next iteration": (loop("F2FP.BF16.F32.PACK_AB R88, R2, R1", PRODUCT), 1),
    "in the next iteration, waited for": (loop("F2FP.BF16.F32.PACK_AB R88, R2, R1", PRODUCT, WAIT), 0),
    "one group may be left": (
        loop("MOV R88, R1", PRODUCT, "MOV R92, R1", PRODUCT.replace("R88", "R92"), WAIT.replace("0x0", "0x1")),
        1,
    ),
    "on one path alone": (code(PRODUCT, "@P0 BRA `(.L_x_7)", WAIT, ".L_x_7:", "MOV R88, R1", WAIT, "EXIT"), 1),
    "behind the end": (code(PRODUCT, WAIT, "EXIT", "MOV R88, R1"), 0),
}


@pytest.mark.parametrize("name", FOUND)
def test_planted(name):
    text, count = FOUND[name]
    assert len(register_hazards(text)) == count, register_hazards(text)


def test_a_jump_that_cannot_be_followed():
    with pytest.raises(ValueError, match="labels alone, got BRX"):
        register_hazards(code(PRODUCT, "BRX R2 -0x10", "EXIT"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name, shown", [("bn_relu_conv1x1", True), ("bn_relu_pool_conv1x1", False)])
def test_a_product_that_is_not_waited_for(name, shown, dtype):
    """A kernel of two warp groups has hazards without ``settled``. That of two products in a row has none, with or
    without."""

    def hazards(item):
        with absent_gpu(90):
            return register_hazards(disassembled(launch.compiled(item).asm["cubin"]))

    of_two_groups = row_of("bn_relu_conv1x1", (90, "half"), Tile(128, 128, 32, 8, 3))
    with config.assume(config.Device(90, 132)), of_two_groups:
        launches = Step(Shape(32, 28, 256, 128, 32, 128), dtype, torch.device("meta")).launches()
    item = next(item for item in launches if item.name == name)
    unsettled = triton.jit(item.kernel.fn, do_not_specialize=item.kernel.do_not_specialize)
    assert "settled(tl.dot(" in unsettled.src
    unsettled._unsafe_update_src(unsettled.src.replace("settled(tl.dot(", "(tl.dot("))
    found = len(hazards(item._replace(kernel=unsettled)))
    assert hazards(item) == [] and (found >= 10 if shown else found == 0)


def test_the_oldest_triton():
    assert_well_compiled_by("3.6.0")


def assert_well_compiled_by(version):
    """The configurations for sm_90, where products are asynchronous, pass ``test_compile.py`` with another version."""
    folder = ROOT / "build/triton" / version
    if not folder.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", f"triton=={version}"]
        partial = folder.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*install, "--target", partial], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"Triton {version} cannot be installed: {done.stderr[-300:]}")
        partial.rename(folder)
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}

    def output(*command):
        run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        return run.stdout

    assert output("-c", "import triton; print(triton.__version__)").strip() == version
    tests = [
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/backends/triton/test_compile.py",
        "-k",
        "configurations and 90 and not float32 and not BC",
    ]
    assert " passed" in output(*tests)
