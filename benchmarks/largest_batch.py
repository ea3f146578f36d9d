"""The largest batch of each DenseNet that fits a memory budget: ``python benchmarks/largest_batch.py --budget 2``.

Measured is a training step at 224x224 in channels_last, without the optimizer. Parameters, gradients and buffers count,
the libraries do not. On a CPU memory is the peak resident set. Every batch given here ran within the budget. With one
image more it did not, or would not by what each image adds (``densenet_fast/benchmarking/largest.py``). Files are
written after every network.
"""

import argparse
from typing import Any

from densenet_fast.benchmarking.competitors import COMPETITORS, Entry, available
from densenet_fast.benchmarking.largest import largest_batch
from densenet_fast.benchmarking.memory import Job
from densenet_fast.benchmarking.steps import DTYPES
from densenet_fast.memory import GIB, MIB
from densenet_fast.progress import progress
from densenet_fast.reference import ARCHITECTURES
from densenet_fast.table import table
from figures import Figure, parser_of
from pictures import grouped_bars

EAGER = [name for name, competitor in COMPETITORS.items() if not competitor.compiled]
DEFAULT = [name for name in EAGER if name != "reference"]


def main() -> None:
    parser = parser_of("largest_batch", __doc__)
    parser.add_argument("--budget", type=float, default=2, metavar="GIB", help="(2)")
    parser.add_argument("--models", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--against", nargs="+", choices=EAGER, default=DEFAULT, help=" ".join(DEFAULT))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    options = parser.parse_args()
    figure = Figure("largest_batch", options)
    rows: list[dict[str, Any]] = []
    for network in progress(options.models, "networks"):
        names = available(options.against, network, True, DTYPES[options.dtype], options.device)[0]
        for name in progress(names, network):
            job = Job.of(Entry(name, "channels_last", network), 1, options.size, options)
            found = largest_batch(job, options.budget * GIB)
            rows.append(
                {
                    "network": network,
                    "competitor": name,
                    "size": options.size,
                    "dtype": options.dtype,
                    "budget_gib": options.budget,
                    "batch": None if found.failure else found.batch,
                    "gib": found.bytes / GIB,
                    "gib_of_next": found.bytes_of_next / GIB,
                    "mib_per_image": found.per_image / MIB,
                    "failure": found.failure,
                }
            )
        write(figure, options, rows)


def write(figure: Figure, options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The files, of the networks measured so far."""
    networks, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("network", "competitor"))
    found = {(row["network"], row["competitor"]): row for row in rows}

    def cell(network: str, name: str) -> object:
        row = found.get((network, name))
        return "-" if row is None else row["failure"] or row["batch"]

    lines = [(COMPETITORS[name].label, *(cell(network, name) for network in networks)) for name in names]
    title = f"Largest batch within {options.budget:g} GiB, training, {options.size}x{options.size}, {options.dtype}"
    figure.write(title, rows, table(["images", *networks], lines))
    values = {name: [found.get((network, name), {}).get("batch") for network in networks] for name in names}
    grouped_bars(figure.path("png"), f"{title}\n{figure.device}", "images a step", networks, values)


if __name__ == "__main__":
    main()
