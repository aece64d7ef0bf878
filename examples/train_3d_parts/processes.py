"""One process, or several started by torchrun: which rank this is, on which device, and how they find each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .options import OptionError


@dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
        rank: number of this process, 0 to world - 1; 0 prints and writes.
        world: number of processes.
        device: what it computes on.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are others."""
        return self.world > 1


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; on CUDA each process of a machine has its own.

    Raises:
        OptionError: CUDA is wanted and not there, or has fewer devices than processes.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted == "auto" and there == 0):
        return torch.device("cpu")
    if local_rank >= there:
        raise OptionError(
            f"--device: got {wanted!r} for process {local_rank} of this machine, expected at least {local_rank + 1} "
            f"CUDA devices and found {there}; use --device cpu or fewer processes"
        )
    return torch.device("cuda", local_rank)


def find_place(device: str) -> Place:
    """Read what torchrun has set in the environment; without torchrun this is the only process.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        OptionError: see `choose_device`.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES.items())
    return Place(rank, world, choose_device(device, local))


_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}


@contextmanager
def joined(place: Place, timeout: float) -> Iterator[None]:
    """Be part of the process group, if there is more than one process.

    A process that dies or hangs makes the others fail in their next exchange, at once or after `timeout` seconds, and
    torchrun then ends them all.

    Args:
        place: of this process.
        timeout: seconds that an exchange may take.
    """
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if not place.is_distributed:
        yield
        return
    backend = "nccl" if place.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def gather(mine: torch.Tensor, place: Place) -> list[torch.Tensor]:
    """The tensors of all processes by rank, on the CPU; all must call this with one shape and dtype."""
    if not place.is_distributed:
        return [mine]
    here = mine.to(place.device)
    everyone = [torch.empty_like(here) for _ in range(place.world)]
    dist.all_gather(everyone, here)
    return [one.cpu() for one in everyone]
