"""A decode step as one captured CUDA graph: a thousand launches become one.

In: rows with one new token each.  Out: logits (R, V). Graphs are captured for some numbers of rows; a step takes the next
larger one and fills it up with rows that write to a block that is nobody's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tessella.engine.paged import BlockStore
from tessella.engine.paged_cuda import Growing
from tessella.engine.scheduler import Part
from tessella.model.layers import rotary_at
from tessella.model.vision_language import VisionLanguageModel

ID, POSITION, TABLE = 0, 1, 2  # columns of a row of the input: the new token, where it stands, then the row's blocks


class DecodeGraphs:
    """most_rows, longest_row: of any step to come. frequencies: of rows that are not stretched; others do not come here."""

    def __init__(self, model: VisionLanguageModel, store: BlockStore, frequencies: Tensor, most_rows: int, longest_row: int):
        self.model = model
        self.store = store
        self.frequencies = frequencies
        self.sizes = sizes_to(most_rows)
        width = TABLE + -(-longest_row // store.block_tokens)
        empty = torch.tensor([0, 0, *[store.filler] * (width - TABLE)], dtype=torch.int32)
        self.host = empty.repeat(self.sizes[-1], 1).pin_memory()
        self.rows = self.host.to(model.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        pool: Any = None
        for size in reversed(self.sizes):  # the largest first: the others find room in its memory
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
        """Logits (R, V) of all parts, valid until the next run."""
        size = next(size for size in self.sizes if size >= len(parts))
        widest = max(len(part.row.blocks) for part in parts)
        filler = self.store.filler
        told = [[row.tokens[start], start, *row.blocks, *[filler] * (widest - len(row.blocks))] for row, start, _ in parts]
        self.host[: len(parts), : TABLE + widest] = torch.tensor(told, dtype=torch.int32)
        self.host[len(parts) : size, : TABLE + 1] = torch.tensor([0, 0, filler], dtype=torch.int32)
        self.rows[:size].copy_(self.host[:size], non_blocking=True)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits[: len(parts)]

    def _captured(self, size: int, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        rows = self.rows[:size]
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are compiled and workspaces made before anything is recorded
            for _ in range(2):
                self._pass(rows)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            logits = self._pass(rows)
        return graph, logits

    def _pass(self, rows: Tensor) -> Tensor:
        """rows (R, 2 + W) int32 on the GPU -> logits (R, V)."""
        positions = rows[:, POSITION]
        attend = Growing(self.store, rows[:, TABLE:], positions)
        embeddings = self.model.language_model.embed(rows[:, ID].long())
        turn = rotary_at(self.model.config.language, positions, self.frequencies, embeddings.dtype)
        return self.model.logits(self.model.language_model.run(embeddings, turn, attend))


def sizes_to(most_rows: int) -> list[int]:
    """1, 2, 4, 8, then every 8 to 64, then every 32, up to one that holds most_rows."""
    sizes = [1, 2, 4]
    while sizes[-1] < most_rows:
        sizes.append(sizes[-1] + (4 if sizes[-1] < 8 else 8 if sizes[-1] < 64 else 32))
    return sizes
