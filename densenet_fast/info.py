"""What runs where, and why."""

import importlib.metadata
import platform

import torch

import densenet_fast
from densenet_fast.backends import BACKENDS, cuda, cuda_kernels, plan, triton
from densenet_fast.table import table

PACKAGES = ("torch", "torchvision", "triton", "numpy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def report() -> str:
    """Versions, devices, and for each device the backend that serves each dtype and why the others do not."""
    versions = [("densenet_fast", densenet_fast.__version__), ("python", platform.python_version())]
    versions += [(package, _version(package)) for package in PACKAGES]
    sections = [table(("package", "version"), versions), table(("device", "name"), list(_devices().items()))]
    sections.append(table(("device", "dtype", "backend"), _served()))
    states = [(b.name, b.unavailable() or f"available: {b.describe()}") for b in BACKENDS]
    sections.append(table(("backend", "state"), states))
    sections.append(table(("launch plans",), [(_plans(),)]))
    return "\n\n".join(sections)


def _plans() -> str:
    """Whether ops are planned on GPUs, or why not."""
    missing = plan.unavailable() or (cuda.unavailable() if not cuda_kernels.emulated() else "the kernels are emulated")
    return missing or triton.unavailable() or f"available, by cuLaunchKernel and {triton.describe()}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{processor()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    return devices


def processor() -> str:
    """The CPU's name and what torch uses of its instructions."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def _served() -> list[tuple[str, str, str]]:
    rows = []
    for device in _devices():
        by_backend: dict[str, list[str]] = {}
        for dtype in DTYPES:
            usable = (b for b in BACKENDS if b.unavailable() is None and b.supports(torch.device(device), dtype))
            backend = next((b.name for b in usable), "stock torch")
            by_backend.setdefault(backend, []).append(str(dtype).removeprefix("torch."))
        rows += [(device, ", ".join(dtypes), backend) for backend, dtypes in by_backend.items()]
    return rows
