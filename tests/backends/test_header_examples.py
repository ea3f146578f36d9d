"""The example at the top of each header in csrc/cpu compiles."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from backends.test_plain_loops import CXX, pytestmark

__all__ = ["pytestmark"]

FOLDER = Path(__file__).parents[2] / "csrc/cpu"
HEADERS = sorted(FOLDER.glob("*.h"))
POINTERS = (
    "const float* x, const float* mean, const float* scale, const float* shift, const Affine& affine, "
    "const uint32_t* a, const uint32_t* b, const float* const* around, float* const* inside, float* out, "
    "float* values, float* m, int64_t tiles, int64_t ld"
)
TENSORS = (
    "Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor var, Tensor rstd, Tensor weight, Tensor out, "
    "std::vector<Tensor> tensors, const float* a, const float* b, float* c"
)
"""What the examples take for granted: without torch, and with it."""


def example(header: Path) -> str:
    """The code in a header's first comment."""
    match = re.search(r"^// Example:\n//\n((?://   .*\n)+)#pragma once", header.read_text(), re.M)
    assert match, f"{header.name} shows no example"
    return match[1].replace("//   ", "  ")


@pytest.mark.parametrize("given", [POINTERS, TENSORS], ids=["without torch", "with torch"])
def test_examples_compile(tmp_path, given):
    ours = [header for header in HEADERS if ("torch/csrc" in closure(header)) == (given is TENSORS)]
    assert len(ours) > 5
    lines = [f'#include "{header.name}"' for header in ours]
    for header in ours:
        opening = f"namespace densenet_fast::of_{header.stem} {{ void example({given}) {{{{"
        lines += [opening, example(header), "}}}"]
    source = tmp_path / "examples.cpp"
    source.write_text("\n".join(lines))
    include = ["-I", str(FOLDER), "-isystem", str(Path(torch.__file__).parent / "include")]
    version = "-DTORCH_TARGET_VERSION=0x020b000000000000"
    subprocess.run([CXX, "-std=c++20", "-w", "-fsyntax-only", version, *include, source], check=True)


def closure(header: Path) -> str:
    """The header's text, and that of those of this folder that it includes."""
    text = header.read_text()
    included = [FOLDER / name for name in re.findall(r'#include "(\w+\.h)"', text)]
    return text + "".join(closure(path) for path in included if path.exists())
