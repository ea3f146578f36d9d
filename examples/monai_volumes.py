"""Convert MONAI's three-dimensional DenseNet-121, and train it to find volumes with a bright ball.

python examples/monai_volumes.py
"""

import torch
from monai.networks.nets import DenseNet121
from torch.nn import functional as F

import densenet_fast


def volumes(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [count, 1, size, size, size] with a ball in every second volume, and the labels [count], 1 for a ball."""
    x = 0.3 * torch.randn(count, 1, size, size, size)
    labels = torch.arange(count) % 2
    axes = torch.stack(torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij"))
    for i in labels.nonzero().flatten():
        centre = torch.randint(size // 4, 3 * size // 4, (3, 1, 1, 1))
        x[i, 0] += ((axes - centre) ** 2).sum(0) < (size / 6) ** 2
    return x, labels


def main(steps: int = 20, size: int = 32) -> tuple[float, float]:
    """The largest difference between the logits before and after converting, and the loss of the last step."""
    torch.manual_seed(0)
    model = DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)
    x, _ = volumes(2, size)
    with torch.no_grad():
        model.eval()
        before = model(x)
        densenet_fast.convert(model)
        difference = (model(x) - before).abs().max().item()
    print(densenet_fast.explain(model))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for step in range(steps):
        x, labels = volumes(4, size)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    return difference, loss.item()


if __name__ == "__main__":
    main()
