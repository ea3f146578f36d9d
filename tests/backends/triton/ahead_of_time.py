"""Compiles planned launches for a GPU that is not there, and reads what the compiler made of them."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.nvidia.compiler import get_ptxas

from backends.triton.absent_gpu import absent_gpu
from backends.triton.in_flight import in_flight
from densenet_fast.backends.triton import launch
from densenet_fast.backends.triton.hazards import disassembled, register_hazards
from densenet_fast.backends.triton.races import races_of

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""What a block may use: of 8.0 to 8.9 the least, and 9.0's."""
RESERVED_BYTES = 1024
"""What each block takes beside, of a multiprocessor's, which has as much more than a block may use."""
REGISTERS = 64 * 1024
"""Of a multiprocessor; a warp takes them by 256."""


class Compiled(NamedTuple):
    registers: int
    stack: int
    spilled: int
    shared: int
    products: set[str]
    wide_copies: int
    narrow_copies: int
    by_the_element: int
    warnings: str
    keeps_nan: bool
    hazards: list[str]
    races: list[str]
    in_flight: set[str]


def compile_launch(item, generation, disassemble=True):
    """``item`` as Triton compiles it on a device of ``generation``. Disassembly takes half the time. Without it the
    counts of instructions are zero and there are no hazards."""
    with absent_gpu(generation):
        compiled = launch.compiled(item)
    return inspect(item, compiled, generation, disassemble)


def inspect(item, compiled, generation, disassemble):
    cubin, ptx = compiled.asm["cubin"], compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [TOOLS / "cuobjdump", "-res-usage", path]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        source = Path(directory) / "kernel.ptx"
        source.write_text(ptx)
        verbose = assemble(source, generation) if disassemble and "wgmma" in ptx else ""
    code = disassembled(cubin) if disassemble else ""
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    copies = re.findall(r"\bLDGSTS\S*", code)
    wide = sum(".128" in copy for copy in copies)
    return Compiled(
        registers=int(found["REG"]),
        stack=int(found["STACK"]),
        spilled=len(re.findall(r"\bSTL\b", code)),
        shared=compiled.metadata.shared,
        products=set(re.findall(r"\b(?:HGMMA|HMMA)\b", code)),
        wide_copies=wide,
        narrow_copies=len(copies) - wide,
        by_the_element=len(re.findall(r"\b(?:ld|st)\.global(?!\S*\.v\d)\S*\.b(?:8|16)\b", ptx)),
        warnings="\n".join(line for line in verbose.splitlines() if re.search(r"\bC75\d\d\b|warning", line)),
        keeps_nan="max.NaN" in ptx,
        hazards=register_hazards(code),
        races=races_of(item, ptx) if disassemble else [],
        in_flight=in_flight(item, ptx),
    )


def resident(item, got, generation):
    """How many blocks of a launch a multiprocessor runs at once, by registers and shared memory."""
    registers = item.tile.warps * -(-32 * got.registers // 256) * 256
    memory = SHARED_BYTES[generation] + RESERVED_BYTES
    return min(REGISTERS // registers, memory // (got.shared + RESERVED_BYTES))


def assemble(source, generation):
    """What the assembler says, such as that it serialises matrix products (C7508 and its like)."""
    arguments = ["-v", f"--gpu-name=sm_{generation}a", source, "-o", source.with_suffix(".cubin")]
    ptxas = get_ptxas(generation).path
    return subprocess.run([ptxas, *arguments], capture_output=True, text=True, check=True).stderr
