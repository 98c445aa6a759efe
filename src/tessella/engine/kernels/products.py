"""Triton kernels of matrix times vector, for one row alone: the weights are read once, at the memory's own speed.

With one row a step is nothing but reading weights: cuBLAS' way of doing that reached 2,870 GB/s of an H200's 4,171 (docs/log.md,
2026-11-30, says where these were measured). Here norm, gate, bias and sum are done by whoever holds the numbers already.
In and out: tensors on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1), with which the tests run them.
K width in, N width out. Sums are float32; results are rounded where torch's own operations would round.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tessella.engine.kernels.counts import pieces, power_of_two

NUMBERS_AT_ONCE = 2048  # of one row of weights
WARPS = 8


@triton.jit
def _product(
    x, weight, norm, bias, residual, out, eps,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """One program: BN numbers of the answer. GATE: weight has 2 * N rows, and the answer is silu(first half) * second half."""
    kind = out.dtype.element_ty
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    line = n.to(tl.int64)[:, None] * K
    first = tl.zeros((BN, BK), tl.float32)
    second = tl.zeros((BN, BK), tl.float32)
    # The first weights are on their way before the norm of x is known: they are what takes time.
    inside = k < K
    here = (n[:, None] < N) & inside[None, :]
    w = tl.load(weight + line + k[None, :], mask=here, other=0.0, eviction_policy="evict_first")
    u = w
    if GATE:
        u = tl.load(weight + N * K + line + k[None, :], mask=here, other=0.0, eviction_policy="evict_first")
    scale = tl.zeros((BK,), tl.float32)
    shrink = 1.0
    if NORM:
        scale = tl.load(norm + k, mask=inside, other=0.0).to(tl.float32)
        square = 0.0
        for start in tl.static_range(0, K, BK):
            part = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            square += tl.sum(part * part, 0)
        shrink = tl.rsqrt(square / K + eps)
    for start in tl.static_range(0, K, BK):
        inside = start + k < K
        if start > 0:
            if NORM:
                scale = tl.load(norm + start + k, mask=inside, other=0.0).to(tl.float32)
            here = (n[:, None] < N) & inside[None, :]
            w = tl.load(weight + line + start + k[None, :], mask=here, other=0.0, eviction_policy="evict_first")
            if GATE:
                u = tl.load(weight + N * K + line + start + k[None, :], mask=here, other=0.0, eviction_policy="evict_first")
        part = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            part = (scale * (part * shrink).to(kind).to(tl.float32)).to(kind).to(tl.float32)
        first += w.to(tl.float32) * part[None, :]
        if GATE:
            second += u.to(tl.float32) * part[None, :]
    answer = tl.sum(first, 1)
    if BIAS:
        answer += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    answer = answer.to(kind).to(tl.float32)
    if GATE:
        answer = (answer / (1.0 + tl.exp(-answer))).to(kind).to(tl.float32)
        answer *= tl.sum(second, 1).to(kind).to(tl.float32)
    if ADD:
        answer += tl.load(residual + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + n, answer.to(kind), mask=n < N)


def product(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x (1, K), weight (N, K) -> (1, N).

    norm (K,), eps: x is normed first, as by RMSNorm. gated: weight is gate over up, (2 * N, K), and silu(gate) * up comes out.
    bias (N,) and residual (1, N) are added.
    """
    width = x.shape[1]
    rows = len(weight) // 2 if gated else len(weight)
    assert len(x) == 1 and x.is_contiguous() and weight.is_contiguous() and not (gated and bias is not None)
    out = torch.empty((1, rows), device=x.device, dtype=x.dtype)
    sizes = product_sizes(rows, width, norm=norm is not None, gated=gated, bias=bias is not None, residual=residual is not None)
    grid = (pieces(rows, int(sizes["BN"])),)
    others = [x if one is None else one for one in (norm, bias, residual)]
    _product[grid](x, weight, *others, out, eps, **sizes, num_warps=WARPS)
    return out


@cache
def product_sizes(rows: int, width: int, *, norm: bool, gated: bool, bias: bool, residual: bool) -> dict[str, int | bool]:
    """What _product is compiled for: several programs for each of a large GPU's 132 multiprocessors, 32 KB of weights each."""
    at_once = min(NUMBERS_AT_ONCE, power_of_two(width))
    numbers = 2 if rows <= 2048 else 4 if rows <= 16384 else 8
    return {
        "N": rows,
        "K": width,
        "BN": numbers,
        "BK": at_once,
        "NORM": norm,
        "GATE": gated,
        "BIAS": bias,
        "ADD": residual,
    }
