"""Triton kernels between the tower's matrix products: sum, layer scale and norm as one launch, the activation in place.

In and out: tensors on a GPU, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1), with which the tests run them.
T tokens of all tiles, C width. Arithmetic is float32; results are rounded where torch's own operations would round.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from tessella.engine.kernels.counts import pieces, power_of_two
from tessella.model.layers import RMSNorm

NUMBERS_AT_ONCE = 2048


@triton.jit
def _scale_add_norm(
    x, more, scale, weight, bias, summed, out, eps,
    WIDTH: tl.constexpr, P: tl.constexpr, ADD: tl.constexpr, SCALE: tl.constexpr, CENTRE: tl.constexpr,
):  # fmt: skip
    """One program: one token. P: the power of two that holds the width. CENTRE: LayerNorm, else RMSNorm."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, P)
    here = c < WIDTH
    kind = out.dtype.element_ty
    wide = tl.load(x + row * WIDTH + c, mask=here, other=0.0).to(tl.float32)
    if ADD:
        new = tl.load(more + row * WIDTH + c, mask=here, other=0.0).to(tl.float32)
        if SCALE:
            new = (new * tl.load(scale + c, mask=here, other=0.0).to(tl.float32)).to(kind).to(tl.float32)
        rounded = (wide + new).to(kind)
        tl.store(summed + row * WIDTH + c, rounded, mask=here)
        wide = rounded.to(tl.float32)
    w = tl.load(weight + c, mask=here, other=0.0).to(tl.float32)
    if CENTRE:
        wide = tl.where(here, wide - tl.sum(wide, 0) / WIDTH, 0.0)
        normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps) * w
        normed += tl.load(bias + c, mask=here, other=0.0).to(tl.float32)
    else:
        normed = w * (wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)).to(kind).to(tl.float32)
    tl.store(out + row * WIDTH + c, normed.to(kind), mask=here)


def norm_of(x: Tensor, norm: nn.Module) -> Tensor:
    """What a LayerNorm or RMSNorm does. x (T, C) -> (T, C)."""
    return _normed(x, None, None, norm)[1]


def scale_add_norm(x: Tensor, more: Tensor, scale: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """x + more * scale, and what a LayerNorm or RMSNorm does to it. x and more (T, C), scale (C,) -> two of (T, C)."""
    return _normed(x, more, scale, norm)


def _normed(x: Tensor, more: Tensor | None, scale: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(norm, (nn.LayerNorm, RMSNorm)) and x.is_contiguous() and (more is None or more.is_contiguous())
    tokens, width = x.shape
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
    out = torch.empty_like(x)
    summed = x if more is None else torch.empty_like(x)
    others = [x if one is None else one for one in (more, scale)]
    _scale_add_norm[(tokens,)](
        x, *others, norm.weight, norm.weight if bias is None else bias, summed, out, norm.eps,
        WIDTH=width, P=power_of_two(width), ADD=more is not None, SCALE=scale is not None, CENTRE=bias is not None,
    )  # fmt: skip
    return summed, out


@triton.jit
def _activate(x, COUNT, N: tl.constexpr, QUICK: tl.constexpr):
    """One program: N numbers. QUICK: x * sigmoid(1.702 x), else x times the normal distribution's share below x."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    here = at < COUNT
    wide = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    if QUICK:
        share = 1.0 / (1.0 + tl.exp(-1.702 * wide))
    else:
        share = 0.5 + 0.5 * tl.math.erf(wide * 0.7071067811865476)
    tl.store(x + at, (wide * share).to(x.dtype.element_ty), mask=here)


def activate(x: Tensor, *, quick: bool) -> Tensor:
    """gelu, or CLIP's quick_gelu, in place. x (T, C) -> x."""
    assert x.is_contiguous()
    _activate[(pieces(x.numel(), NUMBERS_AT_ONCE),)](x, x.numel(), N=NUMBERS_AT_ONCE, QUICK=quick)
    return x
