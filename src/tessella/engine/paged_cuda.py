"""The engine's attention on a GPU in 16-bit types: Triton for rows that grow, torch's packed kernel for prompts.

In: a layer's joined product (T, columns), as FastDecoder hands it over.  Out: what each query sees (T, Hq * D). The blocks are
those of paged.py. The rows that grow need nothing but tensors, so a CUDA graph can hold them.
T new tokens, R rows with one new token each, which stand in front; Hq, Hk heads of width D; B tokens a block; W blocks a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tessella.engine.kernels.attend import HeadNorms, Heads, Turn, grow, turn_and_put
from tessella.engine.kernels.prompts import Plan, fits, look_back, planned
from tessella.engine.paged import BlockStore, blocks_to, token_places
from tessella.engine.scheduler import Part
from tessella.model.attend import packed
from tessella.transfer import sent


class Growing:
    """Rows with one new token each. table (R, W) int32, positions (R,) int32 of the new tokens."""

    def __init__(self, store: BlockStore, heads: Heads, turn: Turn, table: Tensor, positions: Tensor):
        self.store, self.heads, self.turn = store, heads, turn
        self.table, self.positions = table, positions

    def __call__(self, layer: int, qkv: Tensor, norms: HeadNorms | None) -> Tensor:
        keys, values = self.store.keys[layer], self.store.values[layer]
        return grow(qkv, self.heads, self.turn, norms, keys, values, self.table, self.positions)


class Prompts:
    """Rows with several new tokens each, one after the other; those with a past are read back from their blocks.

    own: whether by our kernel, which reads blocks as they lie, or by torch's, for which a past is gathered.
    """

    def __init__(self, store: BlockStore, heads: Heads, turn: Turn, parts: Sequence[Part], device: torch.device, own: bool):
        self.store, self.heads, self.turn = store, heads, turn
        self.places = sent(torch.cat([token_places(part, store) for part in parts]), device)
        self.plan: Plan | None = None
        if own and fits(store.block_tokens):
            told, queries = planned([(part.start, part.end) for part in parts])
            told = sent(told, device)
            self.plan = Plan(told[:3], told[3], queries)
            self.table = sent(block_table([blocks_to(part, store) for part in parts], store.filler), device)
            return
        counts, ends = [part.end - part.start for part in parts], [part.end for part in parts]
        self.starts_q = sent(torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32), device)
        self.starts_k = sent(torch.tensor([0, *ends]).cumsum(0, dtype=torch.int32), device)
        self.longest_q, self.longest_k = max(counts), max(ends)
        self.whole: Tensor | None = None  # (Tk, Hq) where each head's tokens of all rows lie, past and new
        if any(part.start for part in parts):
            whole = sent(torch.cat([token_places(Part(part.row, 0, part.end), store) for part in parts]), device)
            shared = torch.arange(heads.query, device=device) // (heads.query // heads.shared)  # the head whose keys it meets
            self.whole = whole[:, None] + shared * store.block_tokens

    def __call__(self, layer: int, qkv: Tensor, norms: HeadNorms | None) -> Tensor:
        hq, hk, d = self.heads
        keys, values = self.store.keys[layer], self.store.values[layer]
        turn_and_put(qkv, self.heads, self.turn, norms, self.places, keys, values)
        if self.plan is not None:
            return look_back(qkv, self.heads, self.plan, keys, values, self.table)
        q, k, v = (x.unflatten(1, (-1, d)) for x in qkv.split((hq * d, hk * d, hk * d), dim=1))
        if self.whole is not None:
            k, v = self.store.tokens(layer, self.whole)  # once for each query head, as the packed kernel wants it
        return packed(q, k, v, self.starts_q, self.starts_k, self.longest_q, self.longest_k).flatten(1)


class PagedCuda:
    """For one step that is not run by a graph. turn: of all tokens, growing rows' first. own: see Prompts."""

    def __init__(self, store: BlockStore, heads: Heads, turn: Turn, parts: Sequence[Part], device: torch.device, *, own: bool):
        self.growing = sum(part.end - part.start == 1 for part in parts)
        rows, prompts = parts[: self.growing], parts[self.growing :]
        cosine, sine, places = turn
        self.first: Growing | None = None
        if rows:
            positions = sent(torch.tensor([part.start for part in rows], dtype=torch.int32), device)
            table = sent(block_table([blocks_to(part, store) for part in rows], store.filler), device)
            self.first = Growing(store, heads, Turn(cosine, sine, places[: self.growing]), table, positions)
        self.rest: Prompts | None = None
        if prompts:
            self.rest = Prompts(store, heads, Turn(cosine, sine, places[self.growing :]), prompts, device, own)

    def __call__(self, layer: int, qkv: Tensor, norms: HeadNorms | None) -> Tensor:
        n = self.growing
        seen = []
        if self.first is not None:
            seen.append(self.first(layer, qkv[:n], norms))
        if self.rest is not None:
            seen.append(self.rest(layer, qkv[n:], norms))
        return torch.cat(seen) if len(seen) > 1 else seen[0]


def block_table(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """(R, W) int32; shorter rows are filled up."""
    widest = max(len(blocks) for blocks in rows)
    return torch.tensor([[*blocks, *[filler] * (widest - len(blocks))] for blocks in rows], dtype=torch.int32)
