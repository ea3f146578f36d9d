"""What the dense blocks of each network keep for the backward pass: ``python benchmarks/saved_memory.py``.

Prints one table and writes it to ``benchmarks/results/saved_memory.csv`` and ``.png``. The figures are counted, not
timed: they are the same on every machine.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import densenet_fast
from densenet_fast import reference
from densenet_fast.benchmarking.results import write_csv
from densenet_fast.memory import MIB
from densenet_fast.progress import progress
from densenet_fast.table import table
from figures import RESULTS
from pictures import grouped_bars

IMPLEMENTATIONS = {
    "reference": ("stock", lambda name: getattr(reference, name)()),
    "ours": ("densenet_fast", lambda name: getattr(densenet_fast, name)()),
    "ours-me": (
        "densenet_fast, memory_efficient",
        lambda name: getattr(densenet_fast, name)(memory_efficient=True),
    ),
}
"""By competitor: what the table calls it, and what makes a network of a name."""


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of CSV and PNG")
    options = parser.parse_args()
    x, rows, pictured = torch.randn(2, 3, options.size, options.size), [], {who: [] for who in IMPLEMENTATIONS}
    for network in progress(reference.ARCHITECTURES, "networks"):
        kept = {who: saved_bytes(make(network), x) / len(x) for who, (_, make) in IMPLEMENTATIONS.items()}
        for who, (label, _) in IMPLEMENTATIONS.items():
            mib, ratio = kept[who] / MIB, kept[who] / kept["reference"]
            rows.append({"model": network, "blocks": label, "MiB per image": mib, "ratio": ratio})
            pictured[who].append(mib)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "saved_memory.csv", rows)
    title, unit = "What dense blocks keep for the backward pass", "MiB per image"
    grouped_bars(options.out / "saved_memory.png", title, unit, list(reference.ARCHITECTURES), pictured)
    cells = [(r["model"], r["blocks"], f"{r['MiB per image']:.1f}", f"{r['ratio']:.3f}") for r in rows]
    print(table(list(rows[0]), cells))


if __name__ == "__main__":
    main()
