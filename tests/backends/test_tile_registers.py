"""The product in AMX's tile registers: emulated (tile_emulator.h), and as compiled for processors that have them."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from densenet_fast.backends import extension

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "c++")
EMULATED = ["-DDENSENET_FAST_EMULATED_TILES", f"-I{Path(__file__).parent}", f"-I{ROOT / 'csrc/cpu'}"]


def compiled(source: Path, to: Path, *arguments: str | Path) -> Path:
    subprocess.run([CXX, "-std=c++20", "-O1", *EMULATED, *arguments, source, "-o", to], check=True)
    return to


@pytest.fixture(scope="module", autouse=True)
def assembler(tmp_path_factory):
    """Without one that knows AMX the library is built without its product."""
    source = tmp_path_factory.mktemp("assembler") / "tiles.cpp"
    source.write_text('void f() { asm("tdpbf16ps %tmm0, %tmm1, %tmm2"); }')
    command = [CXX, "-c", source, "-o", source.with_suffix(".o")]
    if shutil.which(CXX) is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no compiler that knows AMX")


@pytest.fixture
def avx512_bf16():
    """What the kernels around the tile registers need."""
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this processor has no avx512_bf16")


FAULTS = """
#include "tile_registers.h"
using namespace densenet_fast;
int main(int, char** arguments) {
  const int fault = arguments[1][0] - '0';
  TileShapes shapes;
  for (int i = 0; i < 3; ++i) {
    shapes.rows[i] = fault == 1 ? 17 : 2;
    shapes.row_bytes[i] = 8;
  }
  if (fault == 2) shapes.rows[2] = 1;
  if (fault != 3) tile_configure(shapes);
  if (fault == 4) tile_release();
  const uint16_t a[2][4] = {{0x3f80, 0x3f80, 0x3f80, 0x3f80}, {0x3f80, 0x0001, 0x0080, 0}};
  const uint16_t b[2][4] = {{0x4b80, 0x3f80, 0x3f00, 0x7f00}, {0x3f80, 0x3f80, 0, 0}};
  float sums[2][2];
  tile_zero<0>();
  tile_load<1>(a, 8);
  tile_load<2>(b, 8);
  tile_multiply<0, 1, 2>();
  tile_store<0>(sums, 8);
  std::printf("%.0f %g %.0f %g", sums[0][0], sums[0][1], sums[1][0], sums[1][1]);
}
"""


def test_the_emulation_computes_and_faults_as_the_instructions_do(tmp_path):
    """Even and odd steps have sums of their own (2^24 + 1 is 2^24), and numbers below the smallest normal are zero."""
    (tmp_path / "faults.cpp").write_text(FAULTS)
    program = compiled(tmp_path / "faults.cpp", tmp_path / "faults")
    result = subprocess.run([program, "0"], capture_output=True, text=True)
    assert result.stdout == f"{2**24 + 2} {0.5 + 2**127:g} {2**24} 0.5"
    errors = {1: "too large a shape", 2: "shapes do not match", 3: "not configured", 4: "not configured"}
    for fault, message in errors.items():
        result = subprocess.run([program, str(fault)], capture_output=True, text=True)
        assert result.returncode == -signal.SIGABRT and message in result.stderr


def test_product_of_every_size(tmp_path, avx512_bf16):
    source = Path(__file__).with_name("tile_product.cpp")
    program = compiled(source, tmp_path / "product", "-march=native", ROOT / "csrc/cpu/amx_bf16.cpp")
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == "2704 products\n", result.stdout + result.stderr


@pytest.mark.library
def test_kernels(avx512_bf16):
    build = ROOT / "build/emulated_tiles"
    environment = {
        **os.environ,
        "CXXFLAGS": f"-O1 -w {' '.join(EMULATED)}",
        "DENSENET_FAST_CUDA": "0",
        "DENSENET_FAST_LIBRARY": str(build / "lib/densenet_fast/_kernels.so"),
        "DENSENET_FAST_CPU": "amx_bf16",
        "PYTEST_ADDOPTS": "",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)

    folders = ["--build-temp", str(build), "--build-lib", str(build / "lib")]
    built = run("setup.py", "--quiet", "build_ext", *folders)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    name = run("-c", "from densenet_fast.backends import cpu; cpu.unavailable(); print(cpu.describe())")
    assert name.stdout == "C++, amx_bf16\n"
    files = [f"tests/backends/test_{name}.py" for name in ("kernels", "accuracy", "threads")]
    wanted = "cpu- and bfloat16 and (conv or error) or threads_at_once and bfloat16"
    tests = run("-m", "pytest", "-p", "no:cacheprovider", *files, "-k", wanted)
    assert tests.returncode == 0 and " passed" in tests.stdout, tests.stdout[-3000:] + tests.stderr[-3000:]


@pytest.mark.library
def test_tile_instructions_are_where_they_should_be():
    """The library has them, in the product's functions alone."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump was not found")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", extension.LIBRARY]
    functions: dict[str, set[str]] = {}
    current: set[str] = set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        for line in listing.stdout:
            if match := re.match(r"[0-9a-f]+ <(.+)>:", line):
                current = functions.setdefault(match[1], set())
            elif match := re.search(r"\t((ld|st)tilecfg|tile\w+|tdp\w+)", line):
                current.add(match[1])
    own = "densenet_fast::(anonymous namespace)::"
    found = {name.removeprefix(own).split("(")[0]: used for name, used in functions.items() if used}
    product = {"ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored"}
    assert found == {"product": product, "release": {"tilerelease"}}
