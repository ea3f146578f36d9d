"""The build of densenet_fast's extension.

One shared library serves every Python and every torch from 2.11 on. Its headers are those of the environment that it is
built for, also where the build is isolated from that; if torch is not there the build asks for it. Ninja builds the
library where it is found; without a compiler the package installs without it and says so. Where nvcc is found (in
CUDA_HOME or on PATH) it holds CUDA kernels too, for the architectures of TORCH_CUDA_ARCH_LIST or all that nvcc knows of
CUDA_ARCHITECTURES; DENSENET_FAST_CUDA=0 leaves them out. Their runtime is linked in, so the library loads without CUDA.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from string import Template
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
TORCH = "torch>=2.11"

LIBRARY = "_kernels.so"
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -DTORCH_TARGET_VERSION=0x020b000000000000"
KERNEL_FLAGS = "-fno-math-errno -fno-trapping-math -Wno-psabi -Wno-maybe-uninitialized"
CPU_SOURCES = (
    "dispatch",
    "memory",
    "elementwise",
    "bn_relu_conv1x1",
    "bn_relu_conv3x3",
    "bn_relu_pool_conv1x1",
    "bn_relu_maxpool",
    "bn_relu_global_avgpool",
    "dense_block",
    "chain",
    "network",
    "dense_block_inference",
    "stem",
)
CPU_KERNELS = ("kernels", "pool_kernels")
"""Compiled once for each instruction set."""
INSTRUCTION_SETS = {"default": ""}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = "-mavx2 -mfma"
    INSTRUCTION_SETS["avx512"] = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mprefer-vector-width=512"
    INSTRUCTION_SETS["avx512_bf16"] = INSTRUCTION_SETS["avx512"] + " -mavx512bf16"
TILE_PRODUCT = "amx_bf16"
"""Compiled for avx512_bf16, whose other kernels it shares, if the assembler knows its instructions."""
CUDA_SOURCES = ("ops", "bn_relu_conv3x3_ops", "vector_ops", "tiling", "recording", "plan", "replay")
TENSOR_CORE_KERNELS = ("bn_relu_conv3x3", "bn_relu_conv3x3_grad_weight", "bn_relu_conv3x3_grad_input")
"""For compute capability 8.0 and up; code for 8.0 serves 8.6 and 8.9, and is not made again for them."""
CUDA_KERNELS = ("statistics", "gradients", "pooling", "vectors")
CUDA_ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
CUDA_FLAGS = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall"

OLDEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
"""The newest symbol versions that the library may need, those of manylinux_2_28."""
MOVED = {"dl": "libdl.so.2", "pthread_": "libpthread.so.0", "sem_": "libpthread.so.0", "shm_": "librt.so.1"}
"""The libraries beside libc.so.6 in which glibc had the functions of these prefixes until version 2.34."""


def find(program: str) -> str | None:
    """Its path; beside this Python, as in a virtual environment that is not activated, or on PATH."""
    return shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def find_nvcc() -> str | None:
    """The CUDA compiler's path, unless the CUDA kernels are to be left out."""
    if os.environ.get("DENSENET_FAST_CUDA", "1") in ("", "0"):
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next(filter(None, (shutil.which(str(Path(home, "bin/nvcc"))) for home in homes)), None) or find("nvcc")


