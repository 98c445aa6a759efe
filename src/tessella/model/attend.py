"""How queries meet keys: the seam between the decoder and whoever runs it.

The decoder is handed an Attend and calls it once a layer; rows lie back to back, nothing is padded.
T new tokens of all rows, Hq query heads, Hk key-value heads, D width of a head.
"""

from collections.abc import Sequence
from typing import Any, Protocol

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
        ends = torch.tensor([0, *self.lengths]).cumsum(0, dtype=torch.int32)
        self.starts = ends.to(device, non_blocking=True)  # made on the device, each pass would wait for the one before
        self.blocks = Blocks(self.lengths) if torch.device(device).type == "cpu" else None

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cuda" and q.dtype in (torch.bfloat16, torch.float16):
            return packed(q, k, v, self.starts, self.starts, self.longest, self.longest)
        if self.blocks is not None and q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
            return self.blocks(q, k, v)
        rows = zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        return torch.cat([one_row(*row) for row in rows])


def packed(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int) -> Tensor:
    """One 16-bit kernel for all rows on a GPU: each query sees its row's keys up to itself, the last with the last.

    q (Tq, Hq, D), k, v (Tk, Hk, D), starts (R + 1,) int32: where each row's queries and keys begin, and the end.
    """
    # Imported here: the module exists only where torch was built for it.
    from torch.nn.attention.varlen import varlen_attn

    shared = q.shape[1] // k.shape[1]
    if shared > 1:  # torch 2.11 has no enable_gqa here; a copy of few heads costs less than a second code path
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    out = varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, window_size=(-1, 0))
    assert isinstance(out, Tensor)  # a tuple only when the log-sum-exp is asked for
    return out


LONGEST_SCORED = 512  # tokens of a row up to which its scores (Hq, T, T) are held for the backward run
FILL = 0.8  # rows share a block when the shortest has at least this share of the longest's tokens


class Blocks:
    """Causal attention for teaching on a CPU: rows of about one length are laid side by side and run as batched products.

    There the backward run of scaled_dot_product_attention took half of a whole bf16 step (48 ms a layer for 18 rows of 115
    tokens, 9 heads of 64; these products: 4 ms; 2-core Xeon with AMX, torch 2.13, 2026-11-23).
    Fillers stand behind their row, where a causal mask keeps them from being seen; what they see is dropped.
    """

    def __init__(self, lengths: Sequence[int]):
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        groups: list[list[int]] = []
        for row in reversed(order):  # the longest first
            if not groups or lengths[row] < FILL * lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(row)
        self.shapes = [(len(group), lengths[group[0]]) for group in groups]  # rows and tokens of each block
        last = starts[-1] - 1
        spread, back = [], torch.empty(starts[-1], dtype=torch.int64)
        place = 0
        for group, (_, side) in zip(groups, self.shapes, strict=True):
            for row in group:
                spread.append((starts[row] + torch.arange(side)).clamp_(max=last))
                back[starts[row] : starts[row + 1]] = place + torch.arange(lengths[row])
                place += side
        self.spread, self.back = torch.cat(spread), back

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = [rows * side for rows, side in self.shapes]
        parts = [Spread.apply(x, self.spread, self.back).split(sizes) for x in (q, k, v)]
        blocks = [one_block(*part, *shape) for *part, shape in zip(*parts, self.shapes, strict=True)]
        return Gather.apply(torch.cat(blocks), self.back)


class Spread(torch.autograd.Function):
    """x[spread]; back says where each token's own copy lies. Fillers have no gradient: nobody sees them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0].index_select(0, ctx.back), None, None


class Gather(torch.autograd.Function):
    """x[back], each place at most once; so the gradient is copied where index_select's own would be added up slowly."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: Tensor) -> Tensor:
        ctx.back, ctx.length = back, len(x)
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        return grad.new_zeros(ctx.length, *grad.shape[1:]).index_copy_(0, ctx.back, grad), None


