"""Races for shared memory between warp groups: kernels without one of their barriers, and code written by hand."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from backends.triton.absent_gpu import absent_gpu
from densenet_fast.backends.triton import config, launch
from densenet_fast.backends.triton.config import Tile
from densenet_fast.backends.triton.races import races_of, shared_memory_races
from densenet_fast.backends.triton.tune import Shape, Step, row_of

HEAD = """
.visible .entry kernel(
	.param .u32 kernel_param_0
)
.reqntid 256
{
"""
DESCRIPTOR = (1 << 62) | (64 << 32)
"""128 bytes wide, rows of eight 1024 bytes apart, from address 0."""
PRODUCT = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2,%r3,%r4}, {%r5,%r6,%r7,%r8}, %rd1, 1, 1, 1, 0;"
    "wgmma.commit_group.sync.aligned;"
)
STORE, BARRIER, WAIT = "st.shared.b32 [ %r9 + 0 ], %r1;", "bar.sync 0;", "wgmma.wait_group.sync.aligned 0;"
COPY = "cp.async.cg.shared.global [ %r9 + 0 ], [ %rd2 + 0 ], 0x10, 0x10;cp.async.commit_group;"
ARRIVED = "cp.async.wait_group 0;"
ADDRESSES = f"mov.u32 %r10, %tid.x;shl.b32 %r9, %r10, 2;mov.b64 %rd1, {DESCRIPTOR};"
"""Each thread's word of the first 1024 bytes, all of which the product reads."""
WRITTEN = ADDRESSES + STORE + BARRIER


def kernel(body):
    return HEAD + body.replace(";", ";\n") + "\nret;\n}\n"


FOUND = {
    "written behind wait and barrier": (WRITTEN + PRODUCT + WAIT + BARRIER + STORE, ""),
    "written behind the wait": (WRITTEN + PRODUCT + WAIT + STORE, "may read"),
    "the barrier before the wait": (WRITTEN + PRODUCT + BARRIER + WAIT + STORE, "may read"),
    "elsewhere": (WRITTEN + PRODUCT + WAIT + "add.s32 %r9, %r9, 1024;" + STORE, ""),
    "copied there behind the wait": (WRITTEN + PRODUCT + WAIT + COPY, "may read"),
    "not waited for": (WRITTEN + PRODUCT + BARRIER + STORE, "may read"),
    "read before a barrier": (ADDRESSES + STORE + PRODUCT + WAIT, "sure to be written"),
    "never written": (ADDRESSES + PRODUCT + WAIT, "never written"),
    "copied and waited for": (ADDRESSES + COPY + ARRIVED + BARRIER + PRODUCT + WAIT, ""),
    "copied and not waited for": (ADDRESSES + COPY + BARRIER + PRODUCT + WAIT, "sure to be written"),
    "in a loop": (
        WRITTEN + "ld.param.b32 %r11, [kernel_param_0];\n$L_1:\n" + PRODUCT + WAIT + BARRIER + "sub.s32 %r11, %r11, 1;"
        "setp.gt.s32 %p1, %r11, 0;@%p1 bra $L_1;" + STORE,
        "",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_planted(name):
    body, expected = FOUND[name]
    races = shared_memory_races(kernel(body), [3], 256)
    assert bool(races) == bool(expected) and all(expected in race for race in races), races


@pytest.mark.parametrize(
    "body, message",
    [
        ("mov.u32 %r1, %tid.x;setp.lt.s32 %p1, %r1, 7;@%p1 bra $L_1;\n$L_1:\n", "all threads take or leave"),
        ("cvt.rn.f16.f32 %rs1, %r1;st.shared.b16 [ %r1 + 0 ], %rs1;", "expected a known %r1"),
        (ADDRESSES.replace(str(DESCRIPTOR), "64") + PRODUCT, "expected a swizzled layout, got the descriptor 0x40"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1;", "expected no such statement"),
    ],
)
def test_what_cannot_be_followed(body, message):
    with pytest.raises(ValueError, match=message):
        shared_memory_races(kernel(body), [0], 256)


def test_arguments_are_counted():
    with pytest.raises(ValueError, match="expected 1 arguments, got 2"):
        shared_memory_races(kernel(""), [0, 0], 256)


def test_a_kernel_without_one_of_its_barriers():
    """The input gradient of the 3x3 convolution, by two warp groups, races without a barrier or a wait of its loop."""
    name = "bn_relu_conv3x3_grad_input"
    of_two_groups = row_of(name, (90, "half"), Tile(128, 64, 64, 8, 3))
    with config.assume(config.Device(90, 132)), absent_gpu(90), of_two_groups:
        launches = Step(Shape(32, 28, 256, 128, 32, 128), torch.bfloat16, torch.device("meta")).launches()
        item = next(item for item in launches if item.name == name)
        lines = launch.compiled(item).asm["ptx"].splitlines()
    assert races_of(item, "\n".join(lines)) == []

    def without(what, behind):
        at = next(i for i, line in enumerate(lines) if what in line and i > behind)
        return races_of(item, "\n".join(lines[:at] + lines[at + 1 :]))

    product = next(i for i, line in enumerate(lines) if "wgmma.mma_async" in line)
    before = max(i for i, line in enumerate(lines[:product]) if "cp.async.wait_group" in line)
    assert all("sure to be written" in race for race in without("bar.sync", before))
    assert all("may read" in race for race in without("bar.sync", product))
    assert without("bar.sync", before) and without("bar.sync", product)
    assert without("cp.async.wait_group", 0) and without("wgmma.wait_group", product)
