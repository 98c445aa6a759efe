"""The small parts that tower and decoder share: RMSNorm and rotary positions.

T tokens, H heads, D width of a head, C width.
"""

import math

import torch
from torch import Tensor, nn

from tessella.config import LanguageConfig, Llama3Rope


class RMSNorm(nn.Module):
    """Scale to unit root mean square in float32, then by a learned weight. x (..., C) -> (..., C). Source: arXiv:1910.07467."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # The statistic is float32 whatever x is, and the weight multiplies last, as in InternLM2, Llama and Qwen2.
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_base(config: LanguageConfig, length: int) -> float:
    """The base of the rotary angles for a run of length tokens.

    Within the trained length it is rope_theta. Beyond it, dynamic NTK: theta * (f * L / max - (f - 1)) ** (d / (d - 2)).
    Source: modeling_internlm2.py of OpenGVLab/InternVL at 2410d1d, InternLM2DynamicNTKScalingRotaryEmbedding.
    """
    factor, limit, d = config.rope_dynamic_factor, config.max_positions, config.head_dim
    if factor is None or length <= limit:
        return config.rope_theta
    return config.rope_theta * (factor * length / limit - (factor - 1)) ** (d / (d - 2))


def rope_frequencies(config: LanguageConfig, length: int, device: torch.device) -> Tensor:
    """Radians a position, (D / 2,) float32, for a run of length tokens.

    Source: modeling_rope_utils.py of huggingface/transformers at 5.23 ("longrope", arXiv:2402.13753, and "llama3").
    """
    d = config.head_dim
    frequency = 1.0 / rope_base(config, length) ** (torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    if config.rope_long is not None:
        long = config.rope_long
        factors = long.long_factor if length > long.original_positions else long.short_factor
        return frequency / torch.tensor(factors, device=device)
    if config.rope_llama3 is not None:
        return _llama3_frequencies(frequency, config.rope_llama3)
    return frequency


def _llama3_frequencies(frequency: Tensor, rope: Llama3Rope) -> Tensor:
    """Frequencies that turn less than low_freq_factor times in the original length are slowed, from high_freq_factor on not."""
    turns = rope.original_positions * frequency / (2 * math.pi)  # within the original length
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return frequency * (blend + (1 - blend) / rope.factor)


def rotary(config: LanguageConfig, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (T,) in a run of length tokens -> cosine and sine, each (T, 1, D), for rotate_half."""
    return rotary_at(config, positions, rope_frequencies(config, length, positions.device), dtype)


def rotary_at(config: LanguageConfig, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same at given radians a position, (D / 2,) for all tokens or (T, D / 2). Angles are computed in float32."""
    angle = positions.float()[:, None] * frequencies
    angle = torch.cat((angle, angle), dim=-1)[:, None, :]
    size = 1.0 if config.rope_long is None else config.rope_long.attention_factor
    return (angle.cos() * size).to(dtype), (angle.sin() * size).to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the two halves of each head against each other. x (T, H, D), cosine and sine (T, 1, D) -> (T, H, D)."""
    low, high = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-high, low), dim=-1) * sine
