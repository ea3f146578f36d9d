"""A GPU that is not there: a driver that writes launches down, and CPU tensors that stand in for a GPU's. A process
needs :func:`environment` before torch is imported."""

import contextlib
import ctypes
import functools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from backends.cuda import emulation

HERE = Path(__file__).parent


def environment(folder: Path) -> dict[str, str]:
    """What a process needs; builds the driver in ``folder``, and the emulated library."""
    import triton

    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wno-unused-parameter", "-I", include, "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *options, HERE / "stub_driver.c", "-o", library, "-lpthread"], check=True)
    return {
        **emulation.environment(emulation.build()),
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "DENSENET_FAST_LIBCUDA": str(library),
    }


class Launched(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("data", ctypes.c_ubyte * 512),
    ]

    def seen(self):
        """All of it: function, geometry, parameters."""
        name = ctypes.string_at(self.function).decode()
        geometry = (tuple(self.grid), tuple(self.block), self.shared, self.stream)
        return name, self.function, *geometry, bytes(self.data[: self.bytes])


@functools.cache
def driver():
    """The stub."""
    library = ctypes.CDLL(os.environ["DENSENET_FAST_LIBCUDA"])
    library.stub_launch.restype = ctypes.POINTER(Launched)
    return library


def launched():
    """What was launched since the last call."""
    found = [driver().stub_launch(i).contents.seen() for i in range(driver().stub_launched())]
    driver().stub_clear()
    return found


@contextlib.contextmanager
def stub_gpu(generation) -> Iterator:
    """Triton launches on a device of ``generation`` with 132 multiprocessors."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver as active

    from backends.triton.absent_gpu import AbsentGPU
    from densenet_fast.backends.triton import config

    class StubGPU(CudaDriver):
        """Triton's driver for NVIDIA GPUs over the stub, with a device of its own."""

        def __init__(self):
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            index = next(AbsentGPU.indices)
            self.get_current_device = lambda: index
            self.get_current_target = lambda: GPUTarget("cuda", generation, 32)
            self.get_current_stream = lambda device: 0

    before, device = active._active, config.Device(generation, 132)
    active.set_active(StubGPU())
    try:
        with config.assume(device):
            yield device
    finally:
        active.set_active(before)
        driver().stub_clear()


@contextlib.contextmanager
def as_gpu(generation) -> Iterator:
    """All that this process does with CPU tensors of the dtypes that Triton serves goes the way of a GPU's."""
    import torch

    from densenet_fast import functional
    from densenet_fast.backends import triton
    from densenet_fast.ops import ahead, planned

    def supports(device, dtype):
        return dtype in (torch.float32, torch.float16, torch.bfloat16)

    changed = [
        (triton, "supports", supports),
        (triton, "unavailable", lambda: None),
        (planned, "DEVICE", "cpu"),
        (ahead, "DEVICE", "none"),
        (functional, "_beyond_range", lambda *_: False),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changed]
    for owner, name, value in changed:
        setattr(owner, name, value)
    planned.unserved.cache_clear()
    try:
        with stub_gpu(generation) as device:
            yield device
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
        planned.unserved.cache_clear()
