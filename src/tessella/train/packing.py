"""Which rows share a pass, planned from their lengths alone: nothing is padded, nothing is cut, no row sees another.

In: lengths of rows, known from headers.  Out: indices of the rows of each pass; the order of an epoch by length.
The loss is one mean over all passes of a step, so the plan changes no gradient beyond rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tessella.config import LanguageConfig

WINDOW_STEPS = 32  # steps whose rows are sorted by length together, when rows are grouped


def rope_limit(config: LanguageConfig) -> int | None:
    """Tokens beyond which a row turns by other angles than a shorter one, so that it must not share a pass; None: it never does.

    Phi-3's long factors hold for a whole run by its longest row, and InternLM2's dynamic base hangs on that row's very length.
    """
    if config.rope_long is not None:
        return config.rope_long.original_positions
    return None if config.rope_dynamic_factor is None else config.max_positions


def plan_passes(
    lengths: Sequence[int], tokens_per_pass: int, *, packing: str = "in_order", alone_over: int | None = None
) -> list[list[int]]:
    """Indices of the rows of each pass. A row longer than a pass, or than alone_over, runs alone.

    "best_fit": the longest rows first, each into the fullest pass that still has room (best fit decreasing, at most 11/9 of the
    fewest passes possible); otherwise in order, as many as fit. Within a pass the rows keep their order.
    """
    order = range(len(lengths))
    best = packing == "best_fit"
    passes: list[list[int]] = []
    room: list[int] = []
    for index in sorted(order, key=lambda i: (-lengths[i], i)) if best else order:
        length = lengths[index]
        fitting = [place for place in (range(len(room)) if best else range(len(room))[-1:]) if room[place] >= length]
        alone = alone_over is not None and length > alone_over
        if not fitting or alone:
            passes.append([index])
            room.append(-1 if alone else tokens_per_pass - length)
            continue
        place = min(fitting, key=lambda one: (room[one], one))
        passes[place].append(index)
        room[place] -= length
    return sorted(sorted(one) for one in passes)


def grouped(order: Sequence[int], lengths: Sequence[int], samples_per_step: int, seed: int) -> list[int]:
    """An epoch's order in which the rows of a step are of about one length.

    Within windows of WINDOW_STEPS steps the rows are sorted by length, cut into steps, and the steps shuffled, so that what a run
    sees early and late is still chance. A last, shorter step stays last.
    """
    chance = torch.Generator().manual_seed(seed)
    window = WINDOW_STEPS * samples_per_step
    out: list[int] = []
    for start in range(0, len(order), window):
        some = sorted(order[start : start + window], key=lambda index: lengths[index])
        steps = [some[first : first + samples_per_step] for first in range(0, len(some), samples_per_step)]
        last = [steps.pop()] if len(steps[-1]) < samples_per_step else []
        shuffled = [steps[place] for place in torch.randperm(len(steps), generator=chance).tolist()]
        out += [index for step in (*shuffled, *last) for index in step]
    return out


@dataclass(frozen=True)
class Plan:
    """What packing makes of an epoch: for each step its passes, each the numbers of its rows."""

    steps: tuple[tuple[tuple[int, ...], ...], ...]
    lengths: Sequence[int]
    tokens_per_pass: int

    @property
    def passes(self) -> list[tuple[int, ...]]:
        return [one for step in self.steps for one in step]

    def tokens_of(self, rows: Sequence[int]) -> int:
        return sum(self.lengths[row] for row in rows)

    @property
    def fill(self) -> float:
        """Share of the passes' budget that tokens fill; a row longer than a pass counts as a full one."""
        sums = [self.tokens_of(one) for one in self.passes]
        return sum(sums) / max(1, sum(max(self.tokens_per_pass, one) for one in sums))

    @property
    def padding_saved(self) -> float:
        """Share of a padded batch that would be padding, were each step's rows laid out as long as its longest."""
        rows = [[self.lengths[row] for one in step for row in one] for step in self.steps]
        return 1 - sum(map(sum, rows)) / max(1, sum(len(step) * max(step) for step in rows))


@dataclass(frozen=True)
class Packing:
    """A plan in numbers, for people and JSON."""

    packing: str
    tokens_per_pass: int
    steps: int
    passes: int
    fill: float  # share of the passes' budget that tokens fill
    padding_saved: float  # share of a padded batch that would be padding

    @classmethod
    def of(cls, plan: Plan, packing: str) -> "Packing":
        return cls(packing, plan.tokens_per_pass, len(plan.steps), len(plan.passes), plan.fill, plan.padding_saved)

    def told(self) -> str:
        return (
            f"packing {self.packing}: {self.passes:,} passes of at most {self.tokens_per_pass:,} tokens in {self.steps:,} steps "
            f"an epoch, {self.fill:.0%} full, nothing padded (as long as a step's longest row: {self.padding_saved:.0%} padding)"
        )


def plan_epoch(
    lengths: Sequence[int],
    order: Sequence[int],
    samples_per_step: int,
    tokens_per_pass: int,
    packing: str,
    alone_over: int | None,
) -> Plan:
    """The passes of an epoch whose rows come in this order."""
    steps = []
    for start in range(0, len(order), samples_per_step):
        rows = order[start : start + samples_per_step]
        plan = plan_passes([lengths[row] for row in rows], tokens_per_pass, packing=packing, alone_over=alone_over)
        steps.append(tuple(tuple(rows[place] for place in one) for one in plan))
    return Plan(tuple(steps), lengths, tokens_per_pass)
