"""Faults put into the 3x3 kernels' source, one at a time: the emulation must find each, in one order of the threads or
the other, where the kernels as they are equal plain loops (``conv3x3_loops.h``).

``make emulate`` runs this file; no GPU is needed."""

import math
import os
import subprocess

import pytest

from backends.cuda import emulation

pytestmark = pytest.mark.skipif(emulation.find_nvcc() is None, reason="nvcc was not found")

NAMES = {"forward": "bn_relu_conv3x3", "input": "bn_relu_conv3x3_grad_input", "weight": "bn_relu_conv3x3_grad_weight"}
RUNS = {
    "forward": ("Conv3x3", "launch_conv<bf16, 4, 1, 2>", "check_forward"),
    "input": ("Conv3x3GradInput", "launch_grad_input<bf16, 1>", "check_grad_input"),
    "weight": ("Conv3x3GradWeight", "launch_grad_weight<bf16, 2, 2>", "check_grad_weight"),
}
ROUNDING = 0.01
"""Of bfloat16, by the largest value."""
BARRIER = "__syncthreads();  // every thread's values are there, and nobody reads the other stage any more"

FAULTS = {
    "forward": {
        "nobody waits for copies": ("wait_for_copies<0>();", ""),
        "copies are not committed": ("commit_copies();", ""),
        "no barrier before the products": (BARRIER, ""),
        "copies before the barrier": (
            BARRIER + "\n      if (c + 1 < planes) copy_stage(c + 1);",
            "if (c + 1 < planes) copy_stage(c + 1);\n" + BARRIER,
        ),
        "one stage for all": ("c % 2 * places.stage_bytes", "0"),
        "a wrong lane's half": (
            "at.slot(i) * kRowBytes + lane / 16 * 16",
            "at.slot(i) * kRowBytes + lane / 8 % 2 * 16",
        ),
        "a wrong lane's row": ("m * 16 + lane % 16;\n      pixel", "m * 16 + lane / 2;\n      pixel"),
        "neighbours beyond the edge": ("taps[m] >> tap & 1 ? ", "true ? "),
        "no zeros": ("zero_the_start();", ""),
        "a fragment twice": ("b[n / 2][n % 2 * 2 + 1]", "b[n / 2][n % 2 * 2]"),
        "not swapped": ("plane + swapped(pixel[m] + away)", "plane + pixel[m] + away"),
        "the tile before its stage is free": ("__syncthreads();  // the tile takes the stages' place", ""),
    },
    "input": {
        "nobody waits for dY": ("wait_for_copies<1>();", "wait_for_copies<2>();"),
        "nobody waits for Z": ("wait_for_copies<0>();", "wait_for_copies<1>();"),
        "no barrier before the products": ("__syncthreads();  // dY's windows are there, and W2", ""),
        "no barrier after them": ("__syncthreads();  // Z's tile is there, and nobody reads dY's any more", ""),
        "no barrier before storing": ("__syncthreads();  // scale * D is there;", "//"),
        "taps the wrong way round": ("(8 - tap) * planes", "tap * planes"),
        "not transposed": ("load_matrices_transposed(b[n]", "load_matrices(b[n]"),
        "the gradient of what is below zero": ("<= 0 ? 0.0f", "> 0 ? 0.0f"),
    },
    "weight": {
        "nobody waits for copies": ("wait_for_copies<0>();", ""),
        "no barrier before the products": (BARRIER, ""),
        "one stage for all": ("(tile - first) % 2 * places.stage_bytes", "0"),
        "neighbours beyond the edge": ("inside >> (3 * dy + dx) & 1", "true"),
        "taps of another pixel": ("taps[i + lane % 16]", "taps[i + lane / 2]"),
        "a wrong lane's channels": ("place(lane / 16 * 8 + lane % 8, lane / 8 % 2)", "place(lane % 16, lane / 16)"),
        "dZ completed twice": ("if (completes && valid > 0)", "for (int twice = 0; twice < 2; ++twice)"),
    },
}


def deviations(kernel, folder, old="", new=""):
    """What the kernel prints in both orders of its threads, with ``new`` in place of ``old`` in its source."""
    source = (emulation.ROOT / "csrc/cuda" / f"{NAMES[kernel]}.cu").read_text()
    assert source.count(old) >= 1, old
    source = source[: source.index(f"}}  // namespace\n\nconst char* {NAMES[kernel]}(")].replace(old, new)
    params, instance, check = RUNS[kernel]
    program = folder / "program.cpp"
    program.write_text(
        f"""{source}
        const char* run(const {params}& p) {{ return {instance}(p, nullptr); }}
        }}  // namespace
        }}  // namespace densenet_fast::cuda
        #include "conv3x3_loops.h"
        #include "tiling.cpp"
        int main() {{ densenet_fast::cuda::{check}(densenet_fast::cuda::run); }}
        """
    )
    command = [emulation.find_nvcc(), "-x", "c++", "-std=c++20", "-Xcompiler", emulation.HOST_FLAGS]
    executable = folder / "program"
    subprocess.run([*command, *emulation.INCLUDE, program, "-o", executable], check=True)
    lines = []
    for order in ("forward", "reverse"):
        environment = {**os.environ, "DENSENET_FAST_EMULATED_ORDER": order}
        run = subprocess.run([executable], env=environment, capture_output=True, text=True)
        lines += run.stdout.splitlines() or ["error nan"]
    return [(state, float(value)) for state, value in map(str.split, lines)]


def is_right(found):
    return all(state == "ran" and not math.isnan(value) and value < ROUNDING for state, value in found)


@pytest.mark.parametrize("kernel", RUNS)
def test_as_they_are(kernel, tmp_path):
    found = deviations(kernel, tmp_path)
    assert len(found) >= 2 and is_right(found), found


@pytest.mark.parametrize("kernel, fault", [(kernel, fault) for kernel, faults in FAULTS.items() for fault in faults])
def test_every_fault_is_found(kernel, fault, tmp_path):
    assert not is_right(deviations(kernel, tmp_path, *FAULTS[kernel][fault]))
