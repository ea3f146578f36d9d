"""Training steps replayed from a CUDA graph, beside eager ones: what the GPU takes without the host. One table.

python benchmarks/cuda_graph.py              on a GPU: DenseNet-121, bfloat16 autocast, channels_last, 224x224
python benchmarks/cuda_graph.py --dry-run    the eager step of a tiny network on the CPU

A step is forward and backward, without the optimizer's. Times are medians; cuDNN's algorithms are its defaults.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from densenet_fast.benchmarking.competitors import Entry
from densenet_fast.benchmarking.conditions import conditions, sentence
from densenet_fast.benchmarking.steps import enqueue
from densenet_fast.table import table

WARM_UPS = 3
"""Steps until all is compiled and planned."""
REPEATS = {"cuda": 15, "cpu": 2}

Row = tuple[str, str, str, str, str]


def measured(competitor: str, batch: int, size: int, network: str, device: torch.device) -> Row:
    """Milliseconds of the eager step, until it is enqueued and until it is done, and of the replayed one."""
    entry = Entry(competitor, "channels_last", network)
    model, images = entry.model(device, True), entry.images(batch, size, device)
    parameters = list(model.parameters())

    def step(first: bool = True) -> None:
        enqueue(model, images, torch.bfloat16, True, parameters if first else ())

    if device.type != "cuda":
        done, enqueued = seconds(step, REPEATS["cpu"], lambda: None)
        return competitor, str(batch), milliseconds(enqueued), milliseconds(done), "-"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    done, enqueued = seconds(step, REPEATS["cuda"], torch.cuda.synchronize)
    for parameter in parameters:
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(first=False)
    graph.replay()
    replayed, _ = seconds(graph.replay, REPEATS["cuda"], torch.cuda.synchronize)
    return competitor, str(batch), milliseconds(enqueued), milliseconds(done), milliseconds(replayed)


def seconds(run: Callable[[], object], repeats: int, wait: Callable[[], object]) -> tuple[float, float]:
    """Until a run is done, and until it is enqueued."""
    done, enqueued = [], []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        run()
        enqueued.append(time.perf_counter() - start)
        wait()
        done.append(time.perf_counter() - start)
    return median(done), median(enqueued)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def main() -> None:
    """Prints a row a competitor and batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="torchvision,ours", help="competitors of bench, with commas between")
    parser.add_argument("--batch", default="32,128,256", help="images, with commas between")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU")
    options = parser.parse_args()
    batches, names = [int(n) for n in options.batch.split(",")], options.against.split(",")
    device, network, size = torch.device("cuda"), "densenet121", 224
    if options.dry_run:
        device, network, size, batches, names = torch.device("cpu"), "densenet_bc10", 32, [2], ["reference", "ours"]
    rows = [measured(name, batch, size, network, device) for batch in batches for name in names]
    print(table(("implementation", "batch", "ms to enqueue", "ms", "ms from a CUDA graph"), rows))
    print(f"\n{sentence(conditions(device))}")


if __name__ == "__main__":
    main()
