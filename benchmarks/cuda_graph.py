"""Training steps replayed from a CUDA graph, beside eager ones: what the GPU takes without the host. One table.

python benchmarks/cuda_graph.py              on a GPU: DenseNet-121, bfloat16 autocast, channels_last, 224x224
python benchmarks/cuda_graph.py --dry-run    the eager step of a tiny network on the CPU

A step is forward and backward, without the optimizer's. Times are medians; cuDNN's algorithms are its defaults.
"""

import argparse
from statistics import median

import torch

from densenet_fast.benchmarking.ceilings import seconds_of
from densenet_fast.benchmarking.competitors import Entry
from densenet_fast.benchmarking.conditions import conditions, sentence
from densenet_fast.benchmarking.steps import enqueue
from densenet_fast.benchmarking.times import WARM_UPS, measure_times
from densenet_fast.table import table

REPEATS = {"cuda": 15, "cpu": 2}


def measured(entry: Entry, batch: int, size: int, device: torch.device) -> tuple[str, ...]:
    """Milliseconds of the eager step, until it is enqueued and until it is done, and of the replayed one."""
    (timing,) = measure_times([(entry, batch)], size, torch.bfloat16, True, device, REPEATS[device.type])
    replayed = replay_seconds(entry, batch, size, device) if device.type == "cuda" else None
    times = (timing.enqueue_seconds, timing.quantile(0.5), replayed)
    return entry.competitor, str(batch), *("-" if t is None else f"{1e3 * t:.2f}" for t in times)


def replay_seconds(entry: Entry, batch: int, size: int, device: torch.device) -> float:
    """Of a training step's graph, by the GPU's clock."""
    model, images = entry.model(device, True), entry.images(batch, size, device)
    parameters, stream = list(model.parameters()), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS["cuda"]):
            enqueue(model, images, torch.bfloat16, True, parameters)
    torch.cuda.current_stream().wait_stream(stream)
    for parameter in parameters:
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue(model, images, torch.bfloat16, True)
    return median(seconds_of(graph.replay, device, REPEATS["cuda"], flush=False))


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
    entries = [Entry(name, "channels_last", network) for name in names]
    rows = [measured(entry, batch, size, device) for batch in batches for entry in entries]
    print(table(("implementation", "batch", "ms to enqueue", "ms", "ms from a CUDA graph"), rows))
    print(f"\n{sentence(conditions(device))}")


if __name__ == "__main__":
    main()
