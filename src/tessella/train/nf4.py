"""A frozen base in four bits: NF4 with doubly quantised scales, for teaching LoRA beside it (QLoRA).

In: the weight (O, I) of a linear layer.  Out: half a byte a number, one byte a block of 64, four bytes a group of 256 blocks:
4 + 8/64 + 32/(64 * 256) = 4.127 bits a number; and a layer that widens its weight for each product, forward and backward.
A number is its block's scale times the nearest of sixteen values, the quantiles of a normal distribution. The scales, less their
mean, are 8-bit floats times their group's largest.
Ours and not bitsandbytes': it runs wherever torch does, without 43 MB of kernels, gives the same codes and widens a weight in
about the same time on a CPU (docs/log.md, 2026-11-30).
Source: arXiv:2305.14314; the sixteen values: bitsandbytes 0.50, functional.get_4bit_type("nf4").
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK, GROUP = 64, 256  # numbers that share a scale, scales that share a factor
FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class Packed:
    """A weight in four bits. n numbers, padded to whole blocks; b = n / 64 blocks, padded to whole groups."""

    codes: Tensor  # (n / 2,) uint8: two places in CODE, the first in the upper half
    scales: Tensor  # (b,) 8-bit floats
    factors: Tensor  # (b / 256,) float32
    mean: Tensor  # () float32, of the scales
    shape: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        return sum(one.numel() * one.element_size() for one in (self.codes, self.scales, self.factors, self.mean))


def quantise(weight: Tensor) -> Packed:
    """weight (O, I) -> the nearest that four bits can say."""
    rows, columns = weight.shape
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(1)  # (b,)
    code = torch.tensor(CODE, device=weight.device)
    middles = (code[1:] + code[:-1]) / 2
    places = torch.bucketize(blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None], middles)
    pairs = places.to(torch.uint8).view(-1, 2)
    mean = largest.mean()
    groups = F.pad(largest - mean, (0, -len(largest) % GROUP)).view(-1, GROUP)
    factors = groups.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    scales = (groups / factors[:, None]).to(FLOAT8).flatten()[: len(largest)]
    return Packed(pairs[:, 0] << 4 | pairs[:, 1], scales, factors, mean, (rows, columns))


def dequantise(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The weight (O, I) that the four bits stand for."""
    code = torch.tensor(CODE, dtype=dtype, device=packed.codes.device)
    both = torch.stack((code.repeat_interleave(16), code.repeat(16)), dim=1)  # (256, 2): what a byte stands for
    # Two numbers are fetched as one of twice the width: a quarter of the time (CPU, 2026-11-30).
    table = both.view(torch.int64 if dtype.itemsize == 4 else torch.int32).flatten()
    numbers = table.index_select(0, packed.codes.int()).view(dtype).view(-1, BLOCK)
    factors = packed.factors.repeat_interleave(GROUP)[: len(packed.scales)]
    scales = packed.scales.float() * factors + packed.mean
    rows, columns = packed.shape
    return (numbers * scales.to(dtype)[:, None]).flatten()[: rows * columns].view(rows, columns)


class Nf4Linear(nn.Linear):
    """A frozen linear layer that keeps its weight in four bits. `weight` widens it, to the type that it had."""

    def __init__(self, layer: nn.Linear, device: torch.device):
        nn.Module.__init__(self)  # not nn.Linear's: there is no weight to make
        self.in_features, self.out_features, self.dtype = layer.in_features, layer.out_features, layer.weight.dtype
        packed = quantise(layer.weight.to(device))
        for name in ("codes", "scales", "factors", "mean"):
            self.register_buffer(name, getattr(packed, name), persistent=False)
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)

    @property
    def packed(self) -> Packed:
        codes, scales, factors, mean = (self.get_buffer(name) for name in ("codes", "scales", "factors", "mean"))
        return Packed(codes, scales, factors, mean, (self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return dequantise(self.packed, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Product.apply(x, self)  # type: ignore[no-untyped-call, unused-ignore]
        return out


class Product(torch.autograd.Function):
    """x W^T + bias, where W is widened in both passes: kept for the backward one it would cost what four bits save."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return grads[0] @ ctx.layer.weight, None


def quantise_layers(model: nn.Module, prefixes: Iterable[str], device: torch.device) -> int:
    """Put four-bit layers on device in the place of the linear layers below prefixes, one after another, so that a model need
    never lie there whole; gives how many.
    """
    beginnings = tuple(prefixes)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(beginnings)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(model.get_submodule(parent), leaf, Nf4Linear(layer, device))
    return len(names)
