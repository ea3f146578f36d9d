"""Real data sets: which images there are, and where they must lie."""

import gzip
import importlib.util
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from densenet_fast.thirdparty import import_torchvision
from densenet_fast.training.files import atomic_file
from densenet_fast.training.images import Images, SeededImages, mean_and_deviation
from densenet_fast.training.settings import Settings, UsageError

__all__ = ["DataSet", "load_data"]

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FASHION_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
CIFAR_FILES = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-python", "cifar-100-python.tar.gz"),
}


class DataSet(NamedTuple):
    """A training and a test set, each with ``set_epoch``, and what the network must know of their images."""

    train: Dataset
    test: Dataset
    channels: int
    image_size: int
    classes: int

    @property
    def fingerprint(self) -> dict[str, int]:
        """What must be the same when a run is resumed."""
        return {
            "train_images": len(self.train),
            "test_images": len(self.test),
            "channels": self.channels,
            "image_size": self.image_size,
            "classes": self.classes,
        }


def load_data(settings: Settings) -> DataSet:
    """The data set of ``settings``.

    Raises:
        UsageError: it cannot be read; the message names what is missing.
    """
    loaders: dict[str, Callable[[Settings], DataSet]] = {
        "digits": _digits,
        "fashion-mnist": _fashion_mnist,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "imagefolder": _image_folder,
    }
    return loaders[settings.data](settings)


def _digits(settings: Settings) -> DataSet:
    """1,797 handwritten digits of 8 x 8 pixels with values 0 to 16; a fifth of each class is held out for the test."""
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("--data digits: expected scikit-learn, which brings the images: pip install scikit-learn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(digits.target).long()
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    parts = (images[train], labels[train]), (images[test], labels[test])
    return _in_memory(settings, *parts, classes=10, largest=16, crop_padding=1, flip=False)


def _fashion_mnist(settings: Settings) -> DataSet:
    datasets = _torchvision(settings).datasets
    root = _root(settings)
    raw = root / "FashionMNIST" / "raw"
    if not settings.download:
        for name in FASHION_FILES:
            packed = raw / f"{name}.gz"
            if packed.is_file() and not (raw / name).is_file():
                with gzip.open(packed) as source, atomic_file(raw / name) as target:
                    shutil.copyfileobj(source, target)
        _expect_files(settings, [raw / name for name in FASHION_FILES], "each plain or as .gz")
    parts = [
        (part.data[:, None].contiguous(), part.targets.long())
        for part in (datasets.FashionMNIST(root, train=train, download=settings.download) for train in (True, False))
    ]
    return _in_memory(settings, *parts, classes=10, largest=255, crop_padding=4, flip=True)


def _cifar(settings: Settings) -> DataSet:
    datasets = _torchvision(settings).datasets
    data_type = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[settings.data]
    root = _root(settings)
    folder, archive = CIFAR_FILES[settings.data]
    if not settings.download:
        if (root / archive).is_file() and not (root / folder).exists():
            with tarfile.open(root / archive) as packed:
                packed.extractall(root, filter="data")
        names = [name for name, _ in data_type.train_list + data_type.test_list]
        _expect_files(settings, [root / folder / name for name in names], f"or the archive {archive} in {root}")
    try:
        loaded = [data_type(root, train=train, download=settings.download) for train in (True, False)]
    except RuntimeError as error:
        raise UsageError(
            f"--root: expected intact files of {settings.data} in {root / folder}, got: {error}"
        ) from error
    parts = [
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in loaded
    ]
    classes = len(loaded[0].classes)
    return _in_memory(settings, *parts, classes=classes, largest=255, crop_padding=4, flip=True)


def _image_folder(settings: Settings) -> DataSet:
    torchvision = _torchvision(settings)
    transforms = torchvision.transforms
    root = _root(settings)
    if settings.download:
        raise UsageError("--download: expected a data set with a public address, got --data imagefolder")
    try:
        train, test = (torchvision.datasets.ImageFolder(root / part) for part in ("train", "val"))
    except FileNotFoundError as error:
        expected = f"{root}/train/CLASS/*.jpg and {root}/val/CLASS/*.jpg"
        raise UsageError(f"--root: expected {expected}, got: {error}") from error
    if train.classes != test.classes:
        raise UsageError(f"--root: expected the same classes in train and val, got {train.classes} and {test.classes}")
    size = settings.image_size or 224
    middle = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
    random = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    finish = [transforms.ToTensor()]
    if settings.normalize:
        finish.append(transforms.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION))
    return DataSet(
        SeededImages(train, transforms.Compose((random if settings.augment else middle) + finish), settings.seed),
        SeededImages(test, transforms.Compose(middle + finish), settings.seed),
        channels=3,
        image_size=size,
        classes=len(train.classes),
    )


def _in_memory(
    settings: Settings,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    largest: int,
    crop_padding: int,
    flip: bool,
) -> DataSet:
    mean, deviation = mean_and_deviation(train[0]) if settings.normalize else (torch.zeros(1), torch.tensor([largest]))
    common: dict[str, Any] = {"mean": mean, "deviation": deviation, "size": settings.image_size}
    if settings.augment:
        augmented = Images(*train, **common, crop_padding=crop_padding, flip=flip, seed=settings.seed)
    else:
        augmented = Images(*train, **common)
    channels, size = train[0].shape[1:3]
    return DataSet(augmented, Images(*test, **common), channels, settings.image_size or size, classes)


def _root(settings: Settings) -> Path:
    if settings.root is None:
        raise UsageError(f"--root: expected the directory of --data {settings.data}, got nothing")
    root = Path(settings.root)
    if not settings.download and not root.is_dir():
        raise UsageError(f"--root: expected a directory, got {root}")
    return root


def _expect_files(settings: Settings, files: list[Path], alternative: str) -> None:
    missing = [file for file in files if not file.is_file()]
    if missing:
        names = ", ".join(file.name for file in files)
        raise UsageError(
            f"--root: expected {names} in {files[0].parent} ({alternative}), "
            f"got {len(missing)} of them missing, the first {missing[0].name}; --download fetches them"
        )


def _torchvision(settings: Settings) -> ModuleType:
    try:
        return import_torchvision()
    except ModuleNotFoundError as error:
        raise UsageError(f"--data {settings.data}: expected torchvision to read it: pip install torchvision") from error
