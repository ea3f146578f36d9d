"""What ``test_emulation.py`` leaves out: every kernel with its threads in reverse order, in one dtype and on vectors in
all, and the 3x3 kernels in float16. ``make emulate`` runs this file; no GPU is needed."""

import pytest

from backends.cuda import emulation
from backends.cuda.test_emulation import CONVOLUTION, OF_GPUS, run

pytestmark = pytest.mark.skipif(emulation.find_nvcc() is None, reason="nvcc was not found")


def test_in_reverse_order():
    run([*OF_GPUS, "-k", "bfloat16 or vectors_on_device or running_on_device"], order="reverse")


def test_the_3x3_kernels_in_reverse_order():
    run([CONVOLUTION], order="reverse")


def test_the_3x3_kernels_in_float16():
    run([CONVOLUTION, "-k", "torch.float16"])
