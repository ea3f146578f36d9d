"""The wheel, the source distribution, and how the build finds torch and keeps to old symbol versions."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution

import densenet_fast
from densenet_fast.backends import extension

HOME = Path(densenet_fast.__file__).parents[1]
pytestmark = pytest.mark.skipif(not (HOME / "setup.py").exists(), reason="installed from a wheel")


@pytest.fixture
def build(monkeypatch) -> ModuleType:
    """setup.py as a module, without a build."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("build_of_densenet_fast", HOME / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: object, expected: int = 0, **environment: str) -> str:
    """What Python prints in the checkout."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=HOME, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == expected, result.stdout + result.stderr
    return result.stdout


@pytest.mark.skipif(extension.unavailable() is not None, reason="no compiled kernels")
def test_the_wheel_is_for_every_python_and_every_linux_with_glibc_2_28(build, tmp_path):
    """It holds the library that is in use here, what a type checker needs, and nothing but the package."""
    library = str(extension.LIBRARY)
    code = (
        "import importlib.util, shutil, setuptools\n"
        "setup, given = setuptools.setup, {}; setuptools.setup = lambda **arguments: given.update(arguments)\n"
        f"spec = importlib.util.spec_from_file_location('build', {str(HOME / 'setup.py')!r})\n"
        "build = importlib.util.module_from_spec(spec); spec.loader.exec_module(build)\n"
        "def copy(self, extension):\n"
        f"    shutil.copy({library!r}, self.get_ext_fullpath(extension.name))\n"
        "build.BuildLibrary.build_extension = copy\n"
        "setup(**given, script_name='setup.py')"
    )
    folders = "build", "--build-lib", tmp_path / "lib", "bdist_wheel", "--bdist-dir", tmp_path / "parts"
    run("-c", code, "--quiet", *folders, "--dist-dir", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"densenet_fast-{densenet_fast.__version__}-py3-none-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extract("densenet_fast/_kernels.so", tmp_path)
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert build.newer_symbols(tmp_path / "densenet_fast/_kernels.so") == []
    assert "densenet_fast/py.typed" in names and {name.split("/")[0].split("-")[0] for name in names} == {
        "densenet_fast"
    }
    assert re.search(r"^Requires-Dist: torch>=2.11$", metadata, re.M)


def test_symbols_that_are_too_new_are_found(build, tmp_path):
    """Functions that glibc 2.34 moved are linked by the versions that they had before; without that they are found."""
    source, plain, older = tmp_path / "source.c", tmp_path / "plain.so", tmp_path / "older.so"
    source.write_text(
        "#include <dlfcn.h>\n#include <pthread.h>\n#include <semaphore.h>\n#include <sys/mman.h>\n"
        "void* all[] = {dlopen, dlsym, pthread_create, pthread_once, sem_post, shm_open};"
    )
    compiler = build.find("c++")
    command = compiler, "-x", "c", "-shared", "-fPIC", "-w", source, "-x", "none", "-o"
    subprocess.run([*command, plain], check=True)
    subprocess.run([*command, older, *build.older_glibc(compiler, tmp_path / "older").split()], check=True)
    assert build.newer_symbols(older) == []
    moved = {symbol.split("@")[0] for symbol in build.newer_symbols(plain)}
    assert moved in ({"dlopen", "dlsym", "pthread_create", "pthread_once", "sem_post", "shm_open"}, set())
    assert bool(moved) == (tmp_path / "older/libdl.so.2").exists()
    assert [
        build.is_old(v) for v in ("GLIBC_2.28", "GLIBC_2.2.5", "GLIBC_2.34", "GLIBCXX_3.4.25", "CXXABI_1.3.11")
    ] == [*(True, True, False, False, True)]


def test_the_source_distribution_holds_what_the_build_reads(tmp_path):
    run("setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "--formats=tar", "--dist-dir", tmp_path)
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("-c", "import subprocess; subprocess.run(['git', 'ls-files'])").split()
    needed = [name for name in tracked if re.match(r"(csrc|densenet_fast|examples|tests|docs)/|setup.py|[A-Z]", name)]
    assert needed and not set(needed) - held


def test_a_build_in_isolation_finds_the_torch_beside_it(build):
    """Of the environment that it builds for, without importing it."""
    script = str(HOME / "setup.py")
    code = (
        "import sys, setuptools; sys.path = [p for p in sys.path if not p.endswith('site-packages')]\n"
        "seen = {}; setuptools.setup = lambda **given: seen.update(given)\n"
        f"exec(open({script!r}).read(), {{'__file__': {script!r}, '__name__': 'build'}})\n"
        "import importlib.util; print(seen['setup_requires'], importlib.util.find_spec('torch'))"
    )
    assert run("-c", code).strip() == "[] None"


def test_without_torch_the_build_asks_for_it(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    command = build.BuildLibrary(Distribution())
    assert build.find_torch() is None and command.missing() == "torch>=2.11 was not found"
    (tmp_path / "torch").mkdir()
    for version, found in (("2.10.1", None), ("2.11.0+cu130", tmp_path / "torch"), ("3.0.0", tmp_path / "torch")):
        (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
        assert build.find_torch() == found
    monkeypatch.setenv("DENSENET_FAST_PURE", "1")
    assert build.pure() and command.missing() == "DENSENET_FAST_PURE is set"


CLIENT = """
import torch
from torch import Tensor, nn

import densenet_fast
from densenet_fast import DenseNet

model: DenseNet = densenet_fast.densenet121(num_classes=10, memory_efficient=True)
logits: Tensor = model(torch.zeros(1, 3, 224, 224))
converted: nn.Module = densenet_fast.restore(densenet_fast.convert(nn.Sequential()))
print(densenet_fast.explain(converted))
with densenet_fast.set_fused(False):
    block = densenet_fast.nn.DenseBlock(2, 64, 4, 32)
    features: Tensor = block(torch.zeros(1, 64, 8, 8))
"""


def test_the_public_interface_is_typed(tmp_path):
    """mypy --strict on what users write; and it is no formality: a wrong type is found."""
    mypy = "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path / "cache"
    (tmp_path / "client.py").write_text(CLIENT)
    assert run(*mypy, tmp_path / "client.py", MYPYPATH=str(HOME)).startswith("Success")
    (tmp_path / "wrong.py").write_text(CLIENT.replace("DenseBlock(2", "DenseBlock('two'"))
    result = run(*mypy, tmp_path / "wrong.py", MYPYPATH=str(HOME), expected=1)
    assert "arg-type" in result and result.count("error:") == 1