def gpu_code(nvcc: str, tensor_cores: bool) -> str:
    """What nvcc is to generate code for: machine code of every architecture, and PTX of the newest for those to come;
    with ``tensor_cores``, of those alone that have them, once for each major one.

    Raises:
        SystemExit: TORCH_CUDA_ARCH_LIST cannot be read.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if not wanted:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
        wanted = [f"{a[:-1]}.{a[-1]}" for a in CUDA_ARCHITECTURES if f"compute_{a}" in known]
        wanted[-1] += "+PTX"
    flags = []
    for entry in wanted:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected capabilities such as '8.0;9.0+PTX', got {entry!r}")
        number = match[1] + match[2]
        lesser = {f"{match[1]}.{minor}" for minor in range(int(match[2][0]))}
        if tensor_cores and (lesser & set(wanted) or int(match[1]) < 8) and entry != wanted[-1]:
            continue  # but the last: nvcc needs one
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


def pure() -> bool:
    """Whether the package is to be installed without the library."""
    return os.environ.get("DENSENET_FAST_PURE", "0") not in ("", "0")


def find_torch() -> Path | None:
    """The folder of torch 2.11 or newer: what can be imported, or what is installed where this Python installs to and a
    build in isolation cannot import."""
    spec = importlib.util.find_spec("torch")
    found = [Path(spec.origin).parent] if spec and spec.origin else []
    for home in [*found, *(Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib"))]:
        version = home / "version.py"
        number = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text()) if version.exists() else None
        if number and (int(number[1]), int(number[2])) >= tuple(map(int, re.findall(r"\d+", TORCH))):
            return home
    return None


def is_old(version: str) -> bool:
    """Whether ``GLIBC_2.17``, say, is no newer than ``OLDEST``; of other libraries all are."""
    name, _, number = version.rpartition("_")
    parts = tuple(int(part) for part in re.findall(r"\d+", number))
    return name not in OLDEST or parts <= OLDEST[name]


def symbols(library: str | Path) -> list[tuple[str, str, bool, bool]]:
    """Of each symbol with a version: name, version, whether the library defines it, and whether by default so.
    Empty without objdump, which comes with compilers, and for a file that is no library."""
    program = find("objdump")
    output = subprocess.run([program, "-T", library], capture_output=True, text=True).stdout if program else ""
    found = re.findall(
        r"^\S+ .{7} (\S+)\t\S+ +(\(?)((?:GLIBC|GLIBCXX|CXXABI)_[\d.]+)\)? +(?:\.\w+ )?(\S+)$", output, re.M
    )
    return [(name, version, section != "*UND*", not hidden) for section, hidden, version, name in found]


def newer_symbols(library: str | Path) -> list[str]:
    """The symbols that the library needs in versions newer than ``OLDEST``."""
    return [
        f"{name}@{version}" for name, version, defined, _ in symbols(library) if not defined and not is_old(version)
    ]


def older_glibc(compiler: str, folder: Path) -> str:
    """The flags that link functions which glibc 2.34 moved into libc.so.6 by the versions that they had before, with
    libraries in ``folder`` that define these; none with a glibc in which they have not moved. The folder is not the one
    that nvcc runs in, whose programs would load them."""
    folder.mkdir(exist_ok=True)
    libc = subprocess.run([compiler, "-print-file-name=libc.so.6"], capture_output=True, text=True).stdout
    versions: dict[str, dict[str, bool]] = {}
    for name, version, defined, default in symbols(libc.strip()):
        if defined:
            versions.setdefault(name, {})[version] = default
    libraries: dict[str, dict[str, list[str]]] = {}
    for name, of in versions.items():
        old = [version for version in of if is_old(version)]
        homes = [library for prefix, library in MOVED.items() if name.startswith(prefix)]
        if homes and old and not any(of[version] for version in old):
            newest = max(old, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])
            libraries.setdefault(homes[0], {}).setdefault(newest, []).append(name)
    flags = []
    for library, nodes in libraries.items():
        functions = [f"void {name}(void) {{}}" for names in nodes.values() for name in names]
        script = [f"{version} {{ global: {'; '.join(names)}; }};" for version, names in nodes.items()]
        source, map_file = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text("\n".join(functions))
        map_file.write_text("\n".join(script))
        command = [compiler, "-x", "c", "-w", "-fno-builtin", "-shared", "-nostdlib", f"-Wl,-soname,{library}"]
        subprocess.run([*command, f"-Wl,--version-script,{map_file}", source, "-o", folder / library], check=True)
        flags.append(str(folder / library))
    return f"-Wl,--as-needed {' '.join(flags)} -Wl,--no-as-needed" if flags else ""


def cuda_libraries(nvcc: str) -> str:
    """The flags that link CUDA's runtime statically, its symbols hidden: torch may bring a runtime of its own."""
    source = HERE / "csrc/cuda" / f"{CUDA_KERNELS[0]}.cu"
    steps = subprocess.run([nvcc, "--dryrun", "-c", source, "-o", os.devnull], capture_output=True, text=True).stderr
    folders = re.findall(r'"(-L[^"]+)"', "".join(line for line in steps.splitlines() if "LIBRARIES=" in line))
    return " ".join([*folders, "-lcudart_static -ldl -lrt -lpthread -Wl,--exclude-libs,libcudart_static.a"])


class Edge(NamedTuple):
    """A file, the rule that makes it, of what, and more flags."""

    output: str
    rule: str
    inputs: list[str]
    more: str


