"""Samples that stay on the disk, or on a hub, until their step comes; for sets larger than memory.

In: a recipe with stream.  Out: a sequence of samples, each read, looked at and measured when it is asked for, and the order of an
epoch. Which row a step learns from hangs on seed, epoch and place alone, so a resumed run goes on with the same rows and needs no
state of its own; one that was killed does, too.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import torch

from tessella.errors import DataError
from tessella.inputs import Inputs
from tessella.train.dataset import sample_of
from tessella.train.meta import Part, read_meta
from tessella.train.pictures import examine_pictures
from tessella.train.reading import Reading, drafts_of
from tessella.train.recipe import Recipe
from tessella.train.sample import Sample
from tessella.train.tables import Joined, Table, is_hub, open_table

PROBES = 64  # rows that the hash of a streamed set is made of


@dataclass(frozen=True)
class Shard:
    """A table and what its rows need to be understood."""

    table: Table
    root: Path
    part: Part | None = None


class Streamed(Sequence[Sample]):
    """The rows of all datasets of a recipe, one behind the other. Asking for a bad row raises DataError with the reason; a lost
    network raises TrainingError.
    """

    def __init__(self, recipe: Recipe, inputs: Inputs):
        if not recipe.data:
            raise DataError("the recipe names no data; give --data PATH: JSONL, WebDataset tars, parquet or hf:NAME")
        self.reading, self.inputs, self.limit_megapixels = Reading.of(recipe), inputs, recipe.limit_megapixels
        self.shards = [shard for path in recipe.data for shard in _shards(path, self.reading)]
        self.joined = Joined([shard.table for shard in self.shards])
        self.block: tuple[int, list[Any]] = (-1, [])
        if not len(self.joined):
            raise DataError(f"{', '.join(map(str, recipe.data))}: no row in it; give JSONL with rows, tars or parquet")

    def __len__(self) -> int:
        return len(self.joined)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = self.shards[self.joined.part_of(index)]
        drafts = drafts_of(self.place(index), self._row(index), shard.root, self.reading)
        if len(drafts) != 1:
            raise DataError("several samples: this row becomes several, which cannot be streamed")
        draft = drafts[0]
        if shard.part is not None:
            limit = shard.part.max_tiles if draft.max_tiles is None else draft.max_tiles
            draft = replace(draft, jpeg=shard.part.jpeg, max_tiles=limit)
        looked_at = examine_pictures(draft.sources, limit_megapixels=self.limit_megapixels)
        return sample_of(draft, [looked_at[source] for source in draft.sources], self.inputs, self.reading.boxes)

    def place(self, index: int) -> str:
        """Where a row stands, without reading it."""
        return self.joined.place(index)

    def _row(self, index: int) -> Any:
        """The row; of a hub's stream, which does not go back, the whole block around it is read at once."""
        if not self.joined.in_order:
            return self.joined.row(index)
        number, within = divmod(index, self.joined.block_rows)
        if self.block[0] != number:
            first = number * self.joined.block_rows
            rows = [self.joined.row(one) for one in range(first, min(first + self.joined.block_rows, len(self)))]
            self.block = (number, rows)
        return self.block[1][within]

    def order(self, seed: int, epoch: int) -> "Shuffled":
        """The order of an epoch."""
        return Shuffled(len(self), self.joined.block_rows, seed, epoch, blocks_in_order=self.joined.in_order)

    def digest(self) -> str:
        """A hash of the set: its length, and a few rows spread over it (of a hub's stream the length alone)."""
        digest = hashlib.sha256(str(len(self)).encode())
        for number in range(PROBES if not self.joined.in_order else 0):
            index = number * len(self) // PROBES
            digest.update(f"{self.place(index)}{self.joined.row(index)!r}".encode("utf-8", "replace"))
        return digest.hexdigest()[:16]


class Shuffled(Sequence[int]):
    """Rows of an epoch: the blocks of a set in an order of their own, and within each block its rows. Nothing as long as the set
    is ever made, and neighbours in the order lie near each other on the disk.
    """

    def __init__(self, count: int, block_rows: int, seed: int, epoch: int, *, blocks_in_order: bool):
        self.num_rows, self.block_rows, self.seed, self.epoch = count, block_rows, seed, epoch
        whole = count // block_rows  # a last, shorter block stays last
        chance = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        self.blocks = torch.arange(whole) if blocks_in_order else torch.randperm(whole, generator=chance)
        self._within = lru_cache(maxsize=2)(self._shuffled)

    def __len__(self) -> int:
        return self.num_rows

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(self.num_rows))]
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        turn, within = divmod(index, self.block_rows)
        block = int(self.blocks[turn]) if turn < len(self.blocks) else turn
        return block * self.block_rows + self._within(block)[within]

    def _shuffled(self, block: int) -> list[int]:
        rows = min(self.block_rows, self.num_rows - block * self.block_rows)
        chance = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) * 7_919 + block)
        order: list[int] = torch.randperm(rows, generator=chance).tolist()
        return order


def _shards(path: Path, reading: Reading) -> list[Shard]:
    """Raises DataError for what must be read whole."""
    if not is_hub(path) and not path.exists():
        raise DataError(f"{path}: no such file or folder; check the path")
    parts = read_meta(path) if path.is_file() else None
    if parts is not None:
        often = [part.name for part in parts if part.repeat != 1]
        if often:
            raise DataError(f"{path}: repeat_time of {', '.join(often)} cannot be streamed; set it to 1, or leave --stream out")
        return [Shard(_table(part.annotation), part.root, part) for part in parts]
    root = reading.image_root or (Path.cwd() if is_hub(path) else path if path.is_dir() else path.parent)
    return [Shard(_table(path), root)]


def _table(path: Path) -> Table:
    table = open_table(path, stream=True)
    if table is None:
        raise DataError(f"{path} is a folder of pictures: only their names are held in memory, so leave --stream out")
    return table
