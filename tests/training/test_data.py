"""The data sets, read from files in their real formats, and their order and augmentation."""

import gzip
import hashlib
import pickle
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training.support import TINY, table, train

from densenet_fast.training.data import load_data
from densenet_fast.training.images import (
    Images,
    TrainingBatches,
    evaluation_loader,
    mean_and_deviation,
    training_loader,
)
from densenet_fast.training.settings import UsageError, resolve

datasets = pytest.importorskip("torchvision.datasets")


def images(count=10, size=5, channels=2, **options):
    pixels = torch.randint(256, (count, channels, size, size), dtype=torch.uint8)
    plain = {"mean": torch.zeros(1), "deviation": torch.ones(1)}
    return Images(pixels, torch.arange(count), **plain | options)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """FashionMNIST's four files with 32 + 18 random images, two of them packed."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 32), ("t10k", 18)):
        pixels = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    return tmp_path


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10's and CIFAR-100's files with few random images; only the checksums are not the real ones."""

    def write(data_type, folder, counts, label_key, label_names, classes):
        (tmp_path / folder).mkdir()
        random = np.random.default_rng(0)
        sums = {}
        for name, count in counts.items():
            labels = [i % classes for i in range(count)]
            batch = {"data": random.integers(0, 256, (count, 3072), dtype=np.uint8), label_key: labels}
            contents = pickle.dumps(batch)
            (tmp_path / folder / name).write_bytes(contents)
            sums[name] = hashlib.md5(contents).hexdigest()
        meta = pickle.dumps({label_names: [str(i) for i in range(classes)]})
        (tmp_path / folder / data_type.meta["filename"]).write_bytes(meta)
        monkeypatch.setattr(data_type, "train_list", [[name, sums[name]] for name, _ in data_type.train_list])
        monkeypatch.setattr(data_type, "test_list", [[name, sums[name]] for name, _ in data_type.test_list])
        monkeypatch.setattr(data_type, "meta", data_type.meta | {"md5": hashlib.md5(meta).hexdigest()})

    batches = {f"data_batch_{i}": 8 for i in range(1, 6)} | {"test_batch": 9}
    write(datasets.CIFAR10, "cifar-10-batches-py", batches, "labels", "label_names", 10)
    write(datasets.CIFAR100, "cifar-100-python", {"train": 40, "test": 9}, "fine_labels", "fine_label_names", 100)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    """Two classes of PNG files of different sizes."""
    from PIL import Image

    random = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 5)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def check_run(out, train_images, *arguments):
    assert train(*arguments, *TINY, "--epochs", 1, "--model", "reference", "--out", out) == 0
    (row,) = table(out / "metrics.csv")
    assert float(row["train_loss"]) > 0
    return float(row["test_accuracy"])


def test_fashion_mnist(fashion):
    accuracy = check_run(fashion / "out", 32, "--data", "fashion-mnist", "--root", fashion)
    assert (accuracy * 18) == pytest.approx(round(accuracy * 18))
    data = load_data(resolve({"data": "fashion-mnist", "root": str(fashion)}))
    assert (len(data.train), len(data.test), data.channels, data.image_size, data.classes) == (32, 18, 1, 28, 10)
    assert data.test.labels.tolist() == [i % 10 for i in range(18)]


def test_d2l_images_are_96_pixels_between_0_and_1(fashion):
    data = load_data(resolve({"preset": "d2l", "root": str(fashion)}))
    batch, labels = data.train.__getitems__([3, 1])
    assert batch.shape == (2, 1, 96, 96) and labels.tolist() == [3, 1]
    assert batch.min() >= 0 and batch.max() <= 1 and batch.max() > 0.5
    expected = F.interpolate(data.train.images[[3, 1]] / 255, (96, 96), mode="bilinear")
    assert torch.allclose(batch, expected, atol=1e-6)


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar(cifar, name, classes):
    check_run(cifar / "out", 40, "--data", name, "--root", cifar)
    data = load_data(resolve({"data": name, "root": str(cifar)}))
    assert (len(data.train), len(data.test), data.channels, data.image_size, data.classes) == (40, 9, 3, 32, classes)
    original = datasets.CIFAR10 if classes == 10 else datasets.CIFAR100
    assert (data.test.images[4].permute(1, 2, 0).numpy() == np.asarray(original(cifar, train=False)[4][0])).all()


