"""Perplexity on plain text: does a model still talk?

In: a loaded model and a text.  Out: exp of the mean negative log-likelihood of its tokens.
T tokens of a window, V vocabulary.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tessella.checkpoint.read import Loaded
from tessella.errors import DataError
from tessella.generate import all_logits
from tessella.inputs import ModelInput


class Window(NamedTuple):
    """Tokens start to end are read, those from scored on are counted."""

    start: int
    scored: int
    end: int


def windows(total: int, size: int) -> Iterator[Window]:
    """Windows of at most size tokens over total tokens, so that each token but the first is counted exactly once.

    The first window counts all it can; each later one counts its second half and reads the first as context.
    """
    assert size >= 2, "a window needs one token of context and one to count"
    scored, end = 1, min(size, total)
    while scored < total:
        yield Window(max(0, end - size), scored, end)
        scored, end = end, min(end + size // 2, total)


def perplexity(loaded: Loaded, text: str, *, window_tokens: int = 1024) -> float:
    """exp of the mean negative log-likelihood over all tokens of text but the first.

    The text is not put into a prompt; a family that begins with a start token gets it. Long texts are read in windows
    that overlap by half, and every token weighs the same. Comparable between models of one tokenizer only.
    Raises DataError when the text has fewer than two tokens.
    """
    start = loaded.tokenizer.bos_id if loaded.inputs.template.add_bos else None
    ids = loaded.tokenizer.encode(text, grounding=False)
    ids = ids if start is None else [start, *ids]
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; perplexity needs at least 2")
    size = min(window_tokens, loaded.config.context_tokens)
    loss, counted = 0.0, 0
    for begin, scored, end in windows(len(ids), size):
        logits = all_logits(loaded.model, _plain(ids[begin:end], loaded))
        guesses = logits[scored - begin - 1 : end - begin - 1].float()
        told = torch.tensor(ids[scored:end], device=guesses.device)
        loss += float(F.cross_entropy(guesses, told, reduction="sum"))
        counted += end - scored
    return math.exp(loss / counted)


def _plain(ids: list[int], loaded: Loaded) -> ModelInput:
    """ids as an input without pictures and without anything to learn."""
    side = loaded.config.tile_size_px
    nothing = torch.zeros(len(ids), dtype=torch.bool)
    tiles = torch.zeros((0, 3, side, side), dtype=torch.uint8)
    return ModelInput(torch.tensor(ids), nothing, nothing, tiles, (), ())
