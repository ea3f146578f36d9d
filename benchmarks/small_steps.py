"""Training steps of small images on a CPU, and what stands in them between the kernels: ``python
benchmarks/small_steps.py``.

Times are of steps in turns, in one process, of the faster memory layout of each. The steps of this package are then
taken apart, in a second run:

- *kernels* is the time inside its C++ ops, with what it takes to hand them their arguments;
- *torch's own* is a step whose convolutional part is one node of autograd that returns as many gradients, made before:
  the classifier, the loss, and autograd's work on each parameter;
- *Python* is what is left of the step, this package's and torch's bindings'.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from densenet_fast.benchmarking.competitors import LAYOUTS, Entry
from densenet_fast.benchmarking.steps import enqueue
from densenet_fast.benchmarking.times import Timing, measure_times
from densenet_fast.table import table
from figures import Figure, parser_of

WORKLOADS = [("densenet121", 4, 64), ("densenet_bc100", 64, 32)]
"""Networks, batches, heights and widths."""
STEPS = 200
"""How many are taken apart."""
SECONDS = 40
"""How long a network's steps are measured at most, and taken apart at most."""
HEADER = ("images", "torchvision ms", "ours ms", "speed", "kernels ms", "torch's own ms", "Python ms", "Python, share")


def main() -> None:
    parser = parser_of("small_steps", __doc__)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    figure, rows, lines = Figure("small_steps", options), [], []
    for network, batch, size in WORKLOADS:
        entries = [Entry(name, layout, network) for name in ("torchvision", "ours") for layout in LAYOUTS]
        turns = [(entry, batch) for entry in entries]
        until = time.perf_counter() + SECONDS
        timings = measure_times(turns, size, torch.float32, True, options.device, options.repeats, until)
        theirs, ours = (min(timings[i : i + 2], key=_median) for i in (0, 2))
        row: dict[str, Any] = {"network": network, "batch": batch, "size": size}
        row |= {"torchvision_s": _median(theirs), "ours_s": _median(ours)}
        row |= {"speed_ratio": _median(theirs) / _median(ours)} | taken_apart(ours, size, options.device)
        rows.append(row)
        lines.append(
            (
                f"{network}, {batch} of {size}x{size}",
                *(f"{1e3 * row[key]:.1f}" for key in ("torchvision_s", "ours_s")),
                f"{row['speed_ratio']:.2f}x",
                *(f"{1e3 * row[key]:.2f}" for key in ("kernels_s", "torch_s", "python_s")),
                f"{100 * row['python_share']:.1f} %",
            )
        )
    figure.write("Training steps of small images", rows, table(HEADER, lines))


def _median(timing: Timing) -> float:
    return timing.quantile(0.5)


def taken_apart(timing: Timing, size: int, device: torch.device) -> dict[str, float]:
    """Medians, in seconds, of a step's parts; and the share of Python in a step."""
    model, images = timing.entry.model(device, True), timing.entry.images(timing.batch, size, device)
    parameters = [*model.parameters()]
    body = [p for name, p in model.named_parameters() if not name.startswith("classifier")]
    means = torch.randn(timing.batch, model.classifier.in_features)
    made: list[Tensor] = []

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *_: Tensor) -> Tensor:
            return means.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
            gradients = (*made,)
            made.clear()
            return gradients

    def seconds(run: Callable[[Tensor], Tensor]) -> float:
        start = time.perf_counter()
        enqueue(run, images, torch.float32, True)
        return time.perf_counter() - start

    whole, inside, torchs = [], [], []
    with ops_timed() as spent:
        end = time.perf_counter() + SECONDS
        while len(whole) < STEPS and time.perf_counter() < end:
            spent.clear()
            whole.append(seconds(model))
            inside.append(sum(spent))
            drop(parameters)
            made.extend(map(torch.empty_like, body))
            torchs.append(seconds(lambda _: model.classifier(Made.apply(*body))))
            drop(parameters)
    python = median(w - i - t for w, i, t in zip(whole, inside, torchs))
    parts = {"kernels_s": median(inside), "torch_s": median(torchs), "python_s": python}
    return parts | {"python_share": python / median(whole)}


def drop(parameters: list[nn.Parameter]) -> None:
    """Drops their gradients."""
    for parameter in parameters:
        parameter.grad = None


@contextmanager
def ops_timed() -> Iterator[list[float]]:
    """A context in which the seconds of every call of a C++ op on CPUs are appended to a list."""
    ops, spent = torch.ops.densenet_fast, []

    def timed(op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            start = time.perf_counter()
            made = op(*args)
            spent.append(time.perf_counter() - start)
            return made

        return run

    own = {name: op for name, op in vars(ops).items() if name.startswith("cpu_")}
    for name, op in own.items():
        setattr(ops, name, timed(op))
    try:
        yield spent
    finally:
        for name, op in own.items():
            setattr(ops, name, op)


if __name__ == "__main__":
    main()
