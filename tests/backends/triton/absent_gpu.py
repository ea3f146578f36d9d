"""A driver for a GPU that is not there. Triton's just-in-time compiler compiles for it; nothing is launched."""

import contextlib
import itertools

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class AbsentGPU:
    """A GPU of a generation, 80 for compute capability 8.0. Each has its own index, by which Triton keeps kernels."""

    indices = itertools.count()

    def __init__(self, generation):
        self.generation, self.index = generation, next(self.indices)

    def get_current_device(self):
        return self.index

    def get_current_target(self):
        return GPUTarget("cuda", self.generation, 32)

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def absent_gpu(generation):
    """Makes one Triton's current device."""
    before = driver._active
    driver.set_active(AbsentGPU(generation))
    try:
        yield
    finally:
        driver.set_active(before)
