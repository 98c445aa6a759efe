"""The processes of a run: one, or one a GPU, on one machine or on many.

In: what a launcher (our own, torchrun, accelerate launch, SLURM, Ray) left in the environment.  Out: World: who we are, and what
is said among the ranks. Rank 0 alone reads the data, writes and prints.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tessella.errors import ConfigError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # rank 0 may read and check a large dataset while the others wait
# How gloo and NCCL word that the other end has gone. They have no class of their own for it.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "Connection refused")


@dataclass(frozen=True)
class World:
    """Who we are among the ranks. Alone, everything that is said among ranks comes back as it was."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether we are the one that reads, writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1

    def device(self, wanted: str) -> str:
        """The device of this rank. Raises ConfigError where each rank cannot have one of its own."""
        if self.alone or wanted in ("cpu", "mps") or not torch.cuda.is_available():
            return wanted
        if ":" in wanted:
            raise ConfigError(f'device is "{wanted}", but the run has {self.size} ranks, each with a GPU of its own; say cuda')
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {self.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; lower nproc, or say "
                "--device cpu"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.alone:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        return held[0]

    def gather(self, numbers: Sequence[int]) -> list[list[int]]:
        """Every rank's whole numbers, by rank. Over the CPU: no GPU is waited for."""
        if self.alone:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.int64)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine)
        return [row.tolist() for row in rows]

    def collect(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        if self.alone:
            return [value]
        rows: list[T | None] = [None] * self.size
        dist.all_gather_object(rows, value)
        return [row for row in rows if row is not None]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Until all ranks are here. Over the CPU."""
        self.gather([0])


def join() -> World:
    """Take our place among the ranks that a launcher has started, or be alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if not dist.is_initialized():
        # Both at once: numbers that the host needs go over the CPU, so that they make no GPU wait.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    return World(rank, size, local)


def leave() -> None:
    """The last word among the ranks; after it none of them can be reached. A run that failed ends with its process instead."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_lost(error: RuntimeError) -> bool:
    """Whether an error is how the transport says that another rank is gone."""
    return any(words in str(error) for words in GONE)


def shares(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices for each rank: about the same sum of lengths, in order; a function of the lengths alone.

    Longest first, each to the rank that has least.
    """
    load = [[0, 0, rank] for rank in range(size)]  # sum, count, rank
    given: list[list[int]] = [[] for _ in range(size)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        least = min(load)
        given[least[2]].append(index)
        least[0] += lengths[index]
        least[1] += 1
    return [sorted(some) for some in given]
