"""Keys and values in blocks that rows share, and how queries meet them: the engine's Attend.

In: queries, keys, values of a step's new tokens.  Out: what each query sees of its own row up to itself.
T new tokens of all rows, R rows with one new token each, which stand in front; Hq, Hk heads of width D; B tokens a block.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tessella.config import LanguageConfig
from tessella.engine.scheduler import Part


class BlockStore:
    """The blocks themselves: a layer's keys (blocks, Hk, B, D), and its values. The last block is nobody's, a place for fillers.

    Heads before tokens, so that a head's tokens of one block are one piece of memory, and a gather of blocks is what bmm takes.
    """

    def __init__(self, config: LanguageConfig, blocks: int, block_tokens: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_layers, blocks + 1, config.num_kv_heads, block_tokens, config.head_dim)
        self.block_tokens = block_tokens
        self.heads = config.num_kv_heads
        self.filler = blocks
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def bytes_a_block(config: LanguageConfig, block_tokens: int, dtype: torch.dtype) -> int:
        return 2 * config.num_layers * config.num_kv_heads * block_tokens * config.head_dim * dtype.itemsize

    def put(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v (T, Hk, D) go to places (T * Hk,), counted in heads' tokens: (block * Hk + head) * B + offset."""
        for store, new in ((self.keys, k), (self.values, v)):
            store[layer].view(-1, new.shape[-1]).index_copy_(0, places, new.reshape(-1, new.shape[-1]))

    def gather(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """table (R, Hk, W) of block * Hk + head -> keys and values (R, Hk, W * B, D)."""
        rows, heads, _ = table.shape
        flat = table.reshape(-1)
        keys, values = (
            store[layer].flatten(0, 1).index_select(0, flat).view(rows, heads, -1, store.shape[-1])
            for store in (self.keys, self.values)
        )
        return keys, values

    def tokens(self, layer: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """places (T, H), counted in heads' tokens -> keys and values (T, H, D)."""
        keys, values = (store[layer].view(-1, store.shape[-1])[places] for store in (self.keys, self.values))
        return keys, values


class Paged:
    """For one step. parts: what is run, those of one token in front; blocks are read from the rows.

    Plain torch, on any device and in any number type; paged_cuda.py has the kernels for 16-bit types on a GPU.
    """

    def __init__(self, store: BlockStore, parts: Sequence[Part], device: torch.device):
        self.store = store
        self.device = device
        self.growing = sum(part.end - part.start == 1 for part in parts)
        self.places = places_of(parts, store).to(device)
        rows = parts[: self.growing]
        self.mask: Tensor | None = None
        self.table: Tensor | None = None
        if rows:
            self.table = head_table([blocks_to(part, store) for part in rows], store).to(device)
            ends = torch.tensor([part.end for part in rows])
            held = torch.arange(self.table.shape[2] * store.block_tokens) < ends[:, None]
            self.mask = additive(held, store.keys.dtype).to(device)[:, None, None]
        self.prompts = [Prompt(part, store, device) for part in parts[self.growing :]]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.store.put(layer, self.places, k, v)
        seen = []
        if self.table is not None:
            keys, values = self.store.gather(layer, self.table)
            # Heads that share keys are queries of one head: three times as fast as enable_gqa on a CPU.
            groups = q[: self.growing].unflatten(1, (self.store.heads, -1))
            out = F.scaled_dot_product_attention(groups, keys, values, attn_mask=self.mask)
            seen.append(out.flatten(1, 2))
        at = self.growing
        for prompt in self.prompts:
            new = slice(at, at + prompt.tokens)
            seen.append(prompt(layer, q[new], k[new], v[new]))
            at += prompt.tokens
        return torch.cat(seen) if len(seen) > 1 else seen[0]


class Prompt:
    """One row with several new tokens, with or without a past."""

    def __init__(self, part: Part, store: BlockStore, device: torch.device):
        self.tokens, self.past, self.end = part.end - part.start, part.start, part.end
        self.store = store
        if self.past:
            self.table = head_table([blocks_to(part, store)], store).to(device)
            sees = torch.arange(self.end) <= torch.arange(self.past, self.end)[:, None]
            self.mask = additive(sees, store.keys.dtype).to(device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (n, Hq, D), k, v (n, Hk, D) of n new tokens -> (n, Hq, D)."""
        if not self.past:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        keys, values = (x[:, :, : self.end] for x in self.store.gather(layer, self.table))
        out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], keys, values, attn_mask=self.mask, enable_gqa=True)
        return out[0].transpose(0, 1)


def blocks_to(part: Part, store: BlockStore) -> list[int]:
    """The blocks that hold a row's tokens up to the end of the part."""
    return part.row.blocks[: -(-part.end // store.block_tokens)]


def places_of(parts: Sequence[Part], store: BlockStore) -> Tensor:
    """(T * Hk,) int64: where each head of each new token goes, as BlockStore.put wants it."""
    places = torch.cat([token_places(part, store) for part in parts])
    return (places[:, None] + torch.arange(store.heads) * store.block_tokens).flatten()


def token_places(part: Part, store: BlockStore) -> Tensor:
    """(T,) int64: where each token of a part lies, as of head 0, counted in heads' tokens: block * Hk * B + offset."""
    size, at = store.block_tokens, torch.arange(part.start, part.end)
    return torch.tensor(part.row.blocks)[at // size] * (store.heads * size) + at % size


def head_table(rows: Sequence[Sequence[int]], store: BlockStore) -> Tensor:
    """Blocks of R rows -> (R, Hk, W) of block * Hk + head; shorter rows are filled up."""
    widest = max(len(blocks) for blocks in rows)
    table = torch.tensor([[*blocks, *[store.filler] * (widest - len(blocks))] for blocks in rows])
    return table[:, None] * store.heads + torch.arange(store.heads)[:, None]


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """true -> 0, false -> -inf: what scaled_dot_product_attention adds to the scores."""
    return torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, float("-inf"))
