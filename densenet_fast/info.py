"""Reports versions, devices, and the backends that serve each of them."""

import importlib.metadata
import platform
from typing import Any

import torch

import densenet_fast
from densenet_fast.backends import BACKENDS, capabilities, cuda, cuda_kernels, plan, serving, triton
from densenet_fast.table import table

PACKAGES = ("torch", "torchvision", "triton", "numpy")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def facts() -> dict[str, Any]:
    """The content of :func:`report` for programs, as strings, booleans, lists and dictionaries.

    None stands for a package that is not installed, and for an optional function without a kernel. Keys never change;
    new ones may be added::

        versions: {package: version}
        devices: [{name, description, backends: {dtype: backend}, functions: {dtype: {function: backend}}}]
        backends: [{name, available, detail}], the preferred one first
        launch_plans: {available, detail}
    """
    versions = {"densenet_fast": densenet_fast.__version__, "python": platform.python_version()}
    missing = _plans_obstacle()
    plans = missing or f"by cuLaunchKernel and {triton.describe()}"
    return {
        "versions": versions | {package: _version(package) for package in PACKAGES},
        "devices": [
            {"name": name, "description": description, **_served(torch.device(name))}
            for name, description in _devices().items()
        ],
        "backends": [
            {"name": b.name, "available": b.unavailable() is None, "detail": b.unavailable() or b.describe()}
            for b in BACKENDS
        ],
        "launch_plans": {"available": missing is None, "detail": plans},
    }


def report() -> str:
    """Versions, devices, the backend that serves each dtype on each device, and why other backends do not."""
    found = facts()
    versions = [(package, version or "not installed") for package, version in found["versions"].items()]
    devices = [(device["name"], device["description"]) for device in found["devices"]]
    served = []
    for device in found["devices"]:
        by_backend: dict[str, list[str]] = {}
        for dtype, backend in device["backends"].items():
            by_backend.setdefault(backend, []).append(dtype)
        served += [(device["name"], ", ".join(dtypes), backend) for backend, dtypes in by_backend.items()]
    sections = [table(("package", "version"), versions), table(("device", "name"), devices)]
    sections.append(table(("device", "dtype", "backend"), served))
    sections += [_by_function(device) for device in found["devices"]]
    sections.append(table(("backend", "state"), [(b["name"], _state(b, ": ")) for b in found["backends"]]))
    sections.append(table(("launch plans",), [(_state(found["launch_plans"], ", "),)]))
    return "\n\n".join(sections)


def _state(found: dict[str, Any], mark: str) -> str:
    return f"available{mark}{found['detail']}" if found["available"] else found["detail"]


def _plans_obstacle() -> str | None:
    """Why launches on GPUs cannot be planned, or None."""
    missing = plan.unavailable() or (cuda.unavailable() if not cuda_kernels.emulated() else "the kernels are emulated")
    return missing or triton.unavailable()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{processor()}, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        devices[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    return devices


def processor() -> str:
    """The CPU's name and the instruction set that torch uses on it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


def _served(device: torch.device) -> dict[str, dict[str, Any]]:
    """For each dtype on ``device``, the backend, and for each function the backend whose kernel runs it."""
    usable = {str(dtype).removeprefix("torch."): (serving(device, dtype), dtype) for dtype in DTYPES}
    return {
        "backends": {name: backends[0].name for name, (backends, _) in usable.items()},
        "functions": {name: capabilities(backends, dtype) for name, (backends, dtype) in usable.items()},
    }


def _by_function(device: dict[str, Any]) -> str:
    """A table of the functions on a device, with the backend whose kernel runs each of them."""
    by_dtype = device["functions"]
    rows = [(f, *(found[f] or "-" for found in by_dtype.values())) for f in next(iter(by_dtype.values()))]
    return table((f"function on {device['name']}", *by_dtype), rows)
