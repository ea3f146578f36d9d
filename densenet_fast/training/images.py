"""Images as batches: augmentation and data order that depend on the seed and the epoch alone.

Neither the number of workers or processes nor what ran before changes them. So a resumed run sees what an uninterrupted
one would have seen.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

__all__ = [
    "Images",
    "SeededImages",
    "TrainingBatches",
    "evaluation_loader",
    "mean_and_deviation",
    "stream_seed",
    "training_loader",
]


def stream_seed(*names: int | str) -> int:
    """A 63-bit seed that depends on ``names`` alone, as ``stream_seed(seed, "order", epoch)``.

    A random stream is named by what it is for. So it is independent of every other stream.
    """
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*names: int | str) -> torch.Generator:
    """A CPU generator seeded with :func:`stream_seed`."""
    return torch.Generator().manual_seed(stream_seed(*names))


def mean_and_deviation(images: Tensor) -> tuple[Tensor, Tensor]:
    """The exact mean and standard deviation of each channel of uint8 ``images`` [N, C, H, W]: two tensors [C]."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    weights = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64)
    mean = weights @ values
    deviation = (weights * (values - mean[:, None]) ** 2).sum(1).sqrt()
    return mean.float(), deviation.float()


class Images(Dataset):
    """Images held in memory and prepared a batch at a time.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        mean: subtracted from each channel, [C] or [1].
        deviation: what each channel is then divided by, [C] or [1].
        size: resize to size x size pixels.
        crop_padding: pad with so many zeros on each side and crop at random.
        flip: mirror every other image at random.
        seed: of the random crops and flips.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Tensor,
        deviation: Tensor,
        size: int | None = None,
        crop_padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.images, self.labels = images, labels
        self.mean, self.deviation = mean.view(-1, 1, 1), deviation.view(-1, 1, 1)
        self.size, self.crop_padding, self.flip, self.seed = size, crop_padding, flip, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draws the crops and flips of all images for this epoch."""
        random = generator(self.seed, "augmentation", epoch)
        self.corners = torch.randint(2 * self.crop_padding + 1, (2, len(self.labels)), generator=random)
        self.mirrored = torch.randint(2, (len(self.labels),), generator=random) == 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """The batch of these images, float32 [B, C, H, W], and their labels [B]."""
        chosen = torch.tensor(indices)
        images = self.images[chosen]
        if self.crop_padding or self.flip:
            images = self._crop_and_flip(images, chosen)
        batch = (images.float() - self.mean) / self.deviation
        if self.size is not None and self.size != batch.shape[-1]:
            batch = F.interpolate(batch, (self.size, self.size), mode="bilinear", antialias=True)
        return batch, self.labels[chosen]

    def _crop_and_flip(self, images: Tensor, chosen: Tensor) -> Tensor:
        count, _, height, width = images.shape
        rows, columns = torch.arange(height).expand(count, -1), torch.arange(width).expand(count, -1)
        if self.flip:
            columns = torch.where(self.mirrored[chosen, None], width - 1 - columns, columns)
        top, left = self.corners[:, chosen]
        padded = F.pad(images, (self.crop_padding,) * 4)
        image = torch.arange(count)[:, None, None]
        pixels = padded[image, :, (rows + top[:, None])[:, :, None], (columns + left[:, None])[:, None, :]]
        return pixels.permute(0, 3, 1, 2).contiguous()


class SeededImages(Dataset):
    """Images read from files one at a time, each transformed with a random stream of its own.

    Args:
        source: pairs of an image and a label.
        transform: from an image to a tensor; it may draw from torch's default generator.
        seed: of those draws.
    """

    def __init__(self, source: Dataset, transform: Any, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that the random streams belong to."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(stream_seed(self.seed, "augmentation", self.epoch, index))
        try:
            return self.transform(image), label
        finally:
            torch.default_generator.set_state(state)


class TrainingBatches(Sampler[list[int]]):
    """Each process's share of the batches of one epoch, in random order. An incomplete last batch is left out.

    Args:
        images: number of images.
        batch_size: images per batch, over all processes.
        max_steps: at most so many batches.
        seed: of the order.
        rank: which process this is.
        processes: how many there are.
    """

    def __init__(
        self, images: int, batch_size: int, max_steps: int | None, seed: int, rank: int = 0, processes: int = 1
    ) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.rank, self.processes = rank, processes
        self.steps = min(images // batch_size, max_steps or images)
        self.epoch = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.images, generator=generator(self.seed, "order", self.epoch))
        for batch in order[: self.steps * self.batch_size].view(self.steps, self.processes, -1):
            yield batch[self.rank].tolist()


def training_loader(data: Dataset, batches: TrainingBatches, *, workers: int, pin_memory: bool) -> DataLoader:
    """The training batches; call ``set_epoch`` on its ``dataset`` and set ``batch_sampler.epoch`` before each epoch."""
    return _loader(data, batches, workers, pin_memory)


def evaluation_loader(
    data: Dataset, batch_size: int, *, rank: int, processes: int, workers: int, pin_memory: bool
) -> DataLoader:
    """Every ``processes``-th test image from the ``rank``-th on: over all processes each image exactly once."""
    batches = BatchSampler(range(rank, len(data), processes), batch_size, drop_last=False)
    return _loader(data, batches, workers, pin_memory)


def _loader(data: Dataset, batches: Sampler[list[int]], workers: int, pin_memory: bool) -> DataLoader:
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_is if isinstance(data, Images) else default_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it would draw from the default generator, which is the dropout's
    )


def _as_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch
