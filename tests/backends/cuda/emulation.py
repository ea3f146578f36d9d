"""The CUDA kernels for a CPU: csrc/cuda compiled by the host's compiler over ``emulator.h``.

A test or step that runs with ``environment()`` gets them through the package's own door, DENSENET_FAST_LIBRARY.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).parents[3]
SOURCES = sorted((ROOT / "csrc/cuda").iterdir())
FLAGS = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DDENSENET_FAST_EMULATED"]
INCLUDE = ["-I", str(Path(__file__).parent), "-I", str(ROOT / "csrc/cuda")]
HOST_FLAGS = "-fPIC,-fvisibility=hidden,-Wall,-Wno-unknown-pragmas,-ftrivial-auto-var-init=pattern"
"""Uninitialised variables hold a pattern, so that using one shows."""
SANITIZE = ",-fsanitize=address,-fno-omit-frame-pointer,-g"


def find_nvcc() -> str | None:
    """The CUDA compiler, whose headers the kernels need."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next(filter(None, (shutil.which(str(Path(home, "bin/nvcc"))) for home in homes)), shutil.which("nvcc"))


def library(sanitize: bool = False) -> Path:
    """Where it is once it is built; its name changes with its sources."""
    key = hashlib.sha256((torch.__version__ + _host_flags(sanitize)).encode())
    for path in [*sorted(Path(__file__).parent.glob("*.h")), Path(__file__), *SOURCES]:
        key.update(path.read_bytes())
    return ROOT / "build/emulated" / f"{key.hexdigest()[:16]}.so"


def _host_flags(sanitize: bool) -> str:
    return HOST_FLAGS + (SANITIZE if sanitize else "")


def build(sanitize: bool = False) -> Path:
    """The library, compiled if its sources changed; with the address sanitizer if asked for."""
    home, host_flags, made = Path(torch.__file__).parent, _host_flags(sanitize), library(sanitize)
    if made.exists():
        return made
    work = made.with_suffix(f".{os.getpid()}")
    work.mkdir(parents=True)
    objects = []
    for source in SOURCES:
        if source.suffix not in (".cu", ".cpp"):
            continue
        objects.append(work / f"{source.stem}.o")
        optimised = "-O1" if source.suffix == ".cu" else "-O2"
        command = [find_nvcc(), "-x", "c++", optimised, "-Xcompiler", host_flags, *FLAGS]
        command += ["-isystem", home / "include", *INCLUDE, "-c", source, "-o", objects[-1]]
        subprocess.run(command, check=True)
    link = [os.environ.get("CXX", "c++"), "-shared", *objects, "-o", work / "library.so", f"-L{home / 'lib'}"]
    link += ["-ltorch_cpu", "-ltorch", *(["-fsanitize=address"] if sanitize else [])]
    subprocess.run(link, check=True)
    os.replace(work / "library.so", made)
    shutil.rmtree(work)
    return made


def environment(path: Path, order: str = "forward") -> dict[str, str]:
    """What a process needs to run on the library at ``path``, its threads in ``order`` or ``"reverse"``."""
    return {"DENSENET_FAST_LIBRARY": str(path), "DENSENET_FAST_EMULATED_ORDER": order, "TRITON_INTERPRET": "0"}


if __name__ == "__main__":
    if find_nvcc() is None:
        raise SystemExit("no emulated kernels: nvcc was not found")
    print(build(sanitize=bool(os.environ.get("SANITIZE"))))
