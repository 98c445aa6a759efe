"""Samples become passes: rows back to back, without padding, with the positions that learn.

In: samples in the order of the seed.  Out: for each optimizer step its Packs, made the same whoever makes them and when.
T tokens of all rows of a pass, L of them learned, S of them visual, N tiles.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tessella.errors import DataError, ImageError, PromptError
from tessella.generate import queries_of
from tessella.geometry import Window
from tessella.image import open_image
from tessella.inputs import Inputs, ModelInput, Picture
from tessella.train.augment import augment, may_mirror
from tessella.train.dataset import Sample
from tessella.train.multitask.rows import Placed, build_request, build_taught, placed
from tessella.train.packing import Plan, grouped, plan_epoch, plan_passes, rope_limit
from tessella.train.streamed import Streamed
from tessella.train.world import shares

KEPT_BYTES = 1 << 30  # of built rows, kept for later epochs when pictures are not augmented


@dataclass(frozen=True, eq=False)
class Pack:
    """The rows of one forward and backward pass."""

    ids: Tensor  # (T,) int64
    slots: Tensor  # (S,) int64: positions of the visual tokens, in the order of the tiles
    positions: Tensor  # (T,) int64, from 0 in each row
    predict: Tensor  # (L,) int64: positions whose next token is learned; the head is applied there alone
    targets: Tensor  # (L,) int64: that next token
    tiles: Tensor  # (N, 3, S, S) uint8
    digests: tuple[str, ...]  # of each tile
    lengths: tuple[int, ...]  # tokens of each row
    tiles_of: tuple[int, ...]  # tiles of each row
    keys: tuple[str, ...]  # of each row: equal for rows that are equal in every token and pixel
    windows: tuple[tuple[Window, ...], ...]  # of each row's pictures, where the tile rule pads a grid
    questions: tuple[tuple[int, ...], ...] = ()  # of each tile, where the connector reads them
    queries: Tensor | None = None  # (T,) int64: the super-link query of each place, else -1; None where there is none
    placed: tuple[Placed, ...] = ()  # what decoders are to find behind which routing tokens

    def to(self, device: torch.device) -> "Pack":
        """On a device; the tiles stay where they are until somebody asks for them (a frozen tower may not)."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)[:5]}
        queries = None if self.queries is None else self.queries.to(device, non_blocking=True)
        return replace(self, **moved, queries=queries)

    def pin_memory(self) -> "Pack":
        """In page-locked memory, from which a GPU copies while it computes. Called by the DataLoader."""
        return replace(self, **{f.name: getattr(self, f.name).pin_memory() for f in fields(self)[:6]})

    def row(self, index: int) -> "Pack":
        """One row by itself, to be read only: it learns nothing."""
        start, tile = sum(self.lengths[:index]), sum(self.tiles_of[:index])
        end, last = start + self.lengths[index], tile + self.tiles_of[index]
        nothing = self.predict[:0]
        return Pack(
            ids=self.ids[start:end],
            slots=self.slots[(self.slots >= start) & (self.slots < end)] - start,
            positions=self.positions[start:end],
            predict=nothing,
            targets=nothing,
            tiles=self.tiles[tile:last],
            digests=self.digests[tile:last],
            lengths=self.lengths[index : index + 1],
            tiles_of=self.tiles_of[index : index + 1],
            keys=self.keys[index : index + 1],
            windows=self.windows[index : index + 1],
            questions=self.questions[tile:last],
            queries=None if self.queries is None else self.queries[start:end],
        )


@dataclass(frozen=True, eq=False)
class StepData:
    """All that one optimizer step learns from. skipped: (place, reason) of samples whose pictures turned out bad."""

    packs: list[Pack]
    places: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    everywhere: tuple[int, int] | None = None  # learned and routed of the whole step, where these packs are one rank's share

    @property
    def tokens(self) -> int:
        return sum(sum(pack.lengths) for pack in self.packs)

    @property
    def learned(self) -> int:
        """Learned tokens of the step, on all ranks once they have told each other."""
        if self.everywhere is not None:
            return self.everywhere[0]
        return sum(len(pack.targets) for pack in self.packs)

    @property
    def routed(self) -> int:
        """Rows that a decoder learns from, likewise."""
        if self.everywhere is not None:
            return self.everywhere[1]
        return sum(len({one.row for one in pack.placed}) for pack in self.packs)

    def pin_memory(self) -> "StepData":
        return replace(self, packs=[pack.pin_memory() for pack in self.packs])


