"""The package as a whole: its layers, its size, what it says of the machine."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import densenet_fast
from densenet_fast import info
from densenet_fast.__main__ import main

ROOT = Path(densenet_fast.__file__).parent
CHECKOUT = Path(__file__).parents[1]
TRITON_KERNELS = {path.stem for path in (ROOT / "backends/triton/kernels").glob("*.py")} - {"pieces", "__init__"}
LEVELS = [
    ["backends.inputs"],
    ["version", "reference", "table", "thirdparty", "memory", "progress"],
    ["backends.affine", "backends.layout", "backends.optional"],
    ["backends.arena", "backends.contract"],
    ["backends.symbolic", "backends.spatial", "backends.extension", "backends.nvidia"],
    ["backends.aten", "backends.cuda_kernels"],
    ["backends.cpu", "backends.cuda_bn_relu_conv3x3"],
    ["backends.triton.config", "backends.triton.kernels", "backends.triton.hazards"],
    ["backends.triton.kernels.pieces", "backends.triton.launch"],
    [
        "backends.triton.races",
        "backends.triton.parameters",
        *(f"backends.triton.kernels.{name}" for name in TRITON_KERNELS),
    ],
    ["backends.triton.shared"],
    ["backends.triton.bn_relu_conv1x1", "backends.triton.bn_relu_conv3x3"],
    ["backends.triton.bn_relu_pool_conv1x1"],
    ["backends.triton"],
    ["backends.cuda"],
    ["backends.triton.tune", "backends.recording"],
    ["backends.plan"],
    ["backends"],
    ["ops.stage"],
    ["ops.ahead", "ops.block_plan", "ops.flops", "ops.planned"],
    ["ops.stock", "ops.batching", "ops.op"],
    ["ops.bn_conv1x1_avgpool", "ops.convolution"],
    ["ops.single"],
    ["ops.dense_block_backward"],
    ["ops.dense_block", "ops.bn_relu_conv1x1", "ops.bn_relu_maxpool", "ops.bn_relu_global_avgpool"],
    ["ops.chain", "ops.network"],
    ["ops"],
    ["operands"],
    ["inference"],
    ["functional.shared"],
    [
        "functional.bn_conv1x1_avgpool",
        "functional.bn_relu_conv1x1",
        "functional.bn_relu_global_avgpool",
        "functional.bn_relu_maxpool",
        "functional.dense_block",
    ],
    ["functional.chain", "functional.network"],
    ["functional", "nn.calls"],
    ["nn.sync_batch_norm", "nn.memory_format", "checkpoints"],
    ["pretrained"],
    ["nn.fusion", "nn.recomputation", "nn.snapshot"],
    ["nn.dense_block", "nn.bn_relu_conv1x1"],
    ["nn"],
    ["nn.features"],
    ["nn.whole"],
    ["conversion.classes", "conversion.expected"],
    ["conversion.layout"],
    ["conversion.transition", "conversion.stem"],
    ["conversion.fused"],
    ["conversion.probe", "conversion.sequential"],
    ["conversion.candidates"],
    ["conversion.recognition", "conversion.graphs"],
    ["models", "conversion"],
    ["timm_models"],
    ["registry"],
    ["explain"],
    [""],
    ["info", "training"],
    ["benchmarking"],
    ["__main__"],
]
PACKAGES = ("training", "benchmarking")
"""Commands, each a level of its own."""


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def level(name):
    name = next((package for package in PACKAGES if name.startswith(package)), name)
    found = next((i for i, names in enumerate(LEVELS) if name in names), None)
    assert found is not None, f"LEVELS has no {name}"
    return found


def imports(path):
    """Names of the modules of this package that ``path`` imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] != "densenet_fast":
                continue
            path_of_name = ROOT.joinpath(*parts[1:])
            if not path_of_name.is_dir() and not path_of_name.with_suffix(".py").exists():
                parts.pop()
            yield ".".join(parts[1:])


