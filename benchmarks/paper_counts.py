"""The paper's networks, parameters and multiply-adds beside the published: ``python benchmarks/paper_counts.py``.

Prints one table and writes it to ``benchmarks/results/paper_counts.csv`` and ``.md``. The figures are counted on
tensors without memory, the same on every machine.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import densenet_fast
from densenet_fast.benchmarking.networks import bc
from densenet_fast.benchmarking.results import write_csv
from densenet_fast.reference import ARCHITECTURES
from densenet_fast.table import table
from figures import RESULTS

TORCHVISION = "torchvision 0.28, DenseNet*_Weights.IMAGENET1K_V1.meta: num_params, _ops"
OTHERS = (
    "not by the paper's authors: parameters by Lucid, documentation of lucid.models.densenet_264; multiply-adds by "
    "PaddleClas, docs/zh_CN/models/DPN_DenseNet.md, 11.540 GFLOPS at two a multiply-add, which counts more than "
    "convolutions (its DenseNet-121 has 5.690)"
)
AUTHORS = "github.com/liuzhuang13/DenseNet, README (the paper's Table 2)"


class Published(NamedTuple):
    """Counts in millions and in thousands of millions, as printed; None where nobody printed one."""

    parameters: str
    products: str | None
    source: str


IMAGENET = {
    "densenet121": Published("7.978856", "2.834", TORCHVISION),
    "densenet169": Published("14.149480", "3.36", TORCHVISION),
    "densenet201": Published("20.013928", "4.291", TORCHVISION),
    "densenet161": Published("28.681000", "7.728", TORCHVISION),
    "densenet264": Published("33.337704", "5.770", OTHERS),
}
"""Table 1, at 224x224; its first version has DenseNet-161 (k = 48), the later ones DenseNet-264."""


def plain(depth: int, k: int) -> dict[str, Any]:
    """The paper's DenseNet for CIFAR without bottlenecks and compression."""
    sizes = {"growth_rate": k, "block_config": ((depth - 4) // 3,) * 3, "num_init_features": 16}
    return {**sizes, "bn_size": None, "compression": 1.0, "num_classes": 10, "small_inputs": True}


CIFAR = {
    "DenseNet (L = 40, k = 12)": (plain(40, 12), Published("1.0", None, AUTHORS)),
    "DenseNet (L = 100, k = 12)": (plain(100, 12), Published("7.0", None, AUTHORS)),
    "DenseNet (L = 100, k = 24)": (plain(100, 24), Published("27.2", None, AUTHORS)),
    "DenseNet-BC (L = 100, k = 12)": (bc(100, 12), Published("0.8", None, AUTHORS)),
    "DenseNet-BC (L = 250, k = 24)": (bc(250, 24), Published("15.3", None, AUTHORS)),
    "DenseNet-BC (L = 190, k = 40)": (bc(190, 40), Published("25.6", None, AUTHORS)),
}


def count(arguments: dict[str, Any], size: int) -> tuple[int, int]:
    """Parameters of ``densenet_fast.DenseNet(**arguments)``, and multiply-adds of its convolutions and its classifier
    for one image, by their definition."""
    products = 0

    def hook(module: nn.Conv2d | nn.Linear, inputs: Any, output: Tensor) -> None:
        nonlocal products
        products += output.numel() * module.weight[0].numel()

    with torch.device("meta"), torch.no_grad():
        model = densenet_fast.DenseNet(**arguments).eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(hook)  # which also makes every layer run by itself
        model(torch.empty(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), products


def agrees(counted: float, published: str) -> bool:
    """Whether ``counted`` is ``published`` to within one of its last digit."""
    digits = len(published.partition(".")[2])
    return abs(counted - float(published)) <= 10.0**-digits * 1.001


def rows() -> list[dict[str, Any]]:
    """One a network."""
    networks = [(name, ARCHITECTURES[name]._asdict(), 224, published) for name, published in IMAGENET.items()]
    networks += [(name, arguments, 32, published) for name, (arguments, published) in CIFAR.items()]
    result = []
    for name, arguments, size, published in networks:
        parameters, products = count(arguments, size)
        result.append(
            {
                "network": name,
                "size": size,
                "parameters": parameters,
                "published parameters, M": published.parameters,
                "multiply-adds": products,
                "published multiply-adds, G": published.products or "",
                "source": published.source,
            }
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files")
    out = parser.parse_args().out
    counted = rows()
    sources = list(dict.fromkeys(row["source"] for row in counted))
    header = ("network", "image", "parameters, M", "published", "multiply-adds, G", "published", "source")
    cells = [
        (
            row["network"],
            f"{row['size']}x{row['size']}",
            f"{row['parameters'] / 1e6:.3f}",
            row["published parameters, M"],
            f"{row['multiply-adds'] / 1e9:.3f}",
            row["published multiply-adds, G"] or "-",
            f"[{sources.index(row['source']) + 1}]",
        )
        for row in counted
    ]
    notes = "\n".join(f"[{i}] {source}" + "  " for i, source in enumerate(sources, start=1))
    text = f"{table(header, cells)}\n\n{notes}"
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "paper_counts.csv", counted)
    (out / "paper_counts.md").write_text(
        f"# The paper's networks, counted\n\n`python benchmarks/paper_counts.py`\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
