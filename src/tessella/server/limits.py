"""Counters that keep one client, or all of them together, from taking too much. Used from the event loop alone, but Budget.

In: who asks, and how much.  Out: a Refusal 429 with Retry-After, or nothing.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tessella.server.refusal import Refusal

MOST_CLIENTS = 10_000  # whose buckets are remembered; the one not seen for longest is forgotten first


class Rate:
    """A bucket a client: per_minute requests, refilled evenly, all of them at once if they were saved up."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (requests left, when that was so)

    def take(self, client: str) -> None:
        """Raises Refusal 429 when the client's bucket is empty."""
        if not self.per_minute:
            return
        now = self._clock()
        left, since = self._buckets.pop(client, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - since) * self.per_minute / 60)
        self._buckets[client] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        if left < 1:
            raise Refusal(
                429,
                f"more than {self.per_minute} requests a minute from you; wait",
                code="rate_limit_exceeded",
                retry_s=(1 - left) * 60 / self.per_minute,
            )


class AtOnce:
    """How many requests there are now, of one client and of all."""

    def __init__(self, all_clients: int, one_client: int):
        self.all_clients = all_clients
        self.one_client = one_client
        self.now: Counter[str] = Counter()
        self.total = 0

    @contextmanager
    def held(self, client: str) -> Iterator[None]:
        """One request, as long as the block runs. Raises Refusal 429 when there are too many."""
        if self.total >= self.all_clients:
            raise Refusal(429, f"{self.all_clients} requests are under way; send it again later", code="overloaded", retry_s=2)
        if self.now[client] >= self.one_client:
            raise Refusal(
                429, f"{self.one_client} of your requests are under way; wait for one", code="too_many_at_once", retry_s=2
            )
        self.now[client] += 1
        self.total += 1
        try:
            yield
        finally:
            self.total -= 1
            self.now[client] -= 1
            if not self.now[client]:
                del self.now[client]


class Budget:
    """Bytes of bodies and tiles that all requests together hold in memory. Thread-safe."""

    def __init__(self, limit: int):
        self.limit = limit
        self.held = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> None:
        """Raises Refusal 429 when they do not fit."""
        with self._lock:
            if self.held + size > self.limit:
                raise Refusal(429, "others fill the memory that is set aside; send it again later", code="overloaded", retry_s=2)
            self.held += size

    def give_back(self, size: int) -> None:
        with self._lock:
            self.held -= size
            assert self.held >= 0, "more was given back than taken"


class Lease:
    """What one request holds of a Budget; given back once, as a whole. Thread-safe.

    A picture may still be cut in the pool when its client has gone and the lease has ended: nothing is taken then.
    """

    def __init__(self, budget: Budget):
        self._budget = budget
        self._lock = threading.Lock()
        self._over = False
        self.held = 0

    def take(self, size: int) -> None:
        """Raises Refusal 429 when they do not fit, 408 when the lease has ended."""
        with self._lock:
            if self._over:
                raise Refusal(408, "the request has ended", code="time_limit")
            self._budget.take(size)
            self.held += size

    def end(self) -> None:
        """Gives all back; once ended, it does nothing."""
        with self._lock:
            self._over = True
            self._budget.give_back(self.held)
            self.held = 0
