"""``python -m on_gpu.tuning FOLDER SETTINGS KERNEL,KERNEL``: tries each configuration that ``tune`` has for kernels.

All are compiled on all cores first. A row a configuration goes to FOLDER as soon as it is measured; last comes the
best, written as the table has it.
"""

import csv
import sys
from pathlib import Path

from densenet_fast.backends.triton import tune
from on_gpu.choices import LIMIT, Bench
from on_gpu.machine_code import fault_of
from on_gpu.settings import SETTINGS, Settings
from on_gpu.warm_up import in_parallel

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
    """Measures each configuration of the kernel; one that fails, is wrong, or whose machine code is, is left out."""
    bench, found = Bench(kernel, settings), {}
    tiles = list(dict.fromkeys([bench.now, *tune.candidates(kernel, LIMIT)]))[: settings.compiled]
    planned = {tile: bench.planned(tile) for tile in tiles}
    read = in_parallel(fault_of, [item for items in planned.values() for item in items], settings)
    for tile, items in planned.items():
        row = {"kernel": kernel, "tile": tuple(tile)}
        try:
            faults = [read[item.variant].fault for item in items if item.variant in read]
            row["error"] = bench.fault(tile) or next(filter(None, faults), None)
            row["seconds"] = bench.seconds(tile)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
        writer.writerow(row)
        if not row["error"]:
            found[tile] = row["seconds"]
    if bench.now not in found:
        raise RuntimeError(f"{kernel}: the table's {bench.now} does not run")
    best = min(found, key=found.__getitem__)
    line = f"{kernel}: Tile{tuple(best)} {1e6 * found[best]:.1f} us, the table's {1e6 * found[bench.now]:.1f} us"
    writer.writerow({"kernel": kernel, "line": line})


if __name__ == "__main__":
    main(*sys.argv[1:])
