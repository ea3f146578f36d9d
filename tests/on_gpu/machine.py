"""What the machine has, and which backend serves what on it."""

import importlib.util
import os
import platform
import shutil
from functools import partial

import torch

from densenet_fast import info
from densenet_fast.benchmarking.conditions import conditions
from on_gpu.checks import Check, Record
from on_gpu.settings import Settings

GIB = 1 << 30
MODULES = ("triton", "torchvision", "timm", "pytest", "xdist", "setuptools", "ninja", "matplotlib", "tqdm", "numpy")
PROGRAMS = ("nvidia-smi", "nvcc", "c++", "ninja", "cuobjdump", "compute-sanitizer", "git")


def checks(settings: Settings) -> list[Check]:
    """Versions, then what runs where."""
    return [
        Check("versions", partial(versions, settings)),
        Check("what runs where", lambda: {"info": info.report()}),
    ]


def versions(settings: Settings) -> Record:
    """GPU, driver and versions, and what is missing of what the checks can use."""
    free, memory = torch.cuda.mem_get_info()
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    missing += [name for name in PROGRAMS if shutil.which(name) is None]
    return {
        "conditions": conditions(torch.device(settings.device)),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()),
        "processors": torch.cuda.get_device_properties(0).multi_processor_count,
        "memory_gib": round(memory / GIB, 1),
        "free_gib": round(free / GIB, 1),
        "cores": os.cpu_count(),
        "cudnn": torch.backends.cudnn.version(),
        "platform": platform.platform(),
        "missing": sorted(set(missing)),
    }
