"""``python peak_memory.py``: peak memory of one training step of each library's DenseNet-121, as it is and converted.

Prints a JSON object, bytes added to the model's by its first step, [stock, converted] for each library that is
installed. Every measurement has a process of its own, forked before torch has run anything.
"""

import json
import multiprocessing

import torch
from libraries import DENSENET121, SHAPES

import densenet_fast
from densenet_fast.memory import PeakMemory


def measure(library: str, converted: bool, results: "multiprocessing.Queue[int]") -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DENSENET121[library]()
    if converted:
        densenet_fast.convert(model)
    x = torch.randn(SHAPES[library])
    memory = PeakMemory(torch.device("cpu"))
    model(x).square().mean().backward()
    results.put(memory.read().added)


def main() -> None:
    context = multiprocessing.get_context("fork")
    results, peaks = context.SimpleQueue(), {}
    for library in DENSENET121:
        peaks[library] = []
        for converted in (False, True):
            process = context.Process(target=measure, args=(library, converted, results))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{library}, converted {converted}: exit code {process.exitcode}")
            peaks[library].append(results.get())
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