def pack(rows: Sequence[ModelInput]) -> Pack:
    """Lay rows back to back. The last token of a row predicts nothing, so no row learns from its neighbour."""
    ids = torch.cat([row.ids for row in rows])
    learned = torch.cat([torch.cat((row.learn[1:], row.learn.new_zeros(1))) for row in rows])  # by predicting position
    predict = learned.nonzero()[:, 0]
    return Pack(
        ids=ids,
        slots=torch.cat([row.slots for row in rows]).nonzero()[:, 0],
        positions=torch.cat([torch.arange(len(row)) for row in rows]),
        predict=predict,
        targets=ids[predict + 1],
        tiles=torch.cat([row.tiles for row in rows]),
        digests=tuple(digest for row in rows for digest in row.digests),
        lengths=tuple(len(row) for row in rows),
        tiles_of=tuple(len(row.tiles) for row in rows),
        keys=tuple(key_of(row) for row in rows),
        windows=tuple(row.windows for row in rows),
        questions=tuple(question for row in rows for question in row.questions),
        queries=queries_of(rows, torch.device("cpu")),
        placed=placed(rows),
    )


def blank_pack() -> Pack:
    """Two tokens that stand for nobody (no keys): a pass for a rank that has none left while others still have some."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Pack(
        ids=torch.zeros(2, dtype=torch.int64), slots=nothing, positions=torch.arange(2), predict=torch.tensor([0]),
        targets=torch.tensor([0]), tiles=torch.zeros(0, 3, 1, 1, dtype=torch.uint8), digests=(), lengths=(2,),
        tiles_of=(0,), keys=(), windows=((),),
    )  # fmt: skip


def key_of(row: ModelInput) -> str:
    """A hash of a row's tokens and tiles."""
    digest = hashlib.sha256(row.ids.numpy().tobytes())
    for tile in row.digests:
        digest.update(tile.encode())
    digest.update(repr(row.windows).encode())
    if row.queries is not None:
        digest.update(row.queries.numpy().tobytes())
    return digest.hexdigest()


def pack_all(
    rows: Sequence[ModelInput], tokens_per_pass: int, *, packing: str = "in_order", alone_over: int | None = None
) -> list[Pack]:
    """All rows in the passes that packing.plan_passes says."""
    plan = plan_passes([len(row) for row in rows], tokens_per_pass, packing=packing, alone_over=alone_over)
    return [pack([rows[i] for i in some]) for some in plan]


def order_of(num_samples: int, seed: int, epoch: int) -> list[int]:
    """The order of the samples in one epoch; a function of seed and epoch, so that resume needs no state."""
    chance = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(num_samples, generator=chance).tolist()
    return order


