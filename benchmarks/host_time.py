"""What a training step costs the host on the path for GPUs, without a GPU: ``python benchmarks/host_time.py``.

A driver that launches nothing stands in for CUDA's, and CPU tensors stand in for a GPU's. Python, dispatch, Triton's
launcher and replays run as they do on a GPU. What torch itself computes would take the CPU longer than all else, so it
is made small: images are of 32x32, the first convolution has a kernel of size 1, and there is one class. A convolution
in bfloat16 for which the CPU has no instructions only allocates its results. The stock layers run in contiguous
float32, in which the CPU is faster, and their arithmetic is counted with their host time.

Times are medians. They are also given as a multiple of the time of ``x + y`` on 64 floats, measured after each step;
that makes machines comparable. Needs nvcc and a C compiler.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

WITHOUT_LAUNCH = {
    *("as_strided", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resolve_conj"),
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "slice", "select", "unbind", "narrow", "transpose", "t"),
    *("movedim", "permute", "flatten", "expand", "detach", "alias", "unsqueeze", "set_", "view_as", "contiguous", "to"),
    *(
        "squeeze",
        "split",
        "expand_as",
        "resolve_neg",
        "result_type",
        "_nnpack_available",
        "is_same_size",
        "split_with_sizes",
    ),
}
"""Operations that launch nothing, but through others."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="densenet121", help="one of densenet_fast's models")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=32, help="height and width of the images")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="what Python spends the planned step on")
    return parser.parse_args()


class Times(NamedTuple):
    """Milliseconds, medians: forward, backward, and of ``x + y`` on 64 floats."""

    forward: float
    backward: float
    addition: float


def addition() -> float:
    """Milliseconds that ``x + y`` takes on 64 floats."""
    x, y = torch.randn(2, 64).unbind()
    start = time.perf_counter()
    for _ in range(300):
        x + y
    return 1e3 * (time.perf_counter() - start) / 300


