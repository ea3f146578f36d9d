"""The largest batch of each DenseNet that fits a memory budget: ``python benchmarks/largest_batch.py --budget 2``.

A training step at 224x224 in channels_last, without the optimizer; parameters, gradients and buffers count, the
libraries do not. On a CPU memory is the peak resident set, measured; the batch is predicted from two small ones, then
run and corrected until it is the largest (``densenet_fast/benchmarking/largest.py``).
"""

from densenet_fast.benchmarking.competitors import COMPETITORS, available
from densenet_fast.benchmarking.largest import largest_batch
from densenet_fast.benchmarking.memory import Job
from densenet_fast.benchmarking.plots import grouped_bars
from densenet_fast.benchmarking.progress import progress
from densenet_fast.benchmarking.steps import DTYPES
from densenet_fast.reference import ARCHITECTURES
from densenet_fast.table import table
from figures import GIB, Figure, parser_of

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
    rows = []
    for network in progress(options.models, "networks"):
        for name in available(options.against, network)[0]:
            job = Job(
                name,
                "channels_last",
                network,
                1,
                options.size,
                options.dtype,
                True,
                str(options.device),
                options.threads,
            )
            found = largest_batch(job, options.budget * GIB)
            rows.append(
                {
                    "network": network,
                    "competitor": name,
                    "size": options.size,
                    "dtype": options.dtype,
                    "budget_gib": options.budget,
                    "batch": found.batch,
                    "measured_gib": found.bytes / GIB,
                    "mib_per_image": found.per_image / (1 << 20),
                    "failure": found.failure,
                }
            )
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    cells = {(row["network"], row["competitor"]): row["failure"] or row["batch"] for row in rows}
    header = ["images", *options.models]
    lines = [
        (COMPETITORS[name].label, *(cells.get((network, name), "-") for network in options.models)) for name in names
    ]
    title = f"Largest batch within {options.budget:g} GiB, training, {options.size}x{options.size}, {options.dtype}"
    figure.write(title, rows, table(header, lines))
    values = {name: [float(cells.get((network, name)) or 0) for network in options.models] for name in names}
    grouped_bars(figure.path("png"), f"{title}\n{figure.device}", "images", options.models, values)


if __name__ == "__main__":
    main()
