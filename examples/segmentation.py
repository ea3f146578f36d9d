"""Convert a U-Net of segmentation_models_pytorch with a DenseNet-121 encoder, and train it to find bright discs.

python examples/segmentation.py
"""

import segmentation_models_pytorch as smp
import torch

import densenet_fast


def discs(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a disc in each image, [count, 3, size, size], and the masks of the discs, [count, 1, size, size]."""
    centre = torch.randint(size // 4, 3 * size // 4, (count, 2, 1, 1))
    axes = torch.stack(torch.meshgrid(*[torch.arange(size)] * 2, indexing="ij"))
    mask = (((axes - centre) ** 2).sum(1, keepdim=True) < (size / 5) ** 2).float()
    return 0.3 * torch.randn(count, 3, size, size) + mask, mask


def main(steps: int = 30, size: int = 64) -> float:
    """Trains. Returns the intersection over union on new images."""
    torch.manual_seed(0)
    model = smp.Unet("densenet121", encoder_weights=None, classes=1)
    densenet_fast.convert(model)
    print(densenet_fast.explain(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        x, mask = discs(4, size)
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x), mask)
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")
    model.eval()
    with torch.inference_mode():
        x, mask = discs(8, size)
        predicted = model(x) > 0
    return ((predicted & (mask > 0)).sum() / (predicted | (mask > 0)).sum()).item()


if __name__ == "__main__":
    print(f"intersection over union {main():.3f}")
