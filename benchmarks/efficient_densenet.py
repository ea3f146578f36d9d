"""The row of efficient_densenet_pytorch's README, as ratios: ``python benchmarks/efficient_densenet.py``.

DenseNet-BC-100 (k = 12), batches of 64, images of 32x32. Published (github.com/gpleiss/efficient_densenet_pytorch, on
an NVIDIA Pascal Titan X): 2.863 GB and 0.165 s a step for the naive implementation, 1.605 GB and 0.207 s for the
efficient one, which shares storage and recomputes. Figures are divided by those of the naive implementation. Measured
here, the naive one is torchvision's in its faster layout. The efficient one is torchvision's with
memory_efficient=True.
"""

from typing import Any

from densenet_fast.benchmarking.competitors import COMPETITORS, LAYOUTS, Entry, available
from densenet_fast.benchmarking.memory import Job, measure_all
from densenet_fast.benchmarking.results import bench_rows, best_rows
from densenet_fast.benchmarking.steps import DTYPES, agree
from densenet_fast.benchmarking.times import measure_times
from densenet_fast.memory import MIB
from densenet_fast.table import table
from figures import Figure, parser_of
from pictures import ratio_bars

NETWORK, BATCH, SIZE = "densenet_bc100", 64, 32
WHO = ("torchvision", "torchvision-me", "ours", "ours-me")
PUBLISHED = {"naive": (2.863, 0.165), "efficient": (1.605, 0.207)}
"""GB and seconds."""


def main() -> None:
    parser = parser_of("efficient_densenet", __doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps after warming up (5)")
    options = parser.parse_args()
    figure = Figure("efficient_densenet", options)
    names, _ = available(WHO, NETWORK, True, DTYPES[options.dtype], options.device)
    entries = [Entry(name, layout, NETWORK) for name in names for layout in LAYOUTS]
    agree(entries, True, options.device, SIZE)
    turns = [(entry, BATCH) for entry in entries]
    timings = measure_times(turns, SIZE, DTYPES[options.dtype], True, options.device, options.repeats)
    memories = measure_all([Job.of(entry, BATCH, SIZE, options) for entry in entries])
    setting = {"network": NETWORK, "mode": "train", "batches": "given", "size": SIZE, "dtype": options.dtype}
    best = best_rows(bench_rows(timings, memories, setting, names[0], {}))
    rows: list[dict[str, Any]] = []
    for who, (gigabytes, seconds) in PUBLISHED.items():
        memory, time = (value / naive for value, naive in zip((gigabytes, seconds), PUBLISHED["naive"]))
        rows.append({"where": "Titan X, published", "who": who, "memory": gigabytes * 1e9 / MIB, "seconds": seconds})
        rows[-1] |= {"memory_ratio": memory, "time_ratio": time}
    for row in best:
        rows.append({"where": figure.device, "who": COMPETITORS[row["competitor"]].label, "memory": row["peak_mib"]})
        rows[-1] |= {
            "seconds": row["median_s"],
            "memory_ratio": row["memory_ratio"],
            "time_ratio": 1 / row["speed_ratio"],
        }
    header = ("where", "implementation", "MiB", "s", "memory, naive 1", "time, naive 1")
    cells = [
        (
            row["where"],
            row["who"],
            f"{row['memory']:.0f}",
            f"{row['seconds']:.3f}",
            f"{row['memory_ratio']:.2f}",
            f"{row['time_ratio']:.2f}",
        )
        for row in rows
    ]
    title = f"DenseNet-BC-100 (k = 12), training step, {BATCH} images of {SIZE}x{SIZE}, {options.dtype}"
    figure.write(title, rows, table(header, cells))
    labels = [f"{row['who']}\n{row['where']}" for row in rows]
    panels = {"memory, naive = 1": "memory_ratio", "time of a step, naive = 1": "time_ratio"}
    ratio_bars(figure.path("png"), title, labels, {k: [row[v] for row in rows] for k, v in panels.items()})


if __name__ == "__main__":
    main()
