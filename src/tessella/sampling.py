"""Logits become the next id; the only place where chance enters.

In: logits (V,) of one row, the ids seen so far, SamplingParams.  Out: one id.
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.errors import ConfigError


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn. The filters act in this order: repetition_penalty, temperature, top_k, top_p, min_p."""

    temperature: float = 0.0  # 0 takes the likeliest id; no filter matters then, but the repetition penalty
    top_p: float = 1.0  # keep the likeliest ids until their sum reaches this, in (0, 1]
    top_k: int = 0  # keep this many of the likeliest; 0 for all
    min_p: float = 0.0  # keep ids at least this share as likely as the likeliest, in [0, 1)
    repetition_penalty: float = 1.0  # positive logits of seen ids are divided by it, negative ones multiplied
    max_tokens: int = 512  # of the answer
    seed: int | None = None  # None: another answer every time
    stop: tuple[str, ...] = ()  # texts that end the answer and are left out of it

    def __post_init__(self) -> None:
        for name, value, legal, range_ in (
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "in [0, 100]"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (all) or more"),
            ("min_p", self.min_p, 0 <= self.min_p < 1, "in [0, 1)"),
            ("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 10, "in (0, 10]"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "in [0, 2**63), or none"),
            ("stop", self.stop, all(self.stop), "texts that are not empty"),
        ):
            if not legal:
                raise ConfigError(f"{name} is {value}, must be {range_}")


GREEDY = SamplingParams()


class Sampler:
    """Draws for one answer, from a generator of its own: a seed gives the same answer in any company."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self._chance = torch.Generator()  # on the CPU, so that a seed means the same on every device
        if params.seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(params.seed)

    def next(self, logits: Tensor, seen_ids: Sequence[int]) -> int:
        """logits (V,) -> the next id; seen_ids: prompt and answer so far, for the repetition penalty."""
        params = self.params
        if params.repetition_penalty != 1:
            logits = penalise(logits, seen_ids, params.repetition_penalty)
        if params.temperature == 0:
            return int(logits.argmax())
        weights = probabilities(logits, params).double()
        return int(torch.multinomial(weights.cpu(), 1, generator=self._chance))


def penalise(logits: Tensor, seen_ids: Sequence[int], penalty: float) -> Tensor:
    """logits (V,) -> a copy with seen ids made less likely (penalty > 1). Source: CTRL, arXiv:1909.05858."""
    if not seen_ids:
        return logits
    seen = torch.tensor(sorted(set(seen_ids)), device=logits.device)
    kept = logits[seen].float()
    return logits.float().index_copy(0, seen, torch.where(kept > 0, kept / penalty, kept * penalty))


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """logits (V,) -> float32 probabilities (V,), zero where a filter struck out; the likeliest id always stays.

    Ties at the edge of a filter are broken by the order of a stable sort, lower id first.
    """
    # Ranked before the division, which can make a tie of two tiny differences and then strike the likeliest out.
    ranked, order = logits.float().sort(descending=True, stable=True)
    # The highest becomes 0 before the division: at a tiny temperature the others fall to -inf and nothing overflows.
    ranked = (ranked - ranked[0]) / params.temperature
    if params.top_k:
        ranked, order = ranked[: params.top_k], order[: params.top_k]
    p = ranked.softmax(0)
    keep = torch.ones_like(p, dtype=torch.bool)
    if params.top_p < 1:
        keep &= p.cumsum(0) - p < params.top_p  # the id that reaches the sum is kept
    p = torch.where(keep, p, 0.0)
    if params.min_p > 0:
        p = torch.where(p >= params.min_p * p[0], p, 0.0)
    return torch.zeros_like(logits, dtype=torch.float32).index_copy(0, order, p / p.sum())
