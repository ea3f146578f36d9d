"""``python -m on_gpu.tuning FOLDER SETTINGS KERNEL,KERNEL``: tries each configuration that ``tune`` has for kernels.

All are compiled on all cores first. A row a configuration goes to FOLDER as soon as it is measured; last comes the
best, written as the table has it.
"""

import csv
import sys
from functools import partial
from pathlib import Path

import torch

from densenet_fast.backends.triton import config, launch, tune
from densenet_fast.benchmarking.ceilings import median_seconds
from on_gpu.choices import LIMIT, difference, launches
from on_gpu.settings import SETTINGS, Settings
from on_gpu.warm_up import compile_ahead

COLUMNS = ("kernel", "tile", "seconds", "error", "line")


def main(folder: str, name: str, kernels: str) -> None:
    """Tunes each kernel."""
    settings = SETTINGS[name]
    settings.stand_in()
    path = Path(folder, "tuning.csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for kernel in kernels.split(","):
            tuned(kernel, settings, writer)


def tuned(kernel: str, settings: Settings, writer: csv.DictWriter) -> None:
    """Measures each configuration of the kernel; one that fails, or that computes something else, is left out."""
    device, dtype = torch.device(settings.device), tune.DTYPES[settings.dtypes[0]][0]
    target = config.device_of(device)
    now = config.tile(kernel, target, dtype, LIMIT)
    tiles = list(dict.fromkeys([now, *tune.candidates(kernel, LIMIT)]))[: settings.compiled]
    with config.assume(target):
        planned = [item for tile in tiles for item in launches(kernel, settings, tile, torch.device("meta"))]
    compile_ahead(planned, settings)
    table, found = launches(kernel, settings, now, device), {}
    for tile in tiles:
        row = {"kernel": kernel, "tile": tuple(tile)}
        try:
            items = launches(kernel, settings, tile, device)
            row["error"] = max(map(difference, table, items))
            row["seconds"] = sum(median_seconds(partial(launch.run, i), device, settings.repeats) for i in items)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
        writer.writerow(row)
        if "seconds" in row and row["error"] <= torch.finfo(dtype).eps:
            found[tile] = row["seconds"]
    if now not in found:
        raise RuntimeError(f"{kernel}: the table's {now} does not run")
    best = min(found, key=found.__getitem__)
    line = f"{kernel}: Tile{tuple(best)} {1e6 * found[best]:.1f} us, the table's {1e6 * found[now]:.1f} us"
    writer.writerow({"kernel": kernel, "line": line})


if __name__ == "__main__":
    main(*sys.argv[1:])
