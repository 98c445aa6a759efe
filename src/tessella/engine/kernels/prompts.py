"""Triton kernel for rows with several new tokens: queries look back through their rows' blocks, as these lie.

In and out: tensors on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1), with which the tests run them.
T new tokens of R rows, Hq query and Hk key-value heads of width D, B tokens a block, W blocks a row, M queries a program.
Torch's packed kernel wants each key head once for each query head, and a row's past gathered: here both are read where they are.
Arithmetic is float32; weights of values are rounded to their type, as in FlashAttention.
Source: FlashAttention-2, arXiv:2307.08691.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessella.engine.kernels.attend import Heads
from tessella.engine.kernels.counts import power_of_two

KEYS_AT_ONCE = 64
# By the most new tokens of a row. 27 rows of 300 took 103 us by 64 and 125 by 128, one of 3,400 took 246 and 220 (H200).
QUERIES_AT_ONCE = {16: 16, 512: 64, 1 << 30: 128}
LOG2_E = 1.4426950408889634


class Plan(NamedTuple):
    """Which program has which queries. places (3, P) int32: each program's row of the table, first query and its position.

    ends (P,) int32: one behind the last of the row's queries. queries: M.
    """

    places: Tensor
    ends: Tensor
    queries: int


@triton.jit
def _turn_of_loop(
    q, top, total, seen, keys, values, place, n, d, start, position, scale,
    D: tl.constexpr, DP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Queries (M, DP) meet N keys. CUT: some of them may come after a query."""
    at = place + n[:, None] * D + d[None, :]
    if DP == D:
        k = tl.load(keys + at)
        v = tl.load(values + at)
    else:
        k = tl.load(keys + at, mask=d[None, :] < D, other=0.0)
        v = tl.load(values + at, mask=d[None, :] < D, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CUT:
        sees = (start + n)[None, :] <= position[:, None]
        score = tl.where(sees, score, float("-inf"))
        v = tl.where(((start + n) <= tl.max(position, 0))[:, None], v, 0.0)  # nobody wrote there yet: 0 * NaN is NaN
    higher = tl.maximum(top, tl.max(score, 1))
    p = tl.exp2(score - higher[:, None])
    fade = tl.exp2(top - higher)
    seen = tl.dot(p.to(v.dtype), v, seen * fade[:, None], input_precision="ieee")
    return higher, total * fade + tl.sum(p, 1), seen


@triton.jit(do_not_specialize=["programs", "table_stride"], do_not_specialize_on_alignment=["places", "ends", "table"])
def _look_back(
    qkv, keys, values, table, places, ends, out, programs, scale, qkv_stride, table_stride,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: M queries of one row, one query head. N divides B."""
    program, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # of one row the longest looks back first
    row = tl.load(places + program)
    first = tl.load(places + programs + program)
    past = tl.load(places + 2 * programs + program)
    count = tl.load(ends + program) - first
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, DP)
    here = m < count
    position = past + tl.minimum(m, count - 1)
    asked = qkv + (first + m).to(tl.int64)[:, None] * qkv_stride + head * D + d[None, :]
    q = tl.load(asked, mask=here[:, None] & (d[None, :] < D), other=0.0)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    seen = tl.zeros((M, DP), tl.float32)
    whole = (past + 1) // N * N  # keys that every query of this program sees
    shared = head // (HQ // HK)
    line = table + row * table_stride
    for start in range(0, whole, N):
        block = tl.load(line + start // B).to(tl.int64)
        place = ((block * HK + shared) * B + start % B) * D
        top, total, seen = _turn_of_loop(q, top, total, seen, keys, values, place, n, d, start, position, scale, D, DP, False)
    for start in range(whole, past + tl.minimum(count, M), N):
        block = tl.load(line + start // B).to(tl.int64)
        place = ((block * HK + shared) * B + start % B) * D
        top, total, seen = _turn_of_loop(q, top, total, seen, keys, values, place, n, d, start, position, scale, D, DP, True)
    put = out + ((first + m).to(tl.int64)[:, None] * HQ + head) * D + d[None, :]
    tl.store(put, (seen / total[:, None]).to(out.dtype.element_ty), mask=here[:, None] & (d[None, :] < D))


def fits(block_tokens: int) -> bool:
    """Whether blocks of so many tokens can be read in whole turns of the loop."""
    return block_tokens >= 16 and block_tokens & (block_tokens - 1) == 0


def look_back(qkv: Tensor, heads: Heads, plan: Plan, keys: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """What the new tokens see of their own rows up to themselves; all keys and values lie in the blocks.

    qkv (T, columns), whose queries are normed and turned; keys, values (blocks, Hk, B, D); table (R, W) int32 -> (T, Hq * D).
    """
    hq, _, d = heads
    assert (
        qkv.stride(1) == table.stride(1) == 1 and plan.places.is_contiguous() and keys.is_contiguous() and values.is_contiguous()
    )
    out = torch.empty((len(qkv), hq * d), device=qkv.device, dtype=qkv.dtype)
    programs = len(plan.ends)
    sizes = look_sizes(heads, keys.shape[2], plan.queries)
    _look_back[(programs, hq)](
        qkv, keys, values, table, plan.places, plan.ends, out, programs, d**-0.5 * LOG2_E, qkv.stride(0), table.stride(0), **sizes
    )
    return out


@cache
def look_sizes(heads: Heads, block_tokens: int, queries: int) -> dict[str, int]:
    """What _look_back is compiled for."""
    return {
        "HQ": heads.query,
        "HK": heads.shared,
        "D": heads.width,
        "DP": max(16, power_of_two(heads.width)),
        "B": block_tokens,
        "M": queries,
        "N": min(KEYS_AT_ONCE, block_tokens),
        "num_warps": 8 if queries > 64 else 4,
        "num_stages": 3,
    }


def planned(parts: Sequence[tuple[int, int]]) -> tuple[Tensor, int]:
    """(start, end) of each row's new tokens, laid back to back -> (4, P) int32: a Plan's places and ends, and its queries."""
    longest = max(end - start for start, end in parts)
    queries = next(at_once for most, at_once in QUERIES_AT_ONCE.items() if longest <= most)
    told: list[tuple[int, int, int, int]] = []
    at = 0
    for row, (start, end) in enumerate(parts):
        count = end - start
        told += [(row, at + new, start + new, at + count) for new in range(0, count, queries)]
        at += count
    return torch.tensor(told, dtype=torch.int32).T.contiguous(), queries
