"""Where a run ends before its last step: a person's Ctrl-C, a time limit, or no memory left.

In: signals, the clock, what the allocator raises.  Out: a reason to stop, or a MemoryError_ with an estimate and what to lower.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tessella.errors import MemoryError_, is_out_of_memory
from tessella.model.device import free_bytes
from tessella.model.vision_language import VisionLanguageModel
from tessella.train.lora import Taught
from tessella.train.recipe import Recipe


class Stop:
    """Asked between passes: must we stop, and why? The first SIGINT or SIGTERM only asks, the second breaks off at once."""

    def __init__(self, time_limit_s: float | None, started: float):
        self.signalled = False
        self.deadline = None if time_limit_s is None else started + time_limit_s

    @property
    def reason(self) -> str | None:
        if self.signalled:
            return "interrupted"
        return "time limit" if self.deadline is not None and time.monotonic() >= self.deadline else None

    def _signal(self, number: int, frame: FrameType | None) -> None:
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True
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
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    learning = 16 * taught.count()  # float32 master, gradient, two moments
    kept = model.dtype.itemsize * (16 * language.hidden_size + 6 * language.intermediate_size) * language.num_layers
    return weights + learning + tokens_per_pass * kept


@contextmanager
def memory_told(recipe: Recipe, model: VisionLanguageModel, taught: Taught) -> Iterator[None]:
    """Turn what an allocator raises into MemoryError_ with the estimate and what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        need = estimate_bytes(model, taught, recipe.tokens_per_pass) / 2**30
        free = free_bytes(model.device) / 2**30
        raise MemoryError_(
            f"out of memory on {model.device}: a step of this recipe needs about {need:.1f} GiB, {free:.1f} GiB are free now. "
            f"Lower tokens_per_pass (now {recipe.tokens_per_pass:,}; it changes no result) or max_tiles, or freeze the tower"
            "; then resume from the newest checkpoint"
        ) from error
