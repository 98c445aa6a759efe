"""How queries meet keys: the seam between the decoder and whoever runs it.

The decoder is handed an Attend and calls it once a layer; rows lie back to back, nothing is padded.
T new tokens of all rows, Hq query heads, Hk key-value heads, D width of a head.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attend(Protocol):
    """How one layer's new queries meet old and new keys. The model calls it; the caller chose it."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (T, Hq, D), k and v (T, Hk, D), new tokens of all rows back to back -> (T, Hq, D)."""
        ...


class Causal:
    """Rows without a past, for training and for scoring: each token sees its own row up to itself.

    lengths: tokens of each row, in the order in which the rows lie.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.lengths = list(lengths)
        self.longest = max(self.lengths)
        ends = torch.tensor([0, *self.lengths], device=device).cumsum(0)
        self.starts = ends.to(torch.int32)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
            return self._packed(q, k, v)
        rows = zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        return torch.cat([one_row(*row) for row in rows])

    def _packed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One kernel for all rows. Imported here: the module exists only where torch was built for it.
        from torch.nn.attention.varlen import varlen_attn

        shared = q.shape[1] // k.shape[1]
        if shared > 1:  # torch 2.11 has no enable_gqa here; a copy of few heads costs less than a second code path
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        return varlen_attn(q, k, v, self.starts, self.starts, self.longest, self.longest, window_size=(-1, 0))


class Dense:
    """Rows with a past, for plain generation: one growing cache of keys and values a row and a layer.

    Call `begin(lengths)` before each forward pass with the number of new tokens of each row.
    """

    def __init__(self, rows: int, layers: int):
        self.caches: list[list[tuple[Tensor, Tensor] | None]] = [[None] * layers for _ in range(rows)]
        self.lengths: list[int] = []

    def begin(self, lengths: Sequence[int]) -> None:
        """lengths: new tokens of each row that is still here."""
        assert len(lengths) == len(self.caches)
        self.lengths = list(lengths)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these (indices into the rows that are still here)."""
        self.caches = [self.caches[row] for row in rows]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(self.caches, q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        return torch.cat([self._row(cache, layer, *part) for cache, *part in parts])

    def _row(self, cache: list[tuple[Tensor, Tensor] | None], layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past = cache[layer]
        if past is not None:
            k, v = torch.cat((past[0], k)), torch.cat((past[1], v))
        cache[layer] = (k, v)
        return one_row(q, k, v)


def one_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one row whose new queries are the last of its keys. q (T, Hq, D), k, v (S, Hk, D) -> (T, Hq, D)."""
    new, old = q.shape[0], k.shape[0] - q.shape[0]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = None
    if old and new > 1:  # is_causal would align the mask to the upper left; with a past it must be the lower right
        mask = torch.ones(new, old + new, dtype=torch.bool, device=q.device).tril(old)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not old and new > 1, enable_gqa=True)
    return out[0].transpose(0, 1)
