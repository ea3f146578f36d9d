"""Fine-tune DenseNet-121 on a folder of images with one subfolder per class. The default is a temporary folder with
scikit-learn's handwritten digits.

python examples/finetune_folder.py [--root DIR] [--weights IMAGENET1K_V1]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import densenet_fast


def write_digits(root: Path, count: int) -> None:
    """Writes the first ``count`` digits as PNG files of 32x32 pixels."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:count], digits.target)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((16 * image).clip(0, 255).astype("uint8")).resize((32, 32)).save(root / f"{label}/{i}.png")


def main(root: Path, weights: str | None = None, epochs: int = 3, batch: int = 32) -> float:
    """Trains on four fifths of the images. Returns the accuracy on the rest."""
    torch.manual_seed(0)
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])
    images = ImageFolder(root, transform)
    train, test = random_split(images, [0.8, 0.2])
    model = densenet_fast.densenet121(weights=weights)
    model.classifier = torch.nn.Linear(model.classifier.in_features, len(images.classes))
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    for epoch in range(epochs):
        for x, y in DataLoader(train, batch, shuffle=True, drop_last=True):
            loss = cross_entropy(model(x), y)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    model.eval()
    with torch.inference_mode():
        return sum((model(x).argmax(1) == y).sum().item() for x, y in DataLoader(test, batch)) / len(test)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--weights", help="torchvision's, by name, or a path")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.root is None:
            write_digits(Path(folder), 1797)
        print(f"accuracy {main(given.root or Path(folder), given.weights):.3f}")
