"""A decode step as one captured CUDA graph: hundreds of launches become one.

In: rows with one new token each.  Out: their logits and likeliest ids, on the device. Graphs are captured for some numbers of
rows; a step takes the next larger one and fills it up with rows that write to a block that is nobody's.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tessella.engine.fast import FastDecoder
from tessella.engine.kernels.attend import Turn
from tessella.engine.kernels.steps import likeliest, read
from tessella.engine.paged import BlockStore, blocks_to
from tessella.engine.paged_cuda import Growing
from tessella.engine.scheduler import Part

COLUMNS = 3  # what is told of a row beside its blocks: the new token, its place among the ids drawn last or -1, where it stands


class DecodeStep:
    """What a graph records: one decode step, from numbers that are told to logits and ids, in tensors that stay where they are.

    cosine, sine (L, D): of rows that are not stretched; others do not come here. drawn (2, R or more) int64: ids and whether
    logits are finite; the ids of the last step are read from it, those of this one written to it.
    """

    def __init__(self, decoder: FastDecoder, store: BlockStore, cosine: Tensor, sine: Tensor, drawn: Tensor, longest_row: int):
        self.decoder, self.store, self.cosine, self.sine, self.drawn = decoder, store, cosine, sine, drawn
        self.width = -(-longest_row // store.block_tokens)
        most = drawn.shape[1]
        self.told = torch.zeros(most * (COLUMNS + self.width), dtype=torch.int32, device=drawn.device)

    def fill(self, parts: Sequence[Part], size: int) -> Tensor:
        """What is told of the parts and of rows to fill up to size: (size * (3 + W),) int32, pinned where there is a GPU."""
        on_gpu = self.told.device.type == "cuda"
        told = torch.empty(size * (COLUMNS + self.width), dtype=torch.int32, pin_memory=on_gpu)
        heads, table = told[: COLUMNS * size].view(COLUMNS, size), told[COLUMNS * size :].view(size, self.width)
        known = [start < len(row.tokens) for row, start, _ in parts]
        heads[0, : len(parts)] = torch.tensor(
            [row.tokens[at] if is_ else 0 for (row, at, _), is_ in zip(parts, known, strict=True)]
        )
        heads[1, : len(parts)] = torch.tensor([-1 if is_ else part.row.place for part, is_ in zip(parts, known, strict=True)])
        heads[2, : len(parts)] = torch.tensor([part.start for part in parts])
        heads[:, len(parts) :] = torch.tensor([0, -1, 0])[:, None]
        blocks = [blocks_to(part, self.store) for part in parts]
        widest = max(map(len, blocks), default=0)
        table[: len(parts), :widest] = torch.tensor([[*one, *[0] * (widest - len(one))] for one in blocks], dtype=torch.int32)
        table[len(parts) :, 0] = self.store.filler  # what lies behind a row's blocks is never read
        return told

    def views(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, places and positions (size,), table (size, W), of a step of that size."""
        heads = self.told[: COLUMNS * size].view(COLUMNS, size)
        table = self.told[COLUMNS * size : (COLUMNS + self.width) * size].view(size, self.width)
        return heads[0], heads[1], heads[2], table

    def run(self, size: int) -> Tensor:
        """Logits (size, V). Nothing here waits for the device, or hangs on numbers that are told."""
        ids, places, positions, table = self.views(size)
        embeddings = read(ids, places, self.drawn[0], self.decoder.table)
        attend = Growing(self.store, self.decoder.heads, Turn(self.cosine, self.sine, positions), table, positions)
        logits = self.decoder.logits(self.decoder.run(embeddings, attend))
        likeliest(logits, self.drawn[0, :size], self.drawn[1, :size])
        return logits


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all engines of a process: cuBLAS keeps 32 MiB for each stream that it ever worked on."""
    return torch.cuda.Stream(device)


class DecodeGraphs:
    """most_rows: of any step to come."""

    def __init__(self, step: DecodeStep, most_rows: int):
        self.step = step
        self.sizes = sizes_to(most_rows)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool: Any = None
        for size in reversed(self.sizes):  # the largest first: the others find room in its memory
            told = step.fill((), size)
            step.told[: len(told)].copy_(told)
            graph, logits = self._captured(size, pool)
            pool = graph.pool()
            self.graphs[size] = graph, logits

    def fit(self, parts: Sequence[Part]) -> bool:
        """Whether a step of these parts can be run here: rows that grow by one token that is no part of a picture."""
        return len(parts) <= self.sizes[-1] and all(
            end - start == 1 and start >= len(row.prompt_ids) - 1 and row.adapter is None and not row.stretched
            for row, start, end in parts
        )

    def run(self, parts: Sequence[Part]) -> Tensor:
        """Logits (R, V) of all parts, valid until the next run; their likeliest ids are in drawn."""
        size = next(size for size in self.sizes if size >= len(parts))
        told = self.step.fill(parts, size)
        self.step.told[: len(told)].copy_(told, non_blocking=True)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits[: len(parts)]

    def _captured(self, size: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        aside = capture_stream(self.step.told.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are compiled and workspaces made before anything is recorded
            for _ in range(2):
                self.step.run(size)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=aside):
            logits = self.step.run(size)
        return graph, logits


def sizes_to(most_rows: int) -> list[int]:
    """1, 2, 4, 8, then every 8 to 64, then every 32, up to one that holds most_rows."""
    sizes = [1, 2, 4]
    while sizes[-1] < most_rows:
        sizes.append(sizes[-1] + (4 if sizes[-1] < 8 else 8 if sizes[-1] < 64 else 32))
    return sizes
