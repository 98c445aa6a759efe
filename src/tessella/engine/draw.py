"""Logits become each row's next id, with its logarithm when it was asked for.

In: logits (R, V) of R rows.  Out: a Drawn a row.
R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tessella.engine.request import Logprob
from tessella.engine.row import Row
from tessella.errors import TessellaError
from tessella.sampling import next_ids

NOT_FINITE = "the model's numbers are no longer finite; its weights or the adapter's are damaged, or float16 is too narrow for it"
NOTHING_ALLOWED = "the grammar allows no token here; ask for another response format"


@dataclass(frozen=True)
class Drawn:
    """An id, or why there is none."""

    id: int = -1
    logprob: Logprob | None = None
    error: str | None = None


def draw(rows: Sequence[Row], logits: Tensor) -> list[Drawn]:
    """logits (R, V) -> what was drawn for each row; a mask is told its id."""
    best = logits.max(-1)  # a NaN anywhere is the largest
    ids, finite = torch.stack((best.indices, best.values.isfinite().long())).tolist()  # one transfer
    if all(finite) and all(row.takes_the_likeliest for row in rows):
        return [Drawn(token) for token in ids]
    errors: list[str | None] = [None if fine else NOT_FINITE for fine in finite]
    logits = logits.nan_to_num() if not all(finite) else logits
    allowed = _masked(rows, logits, errors)
    samplers = [row.answer.sampler for row in rows]
    chosen = next_ids(allowed, samplers, [row.prompt_ids for row in rows], [row.answer.ids for row in rows])
    drawn = []
    for place, (row, token, error) in enumerate(zip(rows, chosen, errors, strict=True)):
        error = error or _tell_mask(row, token)
        logprob = None if error or row.request.logprobs is None else logprob_of(logits[place], token, row.request.logprobs)
        drawn.append(Drawn(token, logprob, error))
    return drawn


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
