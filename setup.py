"""Metadata of densenet_fast; the place where its extension is built."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "densenet_fast/version.py").read_text())[1]
TRAIN = ["matplotlib>=3.8", "scikit-learn>=1.4"]

setup(
    name="densenet_fast",
    version=VERSION,
    description="A drop-in replacement for torchvision's DenseNet, without its memory",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="BSD-3-Clause",
    packages=find_packages(include=["densenet_fast", "densenet_fast.*"]),
    python_requires=">=3.10",
    install_requires=["torch>=2.11", "numpy", "tqdm"],
    extras_require={
        "train": TRAIN,
        "gpu": ["triton>=3.6"],
        "test": [*TRAIN, "ninja", "pytest>=8", "pytest-xdist", "ruff==0.17.6", "pillow"],
    },
)
