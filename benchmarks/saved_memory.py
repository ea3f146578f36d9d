"""What the dense blocks of each network keep for the backward pass: ``python benchmarks/saved_memory.py``.

Prints one table and writes it to ``benchmarks/results/saved_memory.csv`` and ``.png``. The figures are counted, not
timed: they are the same on every machine.
"""

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import densenet_fast
from densenet_fast import reference
from densenet_fast.table import table

IMPLEMENTATIONS = {
    "stock": lambda name: getattr(reference, name)(),
    "densenet_fast": lambda name: getattr(densenet_fast, name)(),
    "densenet_fast, memory_efficient": lambda name: getattr(densenet_fast, name)(memory_efficient=True),
}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the unique storages that the dense blocks of ``model`` save in a training step's forward pass on ``x``,
    beyond parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    inside, kept = [], []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if inside and storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(t)  # no freed address may be counted as an earlier storage
        return t

    blocks = [module for module in model.modules() if isinstance(module, reference.DenseBlock)]
    handles = [block.register_forward_pre_hook(lambda *_: inside.append(True)) for block in blocks]
    handles += [block.register_forward_hook(lambda *_: inside.clear()) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    for handle in handles:
        handle.remove()
    return sum(storages.values())


def plot(rows: list[dict], path: Path) -> None:
    """Bars in MiB per image, one group a network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted({row["model"] for row in rows})
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    colours = dict(zip(IMPLEMENTATIONS, ("#bbbbbb", "#0072b2", "#1a1a1a")))
    for i, (implementation, colour) in enumerate(colours.items()):
        values = [r["MiB per image"] for n in names for r in rows if (r["model"], r["blocks"]) == (n, implementation)]
        bars = axes.bar([j + (i - 1) * 0.27 for j in range(len(names))], values, 0.25, color=colour)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
        axes.annotate(implementation, (0.01, 0.95 - 0.08 * i), xycoords="axes fraction", color=colour, weight="bold")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(top=1.4 * max(row["MiB per image"] for row in rows))
    axes.set_ylabel("kept for the backward pass (MiB per image)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of CSV and PNG")
    arguments = parser.parse_args()
    x = torch.randn(2, 3, arguments.size, arguments.size)
    rows = []
    for name in tqdm(reference.ARCHITECTURES, unit="network"):
        kept = {key: saved_bytes(make(name), x) / len(x) for key, make in IMPLEMENTATIONS.items()}
        for key, value in kept.items():
            ratio = value / kept["stock"]
            rows.append({"model": name, "blocks": key, "MiB per image": value / 2**20, "ratio": ratio})
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open(arguments.out / "saved_memory.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, arguments.out / "saved_memory.png")
    cells = [(r["model"], r["blocks"], f"{r['MiB per image']:.1f}", f"{r['ratio']:.3f}") for r in rows]
    print(table(list(rows[0]), cells))


if __name__ == "__main__":
    main()
