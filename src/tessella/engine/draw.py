"""Logits become each row's next id, with its logarithm when it was asked for.

In: logits (R, V) of R rows.  Out: a Drawing, which goes on while the next step is launched; then a Drawn a row.
R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.engine.request import Logprob
from tessella.engine.row import Row
from tessella.errors import TessellaError
from tessella.sampling import choose
from tessella.transfer import Arrival

NOT_FINITE = "the model's numbers are no longer finite; its weights or the adapter's are damaged, or float16 is too narrow for it"
NOTHING_ALLOWED = "the grammar allows no token here; ask for another response format"


@dataclass(frozen=True)
class Drawn:
    """An id, or why there is none."""

    id: int = -1
    logprob: Logprob | None = None
    error: str | None = None


class Drawing:
    """What one step draws: under way as soon as this is made, known when `land` comes back.

    rows: those that draw. logits (R, V) of theirs. drawn (2, R) int64 on the same device: the likeliest id of each row, and
    whether its logits are finite; the id that is drawn instead is written over it. Both may be used again after `land`, and
    before it unless a row waits_for_its_ids.
    """

    def __init__(self, rows: Sequence[Row], logits: Tensor, drawn: Tensor):
        self.rows = rows
        self._errors: list[str | None] = [None] * len(rows)
        self._logits = logits if any(row.request.logprobs is not None for row in rows) else None
        if not all(row.takes_the_likeliest for row in rows):
            samplers = [row.answer.sampler for row in rows]
            allowed = _masked(rows, logits, self._errors)
            chosen = choose(allowed, samplers, [row.prompt_ids for row in rows], [row.answer.ids for row in rows])
            drawn[0] = chosen.clamp_(max=logits.shape[1] - 1)  # where logits are not finite there is no such id
        self._arrival = Arrival(drawn)

    def land(self) -> list[Drawn]:
        """What was drawn for each row; a mask is told its id."""
        ids, finite = self._arrival.wait().tolist()
        drawn = []
        for place, (row, token, fine, error) in enumerate(zip(self.rows, ids, finite, self._errors, strict=True)):
            if not fine:
                error = NOT_FINITE
            error = error or _tell_mask(row, token)
            top, logprob = row.request.logprobs, None
            if self._logits is not None and top is not None and not error:
                logprob = logprob_of(self._logits[place], token, top)
            drawn.append(Drawn(token, logprob, error))
        return drawn


def likeliest(logits: Tensor) -> Tensor:
    """logits (R, V) -> (2, R) int64: the likeliest id of each row, and 1 where its logits are finite, else 0."""
    best = logits.max(-1)  # a NaN anywhere is the largest
    return torch.stack((best.indices, best.values.isfinite().long()))


def _masked(rows: Sequence[Row], logits: Tensor, errors: list[str | None]) -> Tensor:
    """logits with what each row's mask forbids at -inf; a copy where there is a mask. Rows that cannot go on get an error."""
    masked = [place for place, row in enumerate(rows) if row.request.mask is not None]
    if not masked:
        return logits
    logits = logits.clone()
    count = logits.shape[1]
    for place in masked:
        mask, bits = rows[place].request.mask, torch.zeros(-(-count // 32), dtype=torch.int32)
        assert mask is not None
        try:
            mask.fill(bits)
        except TessellaError as error:
            errors[place] = str(error)
            continue
        allowed = unpacked(bits, count)
        if bool(allowed.any()):
            logits[place].masked_fill_(~allowed.to(logits.device), float("-inf"))
        else:
            errors[place] = errors[place] or NOTHING_ALLOWED
    return logits


def unpacked(bits: Tensor, count: int) -> Tensor:
    """bits (ceil(count / 32),) int32 -> (count,) bool."""
    return ((bits[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten()[:count]


def _tell_mask(row: Row, token: int) -> str | None:
    """Tell the row's mask its id; gives what the mask says against it."""
    mask = row.request.mask
    if mask is None or token in row.request.stop_ids:
        return None
    try:
        mask.accept(token)
    except TessellaError as error:
        return str(error)
    return None


def logprob_of(logits: Tensor, token: int, top: int) -> Logprob:
    """logits (V,) before any change -> the logarithm of one id's probability and of the `top` likeliest ids'."""
    logarithms = logits.float().log_softmax(-1)
    best = logarithms.topk(top)
    likeliest = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Logprob(token, float(logarithms[token]), likeliest)
