"""What the checks run on: the sizes for a GPU, and small ones that a CPU stands in for."""

import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from backends.cuda import emulation
from densenet_fast.backends.triton.config import Tile
from densenet_fast.backends.triton.tune import SHAPES, Shape
from on_gpu import stand_ins

ROOT = Path(__file__).parents[2]
STOCK = "torchvision" if importlib.util.find_spec("torchvision") else "reference"

Layer = tuple[tuple[int, int, int], int, int, int]
"""grid, C, B, k"""


class Choice(NamedTuple):
    """Configurations of a kernel to be measured beside the table's."""

    kernel: str
    tiles: dict[str, Tile]


class Settings(NamedTuple):
    """Sizes, devices and what differs between a GPU and what stands in for it.

    Attributes:
        device: of all tensors.
        processes: compile kernels at once.
        compiled: of the kernels, so many at most.
        build: the command that makes the library.
        library: the environment in which it is found.
        interpreted: the environment of what runs Triton's kernels.
        dtypes: of the checks of Triton's kernels, by the names that ``tune`` has for them.
        autocast: of the networks, the second of them for none.
        planned: of the checks of plans, by a name that both have.
        planning: the context of a planned step, of ``planned_images`` of ``planned_size``.
        layers: of those checks.
        wide: rows of a product of ``wide_channels`` columns, repeated ``wide_repeats`` times.
        stem, head: grids of the kernels in CUDA C++, and their columns.
        repeats: of a kernel that is to give the same again.
        network: and ``batch`` images of ``size``: of the checks of a whole network.
        speed_batches, speed_rounds, speed_against: what is timed, and beside whom.
        profiled: images of the step whose kernels are timed.
        shapes, choices: of the choices.
    """

    device: str
    processes: int
    compiled: int
    build: list[str]
    library: dict[str, str]
    interpreted: dict[str, str]
    dtypes: tuple[str, ...]
    autocast: tuple[str, str]
    planned: str
    planning: Callable[[], AbstractContextManager[Any]]
    planned_images: int
    planned_size: int
    layers: tuple[Layer, ...]
    wide: tuple[int, ...]
    wide_channels: int
    wide_repeats: int
    stem: Layer
    head: Layer
    repeats: int
    network: str
    batch: int
    size: int
    speed_batches: tuple[int, ...]
    speed_rounds: int
    speed_against: tuple[str, ...]
    profiled: int
    shapes: tuple[Shape, ...]
    choices: tuple[Choice, ...]
    stand_in: Callable[[], None]


GPU = Settings(
    device="cuda",
    processes=os.cpu_count() or 1,
    compiled=1 << 30,
    build=[sys.executable, "setup.py", "build_ext", "--inplace"],
    library={},
    interpreted={},
    dtypes=("bf16", "fp16", "tf32", "fp32"),
    autocast=("bf16", "fp32"),
    planned="bf16",
    planning=nullcontext,
    planned_images=8,
    planned_size=224,
    layers=(
        # the last layer of each block of DenseNet-121, then one of DenseNet-161
        ((16, 56, 56), 224, 128, 32),
        ((16, 28, 28), 480, 128, 32),
        ((16, 14, 14), 992, 128, 32),
        ((32, 7, 7), 992, 128, 32),
        ((8, 28, 28), 720, 192, 48),
    ),
    wide=(1568, 25088),
    wide_channels=1024,
    wide_repeats=200,
    stem=((16, 112, 112), 64, 64, 32),
    head=((32, 7, 7), 1024, 1024, 32),
    repeats=50,
    network="densenet121",
    batch=8,
    size=224,
    speed_batches=(32, 128, 256),
    speed_rounds=10,
    speed_against=("ours", STOCK, "ours-me"),
    profiled=128,
    shapes=SHAPES[128],
    choices=(
        Choice("bn_relu_conv1x1", {"inner 64": Tile(128, 128, 64, 8, 3)}),
        Choice("bn_relu_conv3x3", {"1 stage": Tile(128, 64, 64, 4, 1)}),
        Choice("bn_relu_conv3x3_grad_input", {"1 stage": Tile(128, 64, 64, 8, 1)}),
        Choice("bn_relu_conv3x3_grad_weight", {"1 stage": Tile(64, 128, 32, 4, 1)}),
        Choice(
            "bn_relu_conv1x1_backward",
            {
                "32 columns": Tile(32, 32, 128, 4, 3),
                "128 columns": Tile(32, 128, 128, 8, 3),
                "4 stages": Tile(32, 64, 128, 4, 4),
            },
        ),
    ),
    stand_in=lambda: None,
)

TINY = Tile(16, 16, 16, 1, 1)
DRY = Settings(
    device="cpu",
    processes=1,
    compiled=2,
    build=[sys.executable, "tests/backends/cuda/emulation.py"],
    library=emulation.environment(emulation.library()),
    interpreted={"TRITON_INTERPRET": "1"},
    dtypes=("fp16", "fp32"),
    autocast=("bf16", "fp32"),
    planned="fp16",
    planning=stand_ins.planning,
    planned_images=1,
    planned_size=8,
    layers=(((1, 2, 3), 8, 16, 4),),
    wide=(16,),
    wide_channels=16,
    wide_repeats=1,
    stem=((1, 5, 4), 8, 8, 4),
    head=((2, 2, 2), 8, 8, 4),
    repeats=1,
    network="densenet_bc10",
    batch=2,
    size=16,
    speed_batches=(1, 2),
    speed_rounds=1,
    speed_against=("ours", "reference", "ours-me"),
    profiled=2,
    shapes=(Shape(1, 4, 8, 16, 4, 8),),
    choices=(Choice("bn_relu_conv1x1", {"smaller": TINY}), Choice("bn_relu_conv1x1_backward", {"smaller": TINY})),
    stand_in=stand_ins.install,
)

SETTINGS = {"gpu": GPU, "dry": DRY}
