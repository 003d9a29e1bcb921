"""One process or many, started by torchrun: what the rest of the engine needs to know about it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device

from ssmvision.data import UserError, find_bad_images


@dataclass(frozen=True)
class Ranks:
    """This process among all of them.

    Attributes:
        device: Where the model of this process lives.
        rank: Number of this process.
        world_size: Number of processes.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        """Whether there is more than one process."""
        return self.world_size > 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Adds up `values` over all processes, in double precision where the device has it."""
        if not self.distributed:
            return list(values)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Returns the `value` of every process, in order of rank, to every process."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def find_bad_images(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        """As `data.find_bad_images`, each process looking at its share."""
        shares = self.gather(find_bad_images(paths[self.rank :: self.world_size]))
        order = {path: position for position, path in enumerate(paths)}
        return sorted((bad for share in shares for bad in share), key=lambda bad: order[bad[0]])

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.distributed:
            dist.barrier()


def start_ranks(device: str | None = None) -> Ranks:
    """Joins the processes that torchrun started, if it did, and picks the device of this one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    info = Namespace(device=device)
    try:
        init_distributed_device(info)
        torch.empty(0, device=info.device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"Cannot use device {device!r}: {error}") from error
    return Ranks(torch.device(info.device), info.rank, info.world_size)


def stop_ranks() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
