"""Triton kernels of what lies between the matrix products: sums, norms, gates, the choice of ids; each as one launch.

In and out: tensors on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1), with which the tests run them.
T tokens, R rows, C width, V vocabulary. Arithmetic is float32; results are rounded where torch's own operations would round.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessella.engine.kernels.counts import pieces, power_of_two

GATES_AT_ONCE = 1024
IDS_AT_ONCE = 4096


@triton.jit
def _add_norm(x, more, weight, summed, out, eps, WIDTH: tl.constexpr, P: tl.constexpr, ADD: tl.constexpr):
    """One program: one token. P: the power of two that holds the width."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, P)
    here = c < WIDTH
    kind = out.dtype.element_ty
    wide = tl.load(x + row * WIDTH + c, mask=here, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(more + row * WIDTH + c, mask=here, other=0.0).to(tl.float32)
        rounded = wide.to(kind)
        tl.store(summed + row * WIDTH + c, rounded, mask=here)
        wide = rounded.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    scaled = tl.load(weight + c, mask=here, other=0.0).to(tl.float32) * wide.to(kind).to(tl.float32)
    tl.store(out + row * WIDTH + c, scaled.to(kind), mask=here)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """What RMSNorm.forward does. x (T, C) -> (T, C)."""
    tokens, width = x.shape
    assert x.is_contiguous()
    out = torch.empty_like(x)
    _add_norm[(tokens,)](x, x, weight, x, out, eps, WIDTH=width, P=power_of_two(width), ADD=False)
    return out


def add_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + more, and what RMSNorm.forward does to it. x and more (T, C) -> two of (T, C)."""
    tokens, width = x.shape
    assert x.is_contiguous() and more.is_contiguous()
    summed, out = torch.empty_like(x), torch.empty_like(x)
    _add_norm[(tokens,)](x, more, weight, summed, out, eps, WIDTH=width, P=power_of_two(width), ADD=True)
    return summed, out


@triton.jit
def _gate(joined, out, WIDTH: tl.constexpr, N: tl.constexpr):
    """One program: N numbers of one token."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    here = c < WIDTH
    g = tl.load(joined + row * 2 * WIDTH + c, mask=here, other=0.0)
    up = tl.load(joined + row * 2 * WIDTH + WIDTH + c, mask=here, other=0.0)
    kind = g.dtype
    g = g.to(tl.float32)
    g = (g / (1.0 + tl.exp(-g))).to(kind).to(tl.float32)
    tl.store(out + row * WIDTH + c, (g * up.to(tl.float32)).to(kind), mask=here)


def gate(joined: Tensor) -> Tensor:
    """silu(gate) * up of a joined product. joined (T, 2 * C): gate, then up -> (T, C)."""
    tokens, width = joined.shape[0], joined.shape[1] // 2
    assert joined.is_contiguous()
    out = torch.empty((tokens, width), device=joined.device, dtype=joined.dtype)
    _gate[(tokens, pieces(width, GATES_AT_ONCE))](joined, out, WIDTH=width, N=GATES_AT_ONCE)
    return out


@triton.jit(do_not_specialize_on_alignment=["ids", "places", "drawn"])
def _read(ids, places, drawn, table, out, WIDTH: tl.constexpr, P: tl.constexpr):
    """One program: one row's new token, told by the host or drawn by the step before, becomes its embedding."""
    row, c = tl.program_id(0), tl.arange(0, P)
    place = tl.load(places + row)
    token = tl.load(ids + row).to(tl.int64)
    if place >= 0:
        token = tl.load(drawn + place)
    here = c < WIDTH
    tl.store(out + row.to(tl.int64) * WIDTH + c, tl.load(table + token * WIDTH + c, mask=here, other=0.0), mask=here)


def read(ids: Tensor, places: Tensor, drawn: Tensor, table: Tensor) -> Tensor:
    """Embeddings (R, C) of new tokens. ids (R,) int32; places (R,) int32: the place in drawn (…,) int64 of the id that stands
    for it, or -1. table (V, C) is the embedding table.
    """
    width = table.shape[1]
    assert ids.stride(0) == places.stride(0) == drawn.stride(0) == 1 and table.is_contiguous()
    out = torch.empty((len(ids), width), device=table.device, dtype=table.dtype)
    _read[(len(ids),)](ids, places, drawn, table, out, WIDTH=width, P=power_of_two(width))
    return out


@triton.jit
def _best_of_some(logits, best, where, stride, V: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """One program: the largest of N logits of one row, and the lowest id that has it; a NaN counts as infinite."""
    row, part = tl.program_id(0), tl.program_id(1)
    at = part * N + tl.arange(0, N)
    x = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < V, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    largest = tl.max(x, 0)
    tl.store(best + row * PARTS + part, largest)
    tl.store(where + row * PARTS + part, tl.min(tl.where(x == largest, at, V - 1), 0))


@triton.jit(do_not_specialize_on_alignment=["ids", "finite"])
def _best_of_all(best, where, ids, finite, V: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr):
    """One program: one row. finite: whether all of its logits are numbers, and none of them infinitely large."""
    row, part = tl.program_id(0), tl.arange(0, P)
    x = tl.load(best + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    at = tl.load(where + row * PARTS + part, mask=part < PARTS, other=V - 1)
    largest = tl.max(x, 0)
    tl.store(ids + row, tl.min(tl.where(x == largest, at, V - 1), 0).to(tl.int64))
    tl.store(finite + row, ((largest < float("inf")) & (largest > float("-inf"))).to(tl.int64))


def likeliest(logits: Tensor, ids: Tensor, finite: Tensor) -> None:
    """The likeliest id of each row, and 1 where its logits are finite, else 0. logits (R, V); ids and finite (R,) int64."""
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1 and ids.stride(0) == finite.stride(0) == 1
    parts = pieces(vocabulary, IDS_AT_ONCE)
    best = torch.empty((rows, parts), device=logits.device, dtype=torch.float32)
    where = torch.empty((rows, parts), device=logits.device, dtype=torch.int32)
    _best_of_some[(rows, parts)](logits, best, where, logits.stride(0), V=vocabulary, N=IDS_AT_ONCE, PARTS=parts)
    _best_of_all[(rows,)](best, where, ids, finite, V=vocabulary, PARTS=parts, P=power_of_two(parts))
