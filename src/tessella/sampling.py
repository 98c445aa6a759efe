"""Logits become the next ids; the only place where chance enters.

In: logits (R, V), the ids of prompts and answers so far, a Sampler for each row.  Out: one id a row.
R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.errors import ConfigError
from tessella.transfer import sent


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is drawn. The filters act in this order: penalties, temperature, top_k, top_p, min_p."""

    temperature: float = 0.0  # 0 takes the likeliest id; no filter matters then, but the penalties
    top_p: float = 1.0  # keep the likeliest ids until their sum reaches this, in (0, 1]
    top_k: int = 0  # keep this many of the likeliest; 0 for all
    min_p: float = 0.0  # keep ids at least this share as likely as the likeliest, in [0, 1)
    repetition_penalty: float = 1.0  # positive logits of seen ids are divided by it, negative ones multiplied
    presence_penalty: float = 0.0  # taken from the logit of each id that the answer holds, in [-2, 2]
    frequency_penalty: float = 0.0  # the same for each time that the answer holds it, in [-2, 2]
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
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "in [0, 2**63), or none"),
            ("stop", self.stop, all(self.stop), "texts that are not empty"),
        ):
            if not legal:
                raise ConfigError(f"{name} is {value}, must be {range_}")

    @property
    def filters(self) -> bool:
        """Whether ids may be struck out before one is drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


GREEDY = SamplingParams()


class Sampler:
    """The chance of one answer, from a generator of its own: a seed gives the same answer in any company."""

    def __init__(self, params: SamplingParams):
        self.params = params
        self._chance = torch.Generator()  # on the CPU, so that a seed means the same on every device
        if params.seed is None:
            self._chance.seed()
        else:
            self._chance.manual_seed(params.seed)

    def chance(self) -> float:
        """The next number in [0, 1)."""
        return float(torch.rand((), generator=self._chance, dtype=torch.float64))

    def next(self, logits: Tensor, prompt: Sequence[int], answer: Sequence[int]) -> int:
        """logits (V,) -> the next id; prompt and the answer so far, for the penalties."""
        return next_ids(logits[None], [self], [prompt], [answer])[0]


def next_ids(
    logits: Tensor, samplers: Sequence[Sampler], prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[int]:
    """logits (R, V) of R rows -> the next id of each row; prompts and the answers so far, for the penalties."""
    ids: list[int] = choose(logits, samplers, prompts, answers).tolist()  # one transfer for all rows
    return ids


def choose(
    logits: Tensor, samplers: Sequence[Sampler], prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """next_ids (R,) on the logits' device; without penalties the host waits for nothing.

    Each row is drawn from its own logits and its own chance alone.
    """
    every = [sampler.params for sampler in samplers]
    logits = penalised(logits, every, prompts, answers)
    chosen = logits.argmax(-1)
    for filtered in (False, True):  # without a filter there is nothing to sort
        rows = [row for row, params in enumerate(every) if params.temperature > 0 and params.filters == filtered]
        if rows:
            chances = torch.tensor([samplers[row].chance() for row in rows], dtype=torch.float64)
            place = sent(torch.tensor(rows), logits.device)
            drawn = draw(probabilities(logits[place], [every[row] for row in rows]), chances)
            chosen[place] = drawn.to(chosen.device)
    return chosen


def draw(weights: Tensor, chances: Tensor) -> Tensor:
    """weights (R, V), chances (R,) in [0, 1) -> ids (R,): where the sum of a row's weights passes its chance."""
    if weights.device.type == "mps":  # it has no float64
        weights = weights.cpu()
    sums = weights.double().cumsum(-1)
    total = sums[:, -1:]
    aim = torch.minimum(sent(chances, sums.device)[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, aim, right=True)[:, 0]  # right: an id without weight is never met


def penalised(
    logits: Tensor, every: Sequence[SamplingParams], prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Tensor:
    """logits (R, V) with each row's penalties; a float32 copy where there are any."""
    rows = [row for row, params in enumerate(every) if params.penalises]
    if not rows:
        return logits
    logits = logits.float().clone()
    for row in rows:
        params, answer = every[row], answers[row]
        if params.repetition_penalty != 1:
            logits[row] = penalise(logits[row], [*prompts[row], *answer], params.repetition_penalty)
        if answer and (params.presence_penalty or params.frequency_penalty):
            ids, counts = torch.tensor(answer, device=logits.device).unique(return_counts=True)
            logits[row, ids] -= params.presence_penalty + params.frequency_penalty * counts
    return logits


def penalise(logits: Tensor, seen_ids: Sequence[int], penalty: float) -> Tensor:
    """logits (V,) -> a copy with seen ids made less likely (penalty > 1). Source: CTRL, arXiv:1909.05858."""
    if not seen_ids:
        return logits
    seen = torch.tensor(sorted(set(seen_ids)), device=logits.device)
    kept = logits[seen].float()
    return logits.float().index_copy(0, seen, torch.where(kept > 0, kept / penalty, kept * penalty))


def probabilities(logits: Tensor, every: Sequence[SamplingParams]) -> Tensor:
    """logits (R, V) -> float32 probabilities (R, V), zero where a row's filter struck out; its likeliest id always stays.

    Ties at the edge of a filter are broken by the order of a stable sort, lower id first. Every temperature is above 0.
    """
    heat = _column([params.temperature for params in every], logits)
    wide = logits.float()
    if not any(params.filters for params in every):
        return ((wide - wide.amax(-1, keepdim=True)) / heat).softmax(-1)
    # Ranked before the division, which can make a tie of two tiny differences and then strike the likeliest out.
    ranked, order = wide.sort(descending=True, stable=True)
    # The highest becomes 0 before the division: at a tiny temperature the others fall to -inf and nothing overflows.
    ranked = (ranked - ranked[:, :1]) / heat
    top_k = _column([params.top_k or logits.shape[1] for params in every], logits)
    ranked = ranked.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= top_k, float("-inf"))
    p = ranked.softmax(-1)
    top_p = _column([params.top_p for params in every], logits)
    reached = (p.cumsum(-1) - p >= top_p) & (top_p < 1)  # the id that reaches the sum is kept
    p = p.masked_fill(reached, 0.0)
    p = p.masked_fill(p < _column([params.min_p for params in every], logits) * p[:, :1], 0.0)
    return torch.zeros_like(wide).scatter(1, order, p / p.sum(-1, keepdim=True))


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """(R, 1) float32"""
    return sent(torch.tensor(numbers, dtype=torch.float32), like.device)[:, None]
