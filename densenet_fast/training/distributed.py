"""One process or several: what torchrun started, joined by gloo on CPUs and nccl on GPUs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from densenet_fast.training.settings import UsageError

__all__ = ["Processes", "join_processes", "launched_processes"]


def launched_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Processes:
    """The processes that train together. With one process every method returns its input."""

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's ``value``."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of every process, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def copy_buffers(self, module: nn.Module) -> None:
        """Gives every process the main process's buffers (running statistics)."""
        if self.count > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do. An error in it is raised in all of them."""
        if self.is_main:
            try:
                yield
            except Exception as error:
                self.from_main(str(error))
                raise
            self.from_main(None)
        else:
            error = self.from_main(None)
            if error is not None:
                raise UsageError(error)
            yield


@contextmanager
def join_processes(device: torch.device) -> Iterator[tuple[Processes, torch.device]]:
    """Joins the processes that torchrun started, gives each its device, and takes the group down at the end."""
    if launched_processes() == 1:
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
        yield Processes(), device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
