"""A training step's launches, what each moves and multiplies, and the least time that takes on a GPU: by a model.

python benchmarks/step_model.py                                    DenseNet-121, 128 images of 224x224, bf16, an H200
python benchmarks/step_model.py --network densenet_bc100 --size 32 --gpu rtx3090
python benchmarks/step_model.py --triton                           with Triton's 3x3 kernels in place of CUDA C++'s

No GPU is needed: launches are planned, and counted by their own shapes and tiles. Where there is one, the step also
runs and its kernels' times stand beside the model's. The model is the sum over launches of the slowest of memory, L2
cache and products, and a start; its figures and where they are from are printed with it. Where the arguments are those
of a run on an H200 whose kernels' times are in benchmarks/results, these stand beside the model as well.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from densenet_fast.backends.triton.tune import DTYPES
from densenet_fast.benchmarking.competitors import Entry
from densenet_fast.benchmarking.networks import KNOWN, architecture
from densenet_fast.benchmarking.steps import step
from densenet_fast.table import table
from launches.audit import audited
from launches.kernel_times import Time, by_function, measure, read_page
from launches.roofline import GPUS, Row, assumptions, by_kernel, model_table
from launches.step_plan import counted_step, meta_network, torch_counts

RUN = Path(__file__).parent / "results/nvidia_h200/run_3/kernels.txt"
"""Of the step that RUN_ARGUMENTS say, and of a batch that the page says."""
RUN_ARGUMENTS = {"network": "densenet121", "size": 224, "dtype": "bf16", "gpu": "h200", "memory_efficient": False}
TORCH = "torch's own"


def model(options: argparse.Namespace, native: bool) -> tuple[list[Row], str]:
    """The model's rows, and what the blocks move by their floor."""
    dtype, gpu, arguments = DTYPES[options.dtype][0], GPUS[options.gpu], architecture(options.network)
    network = meta_network(arguments, dtype, options.memory_efficient)
    counts = counted_step(network, options.batch, options.size, dtype, gpu.device, native)
    of_step = (arguments, options.batch, options.size, dtype.itemsize)
    audit = audited(counts, *of_step, options.memory_efficient)
    return by_kernel([*counts, *torch_counts(*of_step, gpu.device.generation)], gpu, dtype), str(audit)


def beside(rows: Sequence[Row], measured: dict[str, Time], label: str) -> str:
    """The model beside what was measured, by the backends' functions; all that is not ours in one line."""
    ours = {row.counts.kernel: Time(row.seconds, row.counts.launches) for row in rows}
    named = {kernel: time for kernel, time in ours.items() if not kernel.startswith("torch: ")}
    model, others = by_function(named), {k: t for k, t in ours.items() if k not in named}
    found = by_function(measured)
    rest = {function: time for function, time in found.items() if function not in model}
    lines = [(function, time, found.get(function, Time())) for function, time in model.items()]
    lines.append((TORCH, added(others), added(rest)))
    lines.append(("total", added(ours), added(found)))
    cells = [
        (
            name,
            f"{a.launches:.0f}",
            f"{b.launches:.0f}",
            f"{1e3 * a.seconds:.3f}",
            f"{1e3 * b.seconds:.3f}",
            ratio(a, b),
        )
        for name, a, b in sorted(lines[:-2], key=lambda line: -line[2].seconds) + lines[-2:]
    ]
    return table(("function", "launches", label, "model ms", f"{label}, ms", "model by it"), cells)


def mixed(rows: Sequence[Row], measured: dict[str, Time]) -> float:
    """Seconds of a step: the model's of the 3x3 kernels, all else as measured."""
    found = added({function: time for function, time in measured.items() if "conv3x3" not in function})
    return found.seconds + sum(row.seconds for row in rows if "conv3x3" in row.counts.kernel)


def added(times: dict[str, Time]) -> Time:
    """All of them."""
    return Time(sum(time.seconds for time in times.values()), sum(time.launches for time in times.values()))


def ratio(a: Time, b: Time) -> str:
    return f"{a.seconds / b.seconds:.2f}" if b.seconds else "-"


def on_this_gpu(options: argparse.Namespace) -> dict[str, Time]:
    """The kernels' times of the step on the GPU that is here."""
    device, dtype = torch.device("cuda"), DTYPES[options.dtype][0]
    entry = Entry("ours-me" if options.memory_efficient else "ours", "channels_last", options.network)
    network, images = entry.model(device, True), entry.images(options.batch, options.size, device)
    parameters = list(network.parameters())
    return measure(lambda: step(network, images, dtype, True, parameters), device)


def same_as_run(options: argparse.Namespace) -> bool:
    """Whether the arguments are those of the committed run, where its page is there."""
    return RUN.exists() and all(getattr(options, name) == value for name, value in RUN_ARGUMENTS.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="densenet121", help=f"{KNOWN} (densenet121)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "tf32"), default="bf16")
    parser.add_argument("--gpu", choices=GPUS, default="h200", help="what the model assumes (h200)")
    parser.add_argument("--memory-efficient", action="store_true")
    parser.add_argument("--triton", action="store_true", help="Triton's 3x3 kernels, not those in CUDA C++")
    options = parser.parse_args(arguments)
    torch.backends.cudnn.conv.fp32_precision = DTYPES[options.dtype][1]
    rows, audit = model(options, not options.triton)
    print(f"{options.network}, {options.batch} images of {options.size}x{options.size}, {options.dtype}, by a model:\n")
    print(f"{model_table(rows)}\n\n{audit}\n\n{options.gpu}:\n\n{assumptions(GPUS[options.gpu])}")
    if torch.cuda.is_available():
        print(f"\nOn {torch.cuda.get_device_name()}:\n\n{beside(rows, on_this_gpu(options), 'measured here')}")
    if same_as_run(options):
        batch, measured = read_page(RUN)
        if batch == options.batch:
            print(
                "\nWith Triton's 3x3 kernels, as a run had them; some tiles of the configuration have changed since:\n"
            )
            print(beside(model(options, False)[0], measured, "measured on an H200"))
            if not options.triton:
                print(f"\nThe 3x3 kernels by the model, all else as measured: {1e3 * mixed(rows, measured):.2f} ms.")


if __name__ == "__main__":
    main()
