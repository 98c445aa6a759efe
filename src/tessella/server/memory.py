"""Memory that was freed goes back to the system: at once when there is nothing to do, and now and then under load.

glibc keeps what a large picture took, for each thread that ever opened one: 250 MiB after the abuse suite (results/serving.md).
In: whether there is work, asked ten times a second.  Out: when to tidy up, and the tidying.
"""

import ctypes
import gc
import time
from collections.abc import Callable

IDLE_S = 1.0  # without work, before it is tidied: a pause between two questions is not worth it
EVERY_S = 30.0  # under load: what was given back has to be asked for again


class Tidy:
    """Says when. Nothing is due unless there was work since the last time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._done_s = self._worked_s = clock()
        self._worked = False

    def due(self, at_work: bool) -> bool:
        now = self._clock()
        if at_work:
            self._worked, self._worked_s = True, now
        idle = now - self._worked_s >= IDLE_S
        if not self._worked or not (idle or now - self._done_s >= EVERY_S):
            return False
        self._worked, self._done_s = False, now
        return True


def settle() -> None:
    """Once, before serving: what stands now stands to the end, and no collection need walk through a million objects of it."""
    gc.collect()
    gc.freeze()


def give_back() -> None:
    """Blocks for some milliseconds without Python's lock. Only glibc keeps memory so, and only it has malloc_trim."""
    gc.collect()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library: it has no such function, or cannot be asked
        return None
    return trim
