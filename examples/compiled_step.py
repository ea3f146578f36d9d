"""A training step with little Python overhead: captured in a CUDA graph on a GPU, compiled by torch.compile elsewhere.

python examples/compiled_step.py [--device cuda]
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import densenet_fast


def step_of(model: nn.Module, images: Tensor, labels: Tensor, backend: str = "inductor") -> Callable[[], Tensor]:
    """A function that runs forward and backward on ``images`` and ``labels``, and returns the loss. Gradients add up.
    Copy new data into the two tensors. With a CUDA graph, set gradients to zero in place."""
    if not images.is_cuda:
        compiled = torch.compile(lambda: F.cross_entropy(model(images), labels), backend=backend)

        def run() -> Tensor:
            loss = compiled()
            loss.backward()
            return loss.detach()

        return run
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # plans and compiles the launches
            F.cross_entropy(model(images), labels).backward()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
    return lambda: (graph.replay(), loss.detach())[1]


def main(device: str = "cpu", steps: int = 5, size: int = 64, batch: int = 8, backend: str = "inductor") -> list[float]:
    """The losses of a few steps of gradient descent on the same images."""
    torch.manual_seed(0)
    model = densenet_fast.DenseNet(8, (2, 3), 16, num_classes=5).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    step, losses = step_of(model, images, torch.arange(batch, device=device) % 5, backend), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        losses.append(step().item())
        optimizer.step()
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    print(main(parser.parse_args().device))
