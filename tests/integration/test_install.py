"""``pip install .`` from a clean copy of the sources: with a compiler, without one, and with one that fails."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import densenet_fast

ROOT = Path(densenet_fast.__file__).parents[1]
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "densenet_fast"]

COMPILER = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
pathlib.Path(arguments[arguments.index("-o") + 1]).write_text("made by " + pathlib.Path(sys.argv[0]).name)
for name in arguments[arguments.index("-MF") + 1 :][:1] if "-MF" in arguments else []:
    pathlib.Path(name).write_text("made: " + arguments[arguments.index("-c") + 1])
"""

USE = """
import warnings, torch, densenet_fast
print(densenet_fast.__file__)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    model = densenet_fast.DenseNet(4, (1, 1), 6, num_classes=3)
    for _ in range(2):
        model(torch.randn(2, 3, 40, 40)).sum().backward()
print(*[w.message for w in seen if "densenet_fast" in str(w.message)], sep="|")
print({row.backend for row in densenet_fast.explain(model)})
"""


def install(folder: Path, **environment: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Installs a copy of the sources into FOLDER/site; that folder, and what pip printed."""
    sources = folder / "sources"
    sources.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, sources)
    line = ["-m", "pip", "install", "-v", "--no-index", "--no-build-isolation", "--no-deps", "--target", "site"]
    return folder / "site", subprocess.run(
        [sys.executable, *line, str(sources)],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_asked_for_no_kernels(tmp_path):
    site, pip = install(tmp_path, DENSENET_FAST_PURE="1", CXX="no-such-compiler")
    words = "densenet_fast: DENSENET_FAST_PURE is set: installing without the compiled kernels"
    assert pip.returncode == 0 and words in pip.stdout and not list(site.rglob("*.so")), pip.stdout


def test_without_a_compiler(tmp_path):
    """It installs, says why it holds no kernels, and works, saying once that it could be faster."""
    site, pip = install(tmp_path, CXX="no-such-compiler")
    words = "densenet_fast: no-such-compiler was not found: installing without the compiled kernels"
    assert pip.returncode == 0 and words in pip.stdout, pip.stdout
    assert not list(site.rglob("*.so")) and (site / "densenet_fast/backends/triton/kernels").is_dir()
    used = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    file, warnings, backends = used.stdout.splitlines()
    assert Path(file).parents[1] == site
    assert warnings.startswith("densenet_fast: slower without its cpu backend: the compiled kernels are not installed")
    assert "|" not in warnings and backends == "{'aten'}"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux alone")
def test_with_a_compiler(tmp_path):
    """The library goes into the package. A stand-in compiles in an instant; other tests use the real one."""
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER.format(python=sys.executable))
    compiler.chmod(0o755)
    site, pip = install(tmp_path, CXX=str(compiler), DENSENET_FAST_CUDA="0")
    assert pip.returncode == 0, pip.stdout
    assert (site / "densenet_fast/_kernels.so").read_text() == "made by compiler"


WITHOUT_NINJA = """
import runpy, shutil, sys
which = shutil.which
shutil.which = lambda name, **options: None if name == "ninja" else which(name, **options)
sys.argv = ["setup.py", "build_ext", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux alone")
@pytest.mark.parametrize("fails", [False, True])
def test_without_ninja(tmp_path, fails):
    """The same commands run; one that fails is shown and ends the build."""
    compiler = tmp_path / "compiler"
    end = "sys.exit('a word from the compiler') if '-shared' in arguments else None" if fails else ""
    compiler.write_text(COMPILER.format(python=sys.executable) + end)
    compiler.chmod(0o755)
    build = subprocess.run(
        [sys.executable, "-c", WITHOUT_NINJA, "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"],
        cwd=ROOT,
        env={**os.environ, "CXX": str(compiler), "DENSENET_FAST_CUDA": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "link _kernels.so" in build.stdout and "compile cpu_dispatch.o" in build.stdout, build.stdout
    library = tmp_path / "lib/densenet_fast/_kernels.so"
    if fails:
        assert build.returncode != 0 and "a word from the compiler" in build.stdout and not library.exists()
    else:
        assert build.returncode == 0 and library.read_text() == "made by compiler", build.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels are built on Linux alone")
def test_with_a_compiler_that_fails(tmp_path):
    """The installation fails, shows the compiler's words and names the way around."""
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho a word from the compiler >&2\nexit 1\n")
    compiler.chmod(0o755)
    _, pip = install(tmp_path, CXX=str(compiler))
    assert pip.returncode != 0
    assert "a word from the compiler" in pip.stdout and "DENSENET_FAST_PURE=1 pip install" in pip.stdout