def one_block(q: Tensor, k: Tensor, v: Tensor, rows: int, side: int) -> Tensor:
    """Causal attention of rows of one length. q (rows * side, Hq, D), k, v (rows * side, Hk, D) -> (rows * side, Hq, D)."""
    (_, heads, d), shared = q.shape, k.shape[1]
    if side > LONGEST_SCORED:
        q, k, v = (x.unflatten(0, (rows, side)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)
    # Heads that share keys are one product: (rows * Hk, Hq / Hk * side, D) against (rows * Hk, side, D).
    q = (q * d**-0.5).unflatten(0, (rows, side)).transpose(1, 2).reshape(rows * shared, -1, d)
    k, v = (x.unflatten(0, (rows, side)).transpose(1, 2).reshape(rows * shared, side, d) for x in (k, v))
    hidden = torch.full((side, side), float("-inf"), dtype=q.dtype).triu(1)
    scores = torch.bmm(q, k.transpose(1, 2)).unflatten(1, (-1, side)) + hidden
    seen = torch.bmm(scores.softmax(-1).flatten(1, 2), v)
    return seen.reshape(rows, heads, side, d).transpose(1, 2).flatten(0, 1)


class Dense:
    """Rows with a past, for plain generation: first all prompts, then one token of each row at a time.

    Keys and values lie side by side, (R, S, Hk, D) a layer for R rows, shorter rows with room behind them.
    Call `begin(lengths)` before each forward pass with the number of new tokens of each row that is still here.
    """

    def __init__(self, rows: int, layers: int, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.past = [0] * rows  # tokens of each row that are held
        self.prompts: Causal | None = None
        self.places = torch.empty(0)  # where each row's new token goes
        self.held: Tensor | None = None  # (R, S) true where a row has a token; None when all are of one length

    def begin(self, lengths: Sequence[int]) -> None:
        """lengths: new tokens of each row: its prompt at first, then 1."""
        assert len(lengths) == len(self.past)
        first = not any(self.past)
        assert first or all(new == 1 for new in lengths), "after the prompt a row grows by one token at a time"
        self.prompts = Causal(lengths, self.device) if first else None
        if not first:
            ends = torch.tensor(self.past, device=self.device)
            self.places = ends
            same = min(self.past) == max(self.past)
            self.held = None if same else torch.arange(max(self.past) + 1, device=self.device) <= ends[:, None]
        self.past = [old + new for old, new in zip(self.past, lengths, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Drop every row but these (indices into the rows that are still here)."""
        if len(rows) == len(self.past):
            return
        chosen = torch.tensor(rows, device=self.device)
        for stores in (self.keys, self.values):
            stores[:] = [None if store is None else store[chosen] for store in stores]
        self.past = [self.past[row] for row in rows]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.prompts is not None:
            self.keys[layer], self.values[layer] = (side_by_side(x, self.past) for x in (k, v))
            return self.prompts(layer, q, k, v)
        keys, values = (self._grow(stores, layer, x) for stores, x in ((self.keys, k), (self.values, v)))
        longest = max(self.past)
        keys, values = (x[:, :longest].transpose(1, 2) for x in (keys, values))
        mask = None if self.held is None else self.held[:, None, None, :]
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask, enable_gqa=True)
        return out[:, :, 0]

    def _grow(self, stores: list[Tensor | None], layer: int, new: Tensor) -> Tensor:
        """Put the new token (R, Hk, D) of each row behind what the row holds."""
        store = stores[layer]
        assert store is not None, "begin with the prompts"
        if store.shape[1] < max(self.past):
            store = F.pad(store, (0, 0, 0, 0, 0, ROOM))
            stores[layer] = store
        store[torch.arange(len(new), device=new.device), self.places] = new
        return store


ROOM = 64  # tokens by which a full store grows


def side_by_side(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Rows back to back (T, Hk, D) -> (R, S + ROOM, Hk, D), zeros behind the shorter ones."""
    out = x.new_zeros(len(lengths), max(lengths) + ROOM, *x.shape[1:])
    for row, part in enumerate(x.split(list(lengths))):
        out[row, : len(part)] = part
    return out


def one_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one row without a past. q (T, Hq, D), k, v (T, Hk, D) -> (T, Hq, D)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