class BuildLibrary(build_ext):
    """Builds the library, or explains why not."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, extension: Extension) -> None:
        missing = self.missing()
        if missing:
            print(f"densenet_fast: {missing}: installing without the compiled kernels", file=sys.stderr)
            return
        build = Path(self.build_temp).resolve() / "densenet_fast"
        build.mkdir(parents=True, exist_ok=True)
        rules, edges = self.rules(build), self.edges()
        (build / "build.ninja").write_text(ninja(rules, edges))
        program = find("ninja")
        if subprocess.run([program, "-C", str(build)]).returncode if program else not run_all(rules, edges, build):
            without_cuda = "DENSENET_FAST_CUDA=0 pip install ... without the CUDA kernels, " if find_nvcc() else ""
            raise SystemExit(
                "densenet_fast: the compiled kernels did not build (the compiler's message is above); "
                f"{without_cuda}DENSENET_FAST_PURE=1 pip install ... installs without them"
            )
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / LIBRARY, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)  # who has loaded the old one keeps it

    def missing(self) -> str:
        """What stands in the way of a build, or nothing."""
        if pure():
            return "DENSENET_FAST_PURE is set"
        if sys.platform != "linux":
            return f"no build for {sys.platform} yet"
        if find(self.compiler_name()) is None:
            return f"{self.compiler_name()} was not found"
        return "" if find_torch() else f"{TORCH} was not found"

    @staticmethod
    def compiler_name() -> str:
        return os.environ.get("CXX", "c++")

    def has_tile_registers(self) -> bool:
        """Whether the target is x86 and the compiler's assembler knows AMX."""
        if "avx512_bf16" not in INSTRUCTION_SETS:
            return False
        command = [self.compiler_name(), "-x", "c++", "-c", "-", "-o", os.devnull]
        source = 'void f() { asm("tdpbf16ps %tmm0, %tmm1, %tmm2"); }'
        return subprocess.run(command, input=source, text=True, stderr=subprocess.DEVNULL).returncode == 0

    def rules(self, build: Path) -> dict[str, str]:
        """The commands by name, with $in, $out and $more for what differs."""
        home, nvcc, ldflags = find_torch(), find_nvcc(), os.environ.get("LDFLAGS", "")
        compiler = self.compiler_name()
        flags = f"{FLAGS} -isystem {home / 'include'} {os.environ.get('CXXFLAGS', '')}"
        commands = {"compile": f"{compiler} -MMD -MF $out.d {flags} $more -c $in -o $out"}
        if nvcc:
            commands["cuda"] = f"{nvcc} -ccbin {compiler} -MD -MF $out.d {CUDA_FLAGS} $more -c $in -o $out"
            ldflags = f"{cuda_libraries(nvcc)} {older_glibc(compiler, build / 'older_glibc')} {ldflags}"
        commands["link"] = f"{compiler} -shared $in -o $out -L{home / 'lib'} -ltorch_cpu -ltorch {ldflags}"
        return commands

    def edges(self) -> list[Edge]:
        """Every object, those that take longest first, and last the library."""
        objects = [("ops", "ops", ""), ("compatibility", "compatibility", "")]
        tiles = self.has_tile_registers()
        objects += [(f"cpu_{name}", f"cpu/{name}", "-DAMX_BF16" if tiles else "") for name in CPU_SOURCES]
        objects += [
            (f"cpu_{kernels}_{name}", f"cpu/{kernels}", f"{KERNEL_FLAGS} -DTABLE={name} {flags}")
            for kernels in CPU_KERNELS
            for name, flags in INSTRUCTION_SETS.items()
        ]
        if tiles:
            flags = f"{KERNEL_FLAGS} {INSTRUCTION_SETS['avx512_bf16']}"
            objects.append((f"cpu_{TILE_PRODUCT}", f"cpu/{TILE_PRODUCT}", flags))
        source, edges = HERE.resolve() / "csrc", []
        if nvcc := find_nvcc():
            objects += [(f"cuda_{name}", f"cuda/{name}", "") for name in CUDA_SOURCES]
            for tensor_cores, names in ((True, TENSOR_CORE_KERNELS), (False, CUDA_KERNELS)):
                code = gpu_code(nvcc, tensor_cores)
                edges += [Edge(f"cuda_{name}.o", "cuda", [f"{source / 'cuda' / name}.cu"], code) for name in names]
        edges += [Edge(f"{name}.o", "compile", [f"{source / path}.cpp"], more) for name, path, more in objects]
        return [*edges, Edge(LIBRARY, "link", [edge.output for edge in edges], "")]


def ninja(rules: dict[str, str], edges: Sequence[Edge]) -> str:
    """The build file."""
    lines = []
    for name, command in rules.items():
        lines.append(f"rule {name}\n  command = {command}\n  description = {name} $out")
        lines += ["  depfile = $out.d\n  deps = gcc"] if "$out.d" in command else []
    for output, rule, inputs, more in edges:
        lines.append(f"build {output}: {rule} {' '.join(inputs)}\n  more = {more}")
    return "\n".join([*lines, f"default {LIBRARY}\n"])


def run_all(rules: dict[str, str], edges: Sequence[Edge], build: Path) -> bool:
    """Without ninja: runs every command, one on each core, then the last alone; whether all succeeded."""

    def succeeds(edge: Edge) -> bool:
        words = {"in": " ".join(edge.inputs), "out": edge.output, "more": edge.more}
        command = Template(rules[edge.rule]).substitute(words)
        print(f"{edge.rule} {edge.output}", flush=True)
        return subprocess.run(command, shell=True, cwd=build).returncode == 0

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return all(pool.map(succeeds, edges[:-1])) and succeeds(edges[-1])


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3: the library holds no Python. For every Linux with glibc 2.28 or newer, if the library
    needs nothing newer."""

    def get_tag(self) -> tuple[str, str, str]:
        platform_tag, library = super().get_tag()[2], Path(self.bdist_dir, "densenet_fast", LIBRARY)
        if platform_tag.startswith("linux_") and library.exists():
            if not symbols(library):
                print("densenet_fast: what the library needs is not known: objdump does not say", file=sys.stderr)
            elif newer := newer_symbols(library):
                print(f"densenet_fast: not for every Linux, needs {', '.join(newer)}", file=sys.stderr)
            else:
                platform_tag = f"manylinux_{OLDEST['GLIBC'][0]}_{OLDEST['GLIBC'][1]}_{platform.machine()}"
        return "py3", "none", platform_tag


setup(
    ext_modules=[Extension("densenet_fast._kernels", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    setup_requires=[] if pure() or find_torch() else [TORCH],
)