def test_no_import_runs_upwards():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        own = level(module_name(path))
        for name in imports(path):
            same_package = any(name.startswith(p) and module_name(path).startswith(p) for p in PACKAGES)
            assert level(name) < own or same_package, f"{module_name(path)} imports {name or 'the package'}"


def test_files_are_short():
    folders = ("densenet_fast", "csrc", "tests", "benchmarks", "examples", "docs")
    files = [path for folder in folders for path in (CHECKOUT / folder).rglob("*")]
    files = [path for path in files if path.suffix in (".py", ".h", ".cpp", ".cu", ".c")]
    assert len(files) > 300
    for path in [*files, *CHECKOUT.glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def is_triton_kernel(function):
    """Triton's language has no keyword-only parameters."""
    decorators = [d.func if isinstance(d, ast.Call) else d for d in function.decorator_list]
    return "triton.jit" in map(ast.unparse, decorators)


def test_no_function_takes_more_than_eight_positional_arguments():
    """Counted are those that a caller gives."""
    folders = ("densenet_fast", "benchmarks", "examples")
    files = [path for folder in folders for path in (CHECKOUT / folder).rglob("*.py")]
    assert len(files) > 100
    found = []
    for path in [*files, CHECKOUT / "setup.py"]:
        functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        for function in functions:
            given = [a for a in function.args.posonlyargs + function.args.args if a.arg not in ("self", "cls")]
            if len(given) > 8 and not is_triton_kernel(function):
                found.append(f"{path.relative_to(CHECKOUT)}:{function.lineno}: {function.name} takes {len(given)}")
    assert not found, "\n".join(found)


def test_importing_the_package_imports_neither_torchvision_nor_the_commands():
    code = (
        "import sys, densenet_fast; "
        "unwanted = ('torchvision', 'timm', 'safetensors', 'huggingface_hub', 'sklearn', 'matplotlib', 'triton', "
        "'torch._dynamo', 'densenet_fast.training', "
        "'densenet_fast.benchmarking', 'torch.utils.flop_counter'); "
        "print([m for m in unwanted if m in sys.modules]); "
        "import importlib.util; importlib.util.find_spec('torch.utils.flop_counter'); "
        "from torch.utils.flop_counter import flop_registry; "
        "print(densenet_fast.ops.flops.FORMULAS.keys() <= {op._qualified_op_name[15:] for op in flop_registry "
        "if getattr(op, '_qualified_op_name', '').startswith('densenet_fast::')})"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["[]", "True"], "or the counter that is imported then does not know the ops"


@pytest.mark.library
def test_info_tells_which_kernels_serve():
    report = info.report()
    assert re.search(r"cpu +\| float32, bfloat16 +\| cpu ", report) and re.search(r"float16, float64 +\| aten ", report)
    assert "available: C++" in report


def test_info_tells_programs_what_it_tells_readers(capsys):
    assert main(["info", "--json"]) == 0
    told, report = json.loads(capsys.readouterr().out), info.report()
    assert {key: [*found] if isinstance(found, dict) else [*found[0]] for key, found in told.items()} == {
        "versions": ["densenet_fast", "python", "torch", "torchvision", "triton", "numpy"],
        "devices": ["name", "description", "backends", "functions"],
        "backends": ["name", "available", "detail"],
        "launch_plans": ["available", "detail"],
    }
    assert [*told["devices"][0]["backends"]] == ["float32", "bfloat16", "float16", "float64"]
    assert [*told["devices"][0]["functions"]] == [*told["devices"][0]["backends"]]
    assert told["devices"][0]["functions"]["float64"]["bn_relu_conv1x1"] == "aten" and "stem_inference" in report
    assert all(b["name"] in report and b["detail"] in report for b in told["backends"])


def test_info_tells_this_machine():
    report = info.report()
    assert torch.__version__ in report and densenet_fast.__version__ in report
    assert f"{torch.get_num_threads()} threads" in report
    assert ("cuda:0" in report) == torch.cuda.is_available()
    assert "available: torch operations" in report
