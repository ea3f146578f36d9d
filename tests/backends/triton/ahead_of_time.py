"""Compiles planned launches for a GPU that is not there, and reads what the compiler made of them."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.bool: "*i1"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""What a block may use: of 8.0 to 8.9 the least, and 9.0's."""


class Compiled(NamedTuple):
    registers: int
    stack: int
    spilled: int
    shared: int
    tensor_core: bool
    wide_copies: int
    narrow_copies: int
    warnings: str
    keeps_nan: bool


def compile_launch(launch, generation, disassemble=True):
    """``launch`` as Triton would compile it on a device of ``generation``, from the arguments it was planned with;
    without disassembly, which takes half the time, the counts of instructions are zero."""
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments)):
        if isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            divisible = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        elif value == 1:
            signature[name], constants[name], divisible = "constexpr", 1, False
        else:
            signature[name], divisible = "i32", value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.tile.warps, "num_stages": launch.tile.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    return inspect(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared, generation, disassemble)


def inspect(cubin, ptx, shared, generation, disassemble):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = run("cuobjdump", "-res-usage", path)
        code = run("nvdisasm", "-c", path) if disassemble else ""
        source = Path(directory) / "kernel.ptx"
        source.write_text(ptx)
        verbose = assemble(source, generation) if disassemble and "wgmma" in ptx else ""
    found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    copies = re.findall(r"\bLDGSTS\S*", code)
    wide = sum(".128" in copy for copy in copies)
    return Compiled(
        registers=int(found["REG"]),
        stack=int(found["STACK"]),
        spilled=len(re.findall(r"\bSTL\b", code)),
        shared=shared,
        tensor_core=bool(re.search(r"\bHGMMA", code)) > bool(re.search(r"\bHMMA", code))
        if generation >= 90
        else "HMMA" in code,
        wide_copies=wide,
        narrow_copies=len(copies) - wide,
        warnings="\n".join(line for line in verbose.splitlines() if re.search(r"\bC75\d\d\b|warning", line)),
        keeps_nan="max.NaN" in ptx,
    )


def assemble(source, generation):
    """What the assembler says, among it that it serialises matrix products (C7508 and its like)."""
    arguments = ["-v", f"--gpu-name=sm_{generation}a", source, "-o", source.with_suffix(".cubin")]
    return subprocess.run([TOOLS / "ptxas", *arguments], capture_output=True, text=True, check=True).stderr


def run(tool, *arguments):
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
