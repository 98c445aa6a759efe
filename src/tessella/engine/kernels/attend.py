"""Triton kernels for rows that grow by one token: norm, turn, keep and look back in one launch, join the stretches in another.

In and out: tensors on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1), with which the tests run them.
R rows with one new token each, T tokens, Hq query and Hk key-value heads of width D, B tokens a block. Arithmetic is float32;
results are rounded where torch's own operations would round, so that they differ from them by order of summation alone.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessella.engine.kernels.counts import power_of_two

TOKENS_AT_ONCE = 64  # of one row in one turn of the loop
PROGRAMS = 512  # about four for each of a large GPU's multiprocessors
MOST_SPLITS = 32


class Turn(NamedTuple):
    """Rotary angles: token t turns by row places[t] of cosine and sine (L, D), whose halves are equal. places (T,) int32."""

    cosine: Tensor
    sine: Tensor
    places: Tensor


class HeadNorms(NamedTuple):
    """What each query and each key is normed by before it turns; weights (D,)."""

    query: Tensor
    key: Tensor
    eps: float


class Heads(NamedTuple):
    """How the columns of a joined product lie: all queries, then all keys, then all values."""

    query: int
    shared: int  # key-value heads
    width: int

    @property
    def columns(self) -> int:
        return (self.query + 2 * self.shared) * self.width


@triton.jit
def _normed_half(low, high, weight, d, inside, eps, D: tl.constexpr):
    """Heads (H, D / 2) in two halves, as RMSNorm would leave them."""
    kind = low.dtype
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    square = tl.sum(wide_low * wide_low, 1) + tl.sum(wide_high * wide_high, 1)
    scale = tl.rsqrt(square / D + eps)[:, None]
    weight_low = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    weight_high = tl.load(weight + D // 2 + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    low = (weight_low * (wide_low * scale).to(kind).to(tl.float32)).to(kind)
    high = (weight_high * (wide_high * scale).to(kind).to(tl.float32)).to(kind)
    return low, high


@triton.jit
def _turned(low, high, cosine, sine):
    """Heads (H, D / 2) in two halves, as layers.rotate would leave them. cosine, sine (D / 2,)"""
    kind = low.dtype
    wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
    c, s = cosine.to(tl.float32)[None, :], sine.to(tl.float32)[None, :]
    new_low = (wide_low * c).to(kind).to(tl.float32) - (wide_high * s).to(kind).to(tl.float32)
    new_high = (wide_high * c).to(kind).to(tl.float32) + (wide_low * s).to(kind).to(tl.float32)
    return new_low.to(kind), new_high.to(kind)


# The table's width and where these tensors begin change from step to step; each kind would be compiled anew.
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["places", "table", "positions"])
def _grow(
    qkv, cosine, sine, places, query_norm, key_norm, keys, values, table, positions, partial, weights,
    eps, scale, qkv_stride, table_stride,
    HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, DP: tl.constexpr,
    B: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program: one row, one key-value head with its G query heads, one stretch of the row's tokens.

    The program whose stretch holds the new token puts its key and value into the block; nobody reads them from there now.
    partial is the answer itself where a row is one stretch. GP, HALF and DP are powers of two.
    """
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    stretch = tl.cdiv(tl.cdiv(position + 1, SPLITS), N) * N
    begin = split * stretch
    mine = (begin <= position) & (position < begin + stretch)
    end = tl.minimum(begin + stretch, position)  # of the tokens that were there before
    g, h, d, n = tl.arange(0, GP), tl.arange(0, HALF), tl.arange(0, DP), tl.arange(0, N)
    half, whole = h < D // 2, d < D
    angle = tl.load(places + row) * D + h
    turn_cosine = tl.load(cosine + angle, mask=half, other=0.0)
    turn_sine = tl.load(sine + angle, mask=half, other=0.0)

    line = qkv + row.to(tl.int64) * qkv_stride
    at = (head * G + g)[:, None] * D + h[None, :]
    exists = (g[:, None] < G) & half[None, :]
    low = tl.load(line + at, mask=exists, other=0.0)
    high = tl.load(line + at + D // 2, mask=exists, other=0.0)
    at = HK * G * D + head * D + h[None, :]
    new_low = tl.load(line + at, mask=half[None, :], other=0.0)  # (1, HALF)
    new_high = tl.load(line + at + D // 2, mask=half[None, :], other=0.0)
    new_value = tl.load(line + HK * (G + 1) * D + head * D + d, mask=whole, other=0.0)
    if NORM:
        low, high = _normed_half(low, high, query_norm, h, half, eps, D)
        new_low, new_high = _normed_half(new_low, new_high, key_norm, h, half, eps, D)
    low, high = _turned(low, high, turn_cosine, turn_sine)
    new_low, new_high = _turned(new_low, new_high, turn_cosine, turn_sine)

    if mine:
        block = tl.load(table + row * table_stride + position // B).to(tl.int64)
        place = ((block * HK + head) * B + position % B) * D
        tl.store(keys + place + h[None, :], new_low, mask=half[None, :])
        tl.store(keys + place + D // 2 + h[None, :], new_high, mask=half[None, :])
        tl.store(values + place + d, new_value, mask=whole)
    own = tl.sum(low.to(tl.float32) * new_low.to(tl.float32), 1) + tl.sum(high.to(tl.float32) * new_high.to(tl.float32), 1)
    top = tl.where(mine, own * scale, float("-inf"))
    total = tl.where(mine, 1.0, 0.0) + tl.zeros((GP,), tl.float32)
    seen = tl.where(mine, new_value.to(tl.float32), 0.0)[None, :] + tl.zeros((GP, DP), tl.float32)

    for start in range(begin, end, N):
        token = start + n
        here = token < end
        block = tl.load(table + row * table_stride + token // B, mask=here, other=0).to(tl.int64)
        place = ((block * HK + head) * B + token % B)[:, None] * D
        k_low = tl.load(keys + place + h[None, :], mask=here[:, None] & half[None, :], other=0.0)
        k_high = tl.load(keys + place + D // 2 + h[None, :], mask=here[:, None] & half[None, :], other=0.0)
        score = tl.dot(low, tl.trans(k_low), input_precision="ieee")
        score = tl.dot(high, tl.trans(k_high), score, input_precision="ieee") * scale
        score = tl.where(here[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - higher[:, None])
        fade = tl.exp(top - higher)
        v = tl.load(values + place + d[None, :], mask=here[:, None] & whole[None, :], other=0.0)
        seen = seen * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        top = higher
    found = tl.where(total > 0, total, 1.0)  # a stretch without tokens has weight exp(-inf) = 0
    out = (row * SPLITS + split) * HK * G + head * G + g
    kind = partial.dtype.element_ty
    tl.store(partial + out[:, None] * D + d[None, :], (seen / found[:, None]).to(kind), mask=(g[:, None] < G) & whole[None, :])
    if SPLITS > 1:
        tl.store(weights + out, tl.where(total > 0, top + tl.log(found), float("-inf")), mask=g < G)


@triton.jit
def _combine(partial, weights, out, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """One program: one row, one query head; the stretches become one."""
    row, head = tl.program_id(0), tl.program_id(1)
    s, d = tl.arange(0, SPLITS), tl.arange(0, DP)
    place = (row * SPLITS + s) * HEADS + head
    weight = tl.load(weights + place)
    weight = tl.exp(weight - tl.max(weight, 0))
    part = tl.load(partial + place[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
    seen = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (row * HEADS + head) * D + d, seen.to(out.dtype.element_ty), mask=d < D)


def grow(
    qkv: Tensor, heads: Heads, turn: Turn, norms: HeadNorms | None, keys: Tensor, values: Tensor, table: Tensor, positions: Tensor
) -> Tensor:
    """What the new tokens of growing rows see; their keys and values are put into their rows' blocks.

    qkv (R, columns), as the joined product leaves them; keys and values (blocks, Hk, B, D), table (R, W) int32, positions (R,)
    int32 of the new tokens -> (R, Hq * D).
    """
    rows, (hq, hk, d) = len(qkv), heads
    splits = splits_of(rows * hk)
    out = torch.empty((rows, hq * d), device=qkv.device, dtype=qkv.dtype)
    partial = torch.empty((rows, splits, hq, d), device=qkv.device, dtype=torch.float32) if splits > 1 else out
    weights = torch.empty((rows, splits, hq), device=qkv.device, dtype=torch.float32) if splits > 1 else out
    assert qkv.stride(1) == table.stride(1) == positions.stride(0) == 1 and keys.is_contiguous() and values.is_contiguous()
    cosine, sine, places = turn
    query, key, eps = norms or HeadNorms(cosine, cosine, 0.0)
    sizes = grow_sizes(heads, keys.shape[2], splits, norms is not None)
    _grow[(rows, hk, splits)](
        qkv, cosine, sine, places, query, key, keys, values, table, positions, partial, weights,
        eps, d**-0.5, qkv.stride(0), table.stride(0), **sizes,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows, hq)](partial, weights, out, HEADS=hq, D=d, DP=power_of_two(d), SPLITS=splits)
    return out


@cache
def grow_sizes(heads: Heads, block_tokens: int, splits: int, normed: bool) -> dict[str, int | bool]:
    """What _grow is compiled for."""
    group, d = heads.query // heads.shared, heads.width
    return {
        "HK": heads.shared,
        "G": group,
        "GP": max(16, power_of_two(group)),  # the least that a product of matrices takes
        "D": d,
        "HALF": max(16, power_of_two(d // 2)),
        "DP": power_of_two(d),
        "B": block_tokens,
        "N": TOKENS_AT_ONCE,
        "SPLITS": splits,
        "NORM": normed,
    }


def splits_of(programs: int) -> int:
    """Stretches that a row is cut into, a power of two: many where few rows would leave the GPU idle."""
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * programs <= PROGRAMS:
        splits *= 2
    return splits


@triton.jit(do_not_specialize_on_alignment=["places", "slots"])
def _turn_and_put(
    qkv, cosine, sine, places, query_norm, key_norm, slots, keys, values, eps, qkv_stride,
    HQ: tl.constexpr, HQP: tl.constexpr, HK: tl.constexpr, HKP: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One program: all heads of one token. HQP and HKP are the powers of two that hold the heads."""
    token = tl.program_id(0)
    q, k, h, d = tl.arange(0, HQP), tl.arange(0, HKP), tl.arange(0, HALF), tl.arange(0, DP)
    half, whole = h < D // 2, d < D
    angle = tl.load(places + token) * D + h
    turn_cosine = tl.load(cosine + angle, mask=half, other=0.0)
    turn_sine = tl.load(sine + angle, mask=half, other=0.0)
    line = qkv + token.to(tl.int64) * qkv_stride
    slot = tl.load(slots + token)

    at, here = q[:, None] * D + h[None, :], (q[:, None] < HQ) & half[None, :]
    low = tl.load(line + at, mask=here, other=0.0)
    high = tl.load(line + at + D // 2, mask=here, other=0.0)
    if NORM:
        low, high = _normed_half(low, high, query_norm, h, half, eps, D)
    low, high = _turned(low, high, turn_cosine, turn_sine)
    tl.store(line + at, low, mask=here)
    tl.store(line + at + D // 2, high, mask=here)

    at, here = HQ * D + k[:, None] * D + h[None, :], (k[:, None] < HK) & half[None, :]
    low = tl.load(line + at, mask=here, other=0.0)
    high = tl.load(line + at + D // 2, mask=here, other=0.0)
    if NORM:
        low, high = _normed_half(low, high, key_norm, h, half, eps, D)
    low, high = _turned(low, high, turn_cosine, turn_sine)
    tl.store(line + at, low, mask=here)
    tl.store(line + at + D // 2, high, mask=here)
    kept = (slot + k[:, None] * B) * D + h[None, :]
    tl.store(keys + kept, low, mask=here)
    tl.store(keys + kept + D // 2, high, mask=here)

    here = (k[:, None] < HK) & whole[None, :]
    value = tl.load(line + (HQ + HK) * D + k[:, None] * D + d[None, :], mask=here, other=0.0)
    tl.store(values + (slot + k[:, None] * B) * D + d[None, :], value, mask=here)


def turn_and_put(
    qkv: Tensor, heads: Heads, turn: Turn, norms: HeadNorms | None, slots: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Queries and keys of qkv (T, columns) are normed and turned in place; keys and values are put into their blocks, too.

    slots (T,) int64: block * Hk * B + offset, as of head 0, in keys and values (blocks, Hk, B, D).
    """
    assert qkv.stride(1) == slots.stride(0) == 1 and keys.is_contiguous() and values.is_contiguous()
    cosine, sine, places = turn
    query, key, eps = norms or HeadNorms(cosine, cosine, 0.0)
    sizes = turn_sizes(heads, keys.shape[2], norms is not None)
    _turn_and_put[(len(qkv),)](qkv, cosine, sine, places, query, key, slots, keys, values, eps, qkv.stride(0), **sizes)


@cache
def turn_sizes(heads: Heads, block_tokens: int, normed: bool) -> dict[str, int | bool]:
    """What _turn_and_put is compiled for."""
    d = heads.width
    return {
        "HQ": heads.query,
        "HQP": power_of_two(heads.query),
        "HK": heads.shared,
        "HKP": power_of_two(heads.shared),
        "D": d,
        "HALF": power_of_two(d // 2),
        "DP": power_of_two(d),
        "B": block_tokens,
        "NORM": normed,
    }