class Steps(Dataset[StepData]):
    """Step number -> what it learns from. Epochs follow each other without a seam, so only the very last step can be short."""

    def __init__(
        self, samples: Sequence[Sample], inputs: Inputs, *, looks: int, samples_per_step: int, tokens_per_pass: int, seed: int,
        augmentation: str = "none", packing: str = "in_order", rank: int = 0, ranks: int = 1,
    ):  # fmt: skip
        """looks: samples seen in the whole run, all epochs together. rank of ranks: only that one's share of each step."""
        self.rank, self.ranks = rank, ranks
        self.samples, self.inputs, self.looks = samples, inputs, looks
        self.samples_per_step, self.tokens_per_pass = samples_per_step, tokens_per_pass
        self.seed, self.augmentation = seed, augmentation
        self.packing, self.alone_over = packing, rope_limit(inputs.config.language)
        self.kept: dict[int, ModelInput] = {}
        self.kept_bytes = 0
        self._order: tuple[int, Sequence[int]] = (-1, [])

    def in_steps_of(self, samples_per_step: int, looks: int) -> "Steps":
        """The same samples in the same order in steps of another size; the rows that are kept are the same too."""
        other = copy.copy(self)
        other.samples_per_step, other.looks = samples_per_step, looks
        other.rank, other.ranks = 0, 1  # whole steps, on every rank the same
        return other

    def __len__(self) -> int:
        return -(-self.looks // self.samples_per_step)

    def __getitem__(self, step: int) -> StepData:
        rows, places, skipped = [], [], []
        for epoch, index in self._mine(step):
            place = self.samples.place(index) if isinstance(self.samples, Streamed) else self.samples[index].place
            try:
                rows.append(self.row(index, epoch))
                places.append(place)
            except (ImageError, PromptError, DataError) as error:  # not swallowed: it goes into the ledger, which stops the run
                skipped.append((place, f"while training: {error}"))
        packs = pack_all(rows, self.tokens_per_pass, packing=self.packing, alone_over=self.alone_over)
        return StepData(packs, tuple(places), tuple(skipped))

    def plan(self, epoch: int) -> Plan:
        """The passes of an epoch, from the lengths that headers tell; the rows are not made. Not of a streamed set."""
        lengths = [sample.tokens for sample in self.samples]
        order = self._in_order(epoch)
        return plan_epoch(lengths, order, self.samples_per_step, self.tokens_per_pass, self.packing, self.alone_over)

    def _mine(self, step: int) -> list[tuple[int, int]]:
        """Epoch and index of this rank's samples in a step: each rank gets about the same number of tokens."""
        first = step * self.samples_per_step
        turns = [divmod(look, len(self.samples)) for look in range(first, min(first + self.samples_per_step, self.looks))]
        chosen = [(epoch, self._in_order(epoch)[turn]) for epoch, turn in turns]
        if self.ranks == 1:
            return chosen
        # Of a streamed sample nothing is known before it is read, and only its own rank shall read it.
        streamed = isinstance(self.samples, Streamed)
        lengths = [0 if streamed else self.samples[index].tokens for _, index in chosen]
        return [chosen[i] for i in shares(lengths, self.ranks)[self.rank]]

    def _in_order(self, epoch: int) -> Sequence[int]:
        if self._order[0] != epoch:
            self._order = (epoch, self._order_of(epoch))
        return self._order[1]

    def _order_of(self, epoch: int) -> Sequence[int]:
        if isinstance(self.samples, Streamed):
            return self.samples.order(self.seed, epoch)
        order = order_of(len(self.samples), self.seed, epoch)
        if self.packing != "grouped":
            return order
        return grouped(order, [sample.tokens for sample in self.samples], self.samples_per_step, self.seed * 7_919 + epoch)

    def row(self, index: int, epoch: int = 0) -> ModelInput:
        """One sample as the model eats it, as it looks in this epoch. Raises ImageError, PromptError, DataError."""
        if index in self.kept:
            return self.kept[index]
        sample = self.samples[index]
        if sample.request is not None:
            return build_request(self.inputs, sample.request)
        pictures = sample.pictures
        changes = self.augmentation != "none" or sample.jpeg
        if changes:
            pictures = tuple(self._look(picture, sample, epoch, n) for n, picture in enumerate(pictures))
        row = build_taught(self.inputs, sample.messages, pictures, sample.truths)
        size = row.tiles.numel() + 16 * len(row)
        if not changes and self.kept_bytes + size <= KEPT_BYTES:
            self.kept[index] = row
            self.kept_bytes += size
        return row

    def _look(self, picture: Picture, sample: Sample, epoch: int, number: int) -> Picture:
        opened = open_image(picture.source, limit_megapixels=self.inputs.limit_megapixels)
        changed = augment(
            opened, self.augmentation, seed=self.seed, epoch=epoch, sample=f"{sample.key}/{number}",
            mirror=may_mirror(sample.messages), jpeg=sample.jpeg,
        )  # fmt: skip
        return replace(picture, source=changed)