def test_damaged_cifar_is_named(cifar):
    (cifar / "cifar-100-python" / "train").write_bytes(b"")
    with pytest.raises(UsageError, match="--root: expected intact files of cifar100 in .*cifar-100-python"):
        load_data(resolve({"data": "cifar100", "root": str(cifar)}))


def test_image_folder(folder):
    options = ("--data", "imagefolder", "--root", folder, "--image-size", 32, "--workers", 1)
    check_run(folder / "out", 32, *options)
    data = load_data(resolve({"data": "imagefolder", "root": str(folder), "image_size": 32}))
    assert (len(data.train), len(data.test), data.channels, data.classes) == (32, 10, 3, 2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = data.train[3][0]
    assert torch.equal(first, data.train[3][0]), "the same image in the same epoch"
    assert torch.equal(state, torch.get_rng_state()), "dropout must not notice"
    data.train.set_epoch(1)
    assert not torch.equal(first, data.train[3][0])


def test_image_folder_with_other_classes_in_val_is_refused(folder):
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(UsageError, match="expected the same classes in train and val"):
        load_data(resolve({"data": "imagefolder", "root": str(folder)}))


def test_digits_split_is_fixed_stratified_and_disjoint():
    from sklearn.datasets import load_digits

    one, other = (load_data(resolve({"data": "digits", "seed": seed})) for seed in (0, 1))
    assert torch.equal(one.test.images, other.test.images) and torch.equal(one.train.labels, other.train.labels)
    assert len(one.train) + len(one.test) == 1797 and len(one.test) == 360
    joined = torch.cat([one.train.images, one.test.images]).flatten(1)
    original = torch.from_numpy(load_digits().images).to(torch.uint8).flatten(1)
    assert sorted(map(tuple, joined.tolist())) == sorted(map(tuple, original.tolist()))
    counts = torch.bincount(one.test.labels)
    assert counts.min() >= 35 and counts.max() <= 37


def test_mean_and_deviation():
    pixels = torch.randint(256, (7, 3, 4, 5), dtype=torch.uint8)
    mean, deviation = mean_and_deviation(pixels)
    assert torch.allclose(mean, pixels.float().mean((0, 2, 3)))
    assert torch.allclose(deviation, pixels.float().std((0, 2, 3), correction=0))


def test_crops_and_flips_are_what_they_are_called():
    data = images(count=64, crop_padding=2, flip=True, seed=3)
    batch, labels = data.__getitems__(list(range(64)))
    padded = F.pad(data.images, (2, 2, 2, 2)).float()
    for i in range(64):
        top, left = data.corners[:, i].tolist()
        crop = padded[i, :, top : top + 5, left : left + 5]
        assert torch.equal(batch[i], crop.flip(-1) if data.mirrored[i] else crop)
    assert labels.tolist() == list(range(64))
    assert set(data.corners.flatten().tolist()) == set(range(5)) and 16 < data.mirrored.sum() < 48


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_epoch_alone(workers):
    def epoch(number, rank=0, processes=1):
        torch.manual_seed(workers)
        data = images(count=50, crop_padding=1, flip=True, seed=4)
        data.images = torch.arange(50 * 50).remainder(251).to(torch.uint8).view(50, 2, 5, 5)
        batches = TrainingBatches(50, 8, None, 4, rank, processes)
        data.set_epoch(number)
        batches.epoch = number
        return list(training_loader(data, batches, workers=workers, pin_memory=False))

    expected = epoch(1)
    assert len(expected) == 6
    assert len({label for _, labels in expected for label in labels.tolist()}) == 48
    assert not torch.equal(epoch(0)[0][1], expected[0][1])
    for shares in zip(expected, epoch(1, 0, 2), epoch(1, 1, 2), strict=True):
        for part in (0, 1):
            whole, first, second = (share[part] for share in shares)
            assert torch.equal(whole, torch.cat([first, second]))


def test_processes_test_every_image_once():
    data = images(count=7)
    shares = [list(evaluation_loader(data, 2, rank=r, processes=3, workers=0, pin_memory=False)) for r in range(3)]
    labels = [label for share in shares for _, labels in share for label in labels.tolist()]
    assert sorted(labels) == list(range(7))