@contextmanager
def convolutions_without_arithmetic() -> Iterator[None]:
    """Torch's own convolution on the CPU allocates its results and computes nothing. oneDNN's stays as it was."""

    def forward(
        x: torch.Tensor, weight: torch.Tensor, kernel: list[int], bias: None, stride: list[int], *_: Any
    ) -> Any:
        height, width = (-(-size // step) for size, step in zip(x.shape[2:], stride))  # of a kernel of size 1
        made = x.new_empty(x.shape[0], height, width, weight.shape[0])
        return made.permute(0, 3, 1, 2)

    def backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(t) if need else None for t, need in zip((x, weight, grad), rest[-1]))

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("_slow_conv2d_forward", forward, "CPU")
        library.impl("_slow_conv2d_backward.output_mask", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


class Step:
    """A training step of a network from ``make``, forward and backward timed apart.

    Ours is channels last and under autocast; ``stock`` is neither.
    """

    def __init__(self, make: Callable[..., nn.Module], options: argparse.Namespace, stock: bool = False) -> None:
        model, memory_format = make(num_classes=1), torch.contiguous_format if stock else torch.channels_last
        model.features.conv0 = nn.Conv2d(3, model.features.conv0.out_channels, 1, 2, bias=False)
        self.model = model.to(memory_format=memory_format).train()
        self.x = torch.randn(options.batch, 3, options.size, options.size).to(memory_format=memory_format)
        self.autocast = not stock

    def forward(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(self.x).sum()

    def times(self, repeats: int, after: Callable[[], object] = lambda: None) -> Times:
        """The medians of ``repeats`` steps. ``after`` is called after each of them and not timed."""
        forward, backward, additions = [], [], []
        for _ in range(repeats):
            start = time.perf_counter()
            loss = self.forward()
            between = time.perf_counter()
            loss.backward()
            end = time.perf_counter()
            forward.append(1e3 * (between - start))
            backward.append(1e3 * (end - between))
            additions.append(addition())
            self.model.zero_grad()
            after()
        return Times(*map(statistics.median, (forward, backward, additions)))

    def operations(self) -> int:
        """Operations of torch in a step that launch something on a GPU."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.forward().backward()
        self.model.zero_grad()
        events = [e for e in profile.events() if e.name.startswith("aten::")]
        return sum(map(_launches, events))


class Around(nn.Module):
    """What torch computes in a step of a DenseNet: the first convolution and the classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(OrderedDict(conv0=nn.Conv2d(3, 64, 7)))
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x)[:, :, 0, 0])


def _launches(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    """Whether an operation launches by itself. The innermost ones do, and those on many tensors at once."""
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("aten::_foreach"):
            return False
        parent = parent.cpu_parent
    if event.name.startswith("aten::_foreach"):
        return True
    inner = [e for e in event.cpu_children if e.name.startswith("aten::")]
    return event.name.removeprefix("aten::") not in WITHOUT_LAUNCH and not any(map(_launches, inner))


@contextmanager
def walked() -> Iterator[None]:
    """Without plans."""
    from densenet_fast.ops import planned

    before, planned.DEVICE = planned.DEVICE, "none"
    try:
        yield
    finally:
        planned.DEVICE = before


@contextmanager
def written_down() -> Iterator[list[int]]:
    """Writes down the kernels in CUDA C++ that a walk launches, instead of running them. Yields a list that will hold
    their number."""
    kernels, found = torch.ops.densenet_fast, []
    kernels.cuda_start_recording()
    try:
        yield found
    finally:
        found.append(len(kernels.cuda_stop_recording()[0]))


def measure(options: argparse.Namespace) -> None:
    """In the process that has the stub."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import densenet_fast
    from backends.plan import stub
    from densenet_fast import reference

    images = f"batch {options.batch}, {options.size}x{options.size}, bfloat16 autocast"
    print(f"{options.model}, {images}; torch {torch.__version__}\n")
    print(f"{'step':20} launches  forward, ms  backward, ms  both, ms  x + y, us  both, of x + y  us a launch")

    def report(name: str, launches: int, measured: Times) -> None:
        forward, backward, unit = measured
        both = forward + backward
        times = f"{forward:12.2f} {backward:13.2f} {both:9.2f} {1e3 * unit:10.2f} {both / unit:15.0f}"
        print(f"{name:20} {launches:8} {times} {1e3 * both / launches:12.2f}", flush=True)

    with stub.as_gpu(90), convolutions_without_arithmetic():
        step = Step(getattr(densenet_fast, options.model), options)
        step.times(3)
        stub.launched()
        with written_down() as native:
            operations = step.operations()
        report("ours, planned", len(stub.launched()) + native[0] + operations, timed(step, options.repeats))
        around = Step(Around, options)
        around.times(3)
        report("  of torch around it", operations, around.times(options.repeats))
        if options.profile:
            profiled(step)
        with walked():
            with written_down():
                step.times(2)
            stub.launched()
            with written_down() as native:
                operations = step.operations()
            report("ours, walked", len(stub.launched()) + native[0] + operations, timed(step, options.repeats))
    stock = Step(getattr(reference, options.model), options, stock=True)
    stock.times(2)
    report("stock layers", stock.operations(), stock.times(options.repeats))


def timed(step: Step, repeats: int) -> Times:
    from backends.plan import stub

    kernels = torch.ops.densenet_fast

    def forget() -> None:
        stub.driver().stub_clear(), kernels.cuda_stop_recording(), kernels.cuda_start_recording()

    with written_down():
        return step.times(repeats, forget)


def profiled(step: Step) -> None:
    import cProfile
    import pstats

    with written_down(), cProfile.Profile() as profile:
        step.times(10)
    pstats.Stats(profile).sort_stats("tottime").print_stats(40)


def main() -> None:
    options = arguments()
    if "DENSENET_FAST_LIBCUDA" in os.environ:
        return measure(options)
    from backends.plan import stub

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **stub.environment(Path(folder))}
        raise SystemExit(subprocess.run([sys.executable, "-X", "faulthandler", *sys.argv], env=environment).returncode)


if __name__ == "__main__":
    main()
