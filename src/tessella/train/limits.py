"""Where a run ends before its last step: a person's Ctrl-C, a time limit, or no memory left.

In: signals, the clock, what the allocator raises.  Out: a reason to stop, or what memory held and what to lower.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from tessella.model.device import free_bytes
from tessella.model.vision_language import VisionLanguageModel
from tessella.train.batch import Pack
from tessella.train.recipe import Recipe
from tessella.train.taught import Taught

REASONS = ("", "interrupted", "time limit")


class Stop:
    """Asked between passes: must we stop, and why? The first SIGINT or SIGTERM only asks, the same once more breaks off at once.

    With several ranks the reason is what they agreed upon at the beginning of a step, so that all stop at the same one.
    (torchrun answers Ctrl-C with a SIGTERM of its own: that is no second wish.)
    """

    def __init__(self, time_limit_s: float | None, started: float, *, alone: bool = True, main: bool = True):
        self.seen: set[int] = set()
        self.alone, self.main = alone, main
        self.agreed = ""
        self.deadline = None if time_limit_s is None else started + time_limit_s

    @property
    def asked(self) -> str:
        """This rank's own reason; "" when it has none."""
        if self.seen:
            return "interrupted"
        return "time limit" if self.deadline is not None and time.monotonic() >= self.deadline else ""

    @property
    def reason(self) -> str | None:
        return (self.asked if self.alone else self.agreed) or None

    def _signal(self, number: int, frame: FrameType | None) -> None:
        if number in self.seen:
            raise KeyboardInterrupt
        first = not self.seen
        self.seen.add(number)
        if first and self.main:
            # os.write: a signal may come in the middle of a print, which must not be entered twice.
            os.write(2, b"\nstopping after this step and saving; once more breaks off at once\n")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM inside the block; signals belong to the main thread, so elsewhere nothing is taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def estimate_bytes(model: VisionLanguageModel, taught: Taught, tokens_per_pass: int) -> int:
    """About what a step needs: weights, masters and AdamW's two moments, and what a pass keeps for its backward run."""
    language = model.config.language
    learning = 16 * taught.count()  # float32 master, gradient, two moments
    kept = model.dtype.itemsize * (16 * language.hidden_size + 6 * language.intermediate_size) * language.num_layers
    return weight_bytes(model) + learning + tokens_per_pass * kept


def weight_bytes(model: VisionLanguageModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def out_of_memory(recipe: Recipe, model: VisionLanguageModel, taught: Taught, pack: Pack | None, kept_bytes: int) -> str:
    """What memory held when it ran out, and what to lower. pack: the pass that did not fit, None outside of one."""
    gib = 2**30
    need, free = estimate_bytes(model, taught, recipe.tokens_per_pass) / gib, free_bytes(model.device) / gib
    held = [f"weights {weight_bytes(model) / gib:.1f} GiB", f"what learns {16 * taught.count() / gib:.1f} GiB"]
    if kept_bytes:
        held.append(f"features kept for later epochs {kept_bytes / gib:.1f} GiB")
    if model.device.type == "cuda":
        held.append(f"at most {torch.cuda.max_memory_allocated(model.device) / gib:.1f} GiB in all")
    told = (
        f"out of memory on {model.device}: a step of this recipe needs about {need:.1f} GiB, {free:.1f} GiB are free now. "
        f"It held {', '.join(held)}"
    )
    if pack is not None:
        rows, tokens, tiles = len(pack.lengths), sum(pack.lengths), len(pack.tiles)
        told += f", and ran a pass of {rows:,} rows, {tokens:,} tokens and {tiles:,} tiles"
    lower = f"Lower tokens_per_pass (now {recipe.tokens_per_pass:,}; it changes no result)"
    if pack is not None and len(pack.lengths) == 1 and sum(pack.lengths) >= recipe.tokens_per_pass:
        lower += "; but this row fills the pass alone, so shorten it: lower max_tiles, in a new run"
    return f"{told}. {lower}, or freeze the tower, or take a smaller max_tiles, each in a new run"
