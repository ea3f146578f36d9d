"""``make versions``: the library under other versions of torch, each in a virtual environment of its own, as it is
installed here and as it is built with that torch's headers.

python tests/load_library.py 2.11.0 newest      makes the environments, runs ``--here`` in each, and prints one table
python tests/load_library.py --here             in the torch that this Python has: loads the library, runs kernels

The environments are under build/versions and are kept; torch comes from the package index that pip is configured with.
"""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def here() -> None:
    """Loads the library into this Python's torch and holds its CPU kernels against torch's own."""
    sys.path.append(str(ROOT))  # unless the package is installed
    import torch

    from densenet_fast import functional
    from densenet_fast.backends import cpu, cuda, extension

    assert extension.unavailable() is None, extension.unavailable()
    torch.manual_seed(0)
    x = torch.randn(2, 24, 9, 7, requires_grad=True)
    norm = functional.BatchNorm(torch.rand(24), torch.randn(24))
    weight = torch.randn(16, 24, 1, 1, requires_grad=True)
    grad = torch.randn(2, 16, 9, 7)
    results = []
    for fused in (True, False):
        if fused:
            y = functional.bn_relu_conv1x1(x, norm, weight)
        else:
            a = torch.nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
            y = torch.nn.functional.conv2d(torch.relu(a), weight)
        results.append((y.detach(), *torch.autograd.grad(y, (x, weight), grad)))
    for got, expected in zip(*results):
        assert (got - expected).norm() <= 1e-5 * expected.norm()
    compiled_for_cuda = hasattr(torch.ops.densenet_fast, "cuda_append_features")
    if compiled_for_cuda:
        schema = torch.ops.densenet_fast.cuda_finalise_gradient.default._schema
        assert [a.name for a in schema.arguments if a.alias_info is not None] == ["out"]
    kernels = f"cuda: {cuda.unavailable() or cuda.describe()}" if compiled_for_cuda else "built without CUDA"
    print(f"torch {torch.__version__}: loads; cpu, right: {cpu.describe()}; {kernels}")


def in_environment(version: str, installed: Path) -> list[str]:
    """What ``--here`` says under ``version`` of torch of both libraries; raises CalledProcessError where one fails."""
    home = ROOT / "build/versions" / version
    python = home / "bin/python"
    if not python.exists():
        venv.create(home, with_pip=True)
    needed = ["torch" if version == "newest" else f"torch=={version}", "numpy", "setuptools", "ninja"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", *needed], check=True)
    build = [python, "setup.py", "--quiet", "build_ext", "--build-temp", home / "temp", "--build-lib", home / "built"]
    subprocess.run(build, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    rows = []
    for name, library in {"installed": installed, "built with it": home / "built/densenet_fast/_kernels.so"}.items():
        environment = {**os.environ, "DENSENET_FAST_LIBRARY": str(library)}
        command = [python, __file__, "--here"]
        said = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True).stdout.strip()
        rows.append(f"{said}; {name}")
    return rows


def main() -> int:
    """Returns 0 if both libraries work under every version asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="of torch; newest is the package index's")
    parser.add_argument("--here", action="store_true", help="in this Python's torch")
    arguments = parser.parse_args()
    if arguments.here:
        here()
        return 0
    library = Path(os.environ.get("DENSENET_FAST_LIBRARY") or ROOT / "densenet_fast/_kernels.so").resolve()
    rows, failed = [], False
    for version in arguments.versions:
        try:
            rows += in_environment(version, library)
        except subprocess.CalledProcessError as error:
            rows.append(f"torch {version}: FAILED: {' '.join(map(str, error.cmd))}")
            failed = True
    print("\n".join(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
