"""Triton kernels of the decode step: what lies between the matrix products, each as one launch.

In and out: tensors on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1), with which the tests run them.
R rows with one new token each, T tokens, Hq query and Hk key-value heads of width D, B tokens a block. Arithmetic is float32;
results are rounded where torch's own operations would round, so that they differ from them by order of summation alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_AT_ONCE = 64  # of one row in one turn of the loop
PROGRAMS = 512  # about four for each of a large GPU's multiprocessors
MOST_SPLITS = 32


@triton.jit
def _decode(
    q, keys, values, table, lengths, partial, weights, scale, table_stride,
    HK: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    B: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One program: one row, one key-value head with its G query heads, one stretch of the row's tokens."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + row)
    stretch = tl.cdiv(tl.cdiv(length, SPLITS), N) * N
    begin = split * stretch
    end = tl.minimum(begin + stretch, length)
    g, d, n = tl.arange(0, GP), tl.arange(0, DP), tl.arange(0, N)
    inside = d[None, :] < D  # GP and DP are powers of two
    at = (row * HK * G + head * G + g[:, None]) * D + d[None, :]
    query = tl.load(q + at, mask=(g[:, None] < G) & inside, other=0.0)
    top = tl.full((GP,), float("-inf"), tl.float32)
    total = tl.zeros((GP,), tl.float32)
    seen = tl.zeros((GP, DP), tl.float32)
    for start in range(begin, end, N):
        token = start + n
        here = token < end
        block = tl.load(table + row * table_stride + token // B, mask=here, other=0).to(tl.int64)
        place = ((block * HK + head) * B + token % B)[:, None] * D + d[None, :]
        k = tl.load(keys + place, mask=here[:, None] & inside, other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(here[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - higher[:, None])
        fade = tl.exp(top - higher)
        v = tl.load(values + place, mask=here[:, None] & inside, other=0.0)
        seen = seen * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(p, 1)
        top = higher
    # A stretch without tokens has weight exp(-inf) = 0.
    found = tl.where(total > 0, total, 1.0)
    out = (row * SPLITS + split) * HK * G + head * G + g
    tl.store(partial + out[:, None] * D + d[None, :], seen / found[:, None], mask=(g[:, None] < G) & inside)
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


def decode(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """q (R, Hq, D), keys and values (blocks, Hk, B, D), table (R, W) int32, lengths (R,) int32, each at least 1 -> (R, Hq, D)."""
    rows, heads, d = q.shape
    _, shared, block_tokens, _ = keys.shape
    splits = splits_of(rows * shared)
    partial = torch.empty((rows, splits, heads, d), device=q.device, dtype=torch.float32)
    weights = torch.empty((rows, splits, heads), device=q.device, dtype=torch.float32)
    out = torch.empty((rows, heads, d), device=q.device, dtype=q.dtype)
    group, wide = heads // shared, triton.next_power_of_2(d)
    assert table.stride(1) == 1 and keys.is_contiguous() and values.is_contiguous()
    _decode[(rows, shared, splits)](
        q.contiguous(), keys, values, table, lengths, partial, weights, d**-0.5, table.stride(0),
        HK=shared, G=group, GP=max(16, triton.next_power_of_2(group)), D=d, DP=wide,
        B=block_tokens, N=TOKENS_AT_ONCE, SPLITS=splits,
    )  # fmt: skip
    _combine[(rows, heads)](partial, weights, out, HEADS=heads, D=d, DP=wide, SPLITS=splits)
    return out


def splits_of(programs: int) -> int:
    """Stretches that a row is cut into, a power of two: many where few rows would leave the GPU idle."""
    splits = 1
    while splits < MOST_SPLITS and 2 * splits * programs <= PROGRAMS:
        splits *= 2
    return splits


@triton.jit
def _put(k, v, places, keys, values, k_stride, v_stride, HK: tl.constexpr, B: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    token, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, DP)
    place = (tl.load(places + token) + head * B) * D + d
    tl.store(keys + place, tl.load(k + token * k_stride + head * D + d, mask=d < D), mask=d < D)
    tl.store(values + place, tl.load(v + token * v_stride + head * D + d, mask=d < D), mask=d < D)


def put(k: Tensor, v: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> None:
    """k, v (T, Hk, D) into keys and values (blocks, Hk, B, D); places (T,) int64: block * Hk * B + offset, as of head 0."""
    tokens, heads, d = k.shape
    assert k.stride()[1:] == v.stride()[1:] == (d, 1)
    sizes = {"HK": heads, "B": keys.shape[2], "D": d, "DP": triton.next_power_of_2(d)}
    _put[(tokens, heads)](k, v, places, keys, values, k.stride(0), v.stride(0), **sizes)


@triton.jit
def _rms_norm(x, weight, out, eps, WIDTH: tl.constexpr, P: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, P)
    wide = tl.load(x + row * WIDTH + c, mask=c < WIDTH, other=0.0).to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    kind = out.dtype.element_ty
    scaled = tl.load(weight + c, mask=c < WIDTH, other=0.0).to(tl.float32) * wide.to(kind).to(tl.float32)
    tl.store(out + row * WIDTH + c, scaled.to(kind), mask=c < WIDTH)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What RMSNorm.forward does. x (..., C) -> (..., C)."""
    x = x.contiguous()
    width = x.shape[-1]
    out = torch.empty_like(x)
    _rms_norm[(x.numel() // width,)](x, weight, out, eps, WIDTH=width, P=triton.next_power_of_2(width))
    return out


@triton.jit
def _rotate(q, k, cosine, sine, q_stride, k_stride, HQ: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """One program: one head of one token, in place. HALF: the power of two that holds D / 2."""
    token, head, d = tl.program_id(0), tl.program_id(1), tl.arange(0, HALF)
    inside = d < D // 2
    if head < HQ:
        place = q + token * q_stride + head * D
    else:
        place = k + token * k_stride + (head - HQ) * D
    low = tl.load(place + d, mask=inside, other=0.0)
    high = tl.load(place + D // 2 + d, mask=inside, other=0.0)
    kind = low.dtype
    low, high = low.to(tl.float32), high.to(tl.float32)
    cos_low = tl.load(cosine + token * D + d, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cosine + token * D + D // 2 + d, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sine + token * D + d, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sine + token * D + D // 2 + d, mask=inside, other=0.0).to(tl.float32)
    new_low = (low * cos_low).to(kind).to(tl.float32) - (high * sin_low).to(kind).to(tl.float32)
    new_high = (high * cos_high).to(kind).to(tl.float32) + (low * sin_high).to(kind).to(tl.float32)
    tl.store(place + d, new_low.to(kind), mask=inside)
    tl.store(place + D // 2 + d, new_high.to(kind), mask=inside)


def rotate_in_place(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> None:
    """What layers.rotate does to q (T, Hq, D) and k (T, Hk, D); cosine and sine (T, 1, D)."""
    tokens, heads, d = q.shape
    assert q.stride()[1:] == k.stride()[1:] == (d, 1) and cosine.is_contiguous() and sine.is_contiguous()
    grid = (tokens, heads + k.shape[1])
    half = triton.next_power_of_2(d // 2)
    _rotate[grid](q, k, cosine, sine, q.stride(0), k.stride(0), HQ=heads, D=d, HALF=half)


@triton.jit
def _silu_times(gate, up, out, count, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    here = at < count
    g = tl.load(gate + at, mask=here, other=0.0)
    kind = g.dtype
    g = g.to(tl.float32)
    g = (g / (1.0 + tl.exp(-g))).to(kind).to(tl.float32)
    tl.store(out + at, (g * tl.load(up + at, mask=here, other=0.0).to(tl.float32)).to(kind), mask=here)


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _silu_times[(triton.cdiv(gate.numel(), 1024),)](gate, up, out, gate.numel(), N=1024)
    return out
