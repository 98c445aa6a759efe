"""The engine's Attend on a GPU in 16-bit types: Triton for rows that grow, torch's packed kernel for prompts.

In and out as in paged.py; the blocks are the same. The rows that grow need nothing but tensors, so a CUDA graph can hold them.
T new tokens, R rows with one new token each, which stand in front; Hq, Hk heads of width D; B tokens a block; W blocks a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tessella.engine import kernels
from tessella.engine.paged import BlockStore, blocks_to, head_table
from tessella.engine.scheduler import Part
from tessella.model.attend import packed


class Growing:
    """Rows with one new token each. table (R, W) int32, positions (R,) of the new tokens."""

    def __init__(self, store: BlockStore, table: Tensor, positions: Tensor):
        self.store = store
        self.table = table
        self.lengths = (positions + 1).to(torch.int32)
        size = store.block_tokens
        block = table.gather(1, (positions // size).long()[:, None])[:, 0].long()
        self.places = block * (store.heads * size) + positions % size  # (R,), as of head 0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.store.keys[layer], self.store.values[layer]
        kernels.put(k, v, self.places, keys, values)
        return kernels.decode(q, keys, values, self.table, self.lengths)


class Prompts:
    """Rows with several new tokens each, one after the other; those with a past are read back from their blocks."""

    def __init__(self, store: BlockStore, parts: Sequence[Part], device: torch.device):
        self.store = store
        self.counts = [part.end - part.start for part in parts]
        self.pasts = [part.start for part in parts]
        size = store.block_tokens
        places = []
        for row, start, end in parts:
            at = torch.arange(start, end)
            places.append(torch.tensor(row.blocks)[at // size] * (store.heads * size) + at % size)
        self.places = torch.cat(places).to(device, non_blocking=True)
        self.tables = [head_table([blocks_to(part, store)], store).to(device) if part.start else None for part in parts]
        ends = [part.end for part in parts]
        self.starts_q = torch.tensor([0, *self.counts]).cumsum(0, dtype=torch.int32).to(device)
        self.starts_k = torch.tensor([0, *ends]).cumsum(0, dtype=torch.int32).to(device)
        self.longest_q, self.longest_k = max(self.counts), max(ends)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kernels.put(k, v, self.places, self.store.keys[layer], self.store.values[layer])
        if any(self.pasts):
            k, v = self._whole(layer, k, v)
        return packed(q, k, v, self.starts_q, self.starts_k, self.longest_q, self.longest_k)

    def _whole(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens of all rows, past and new, back to back (Tk, Hk, D)."""
        keys, values = [], []
        for table, past, new_k, new_v in zip(self.tables, self.pasts, k.split(self.counts), v.split(self.counts), strict=True):
            if table is not None:
                old_k, old_v = (x[0, :, :past].transpose(0, 1) for x in self.store.gather(layer, table))
                keys.append(old_k)
                values.append(old_v)
            keys.append(new_k)
            values.append(new_v)
        return torch.cat(keys), torch.cat(values)


class PagedCuda:
    """For one step that is not run by a graph."""

    def __init__(self, store: BlockStore, parts: Sequence[Part], device: torch.device):
        self.growing = sum(part.end - part.start == 1 for part in parts)
        rows, prompts = parts[: self.growing], parts[self.growing :]
        self.first: Growing | None = None
        if rows:
            positions = torch.tensor([part.start for part in rows])
            table = block_table([part.row.blocks for part in rows], store.filler)
            self.first = Growing(store, table.to(device), positions.to(device))
        self.rest = Prompts(store, prompts, device) if prompts else None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = self.growing
        seen = []
        if self.first is not None:
            seen.append(self.first(layer, q[:n], k[:n], v[:n]))
        if self.rest is not None:
            seen.append(self.rest(layer, q[n:], k[n:], v[n:]))
        return torch.cat(seen) if len(seen) > 1 else seen[0]


def block_table(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """(R, W) int32; shorter rows are filled up."""
    widest = max(len(blocks) for blocks in rows)
    return torch.tensor([[*blocks, *[filler] * (widest - len(blocks))] for blocks in rows], dtype=torch.int32)
