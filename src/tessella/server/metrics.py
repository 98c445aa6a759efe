"""What Prometheus reads: the engine's state as it is when asked, and what the server saw of each request.

In: EngineState, pieces, refusals.  Out: the text of /metrics. Names begin with tessella_.
"""

import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tessella.engine.request import EngineState, Piece, Usage
from tessella.server.refusal import Refusal

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/adapters", "/health", "/ready", "/metrics")
FAST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
# Field of EngineState -> what it is.
GAUGES = {
    "waiting": "Requests that wait for room.",
    "running": "Answers that grow.",
    "blocks": "Blocks of the cache.",
    "blocks_used": "Blocks held by answers that run.",
    "blocks_cached": "Blocks kept for prompts that begin alike.",
    "vision_bytes": "Bytes of visual tokens that are kept.",
}
COUNTERS = {
    "steps": "Steps of the engine.",
    "submitted": "Requests taken by the engine.",
    "stopped": "Answers that the model or a stop string ended.",
    "length": "Answers that max_tokens ended.",
    "cancelled": "Answers that were cancelled.",
    "failed": "Answers that ended with an error.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were found in the cache.",
    "computed_tokens": "Tokens run through the decoder.",
    "answer_tokens": "Tokens of answers.",
    "preemptions": "Answers set back for want of blocks.",
    "tiles": "Tiles run through the tower.",
    "tiles_cached": "Tiles found in the vision cache.",
}


class _EngineCollector(Collector):
    def __init__(self, state: Callable[[], EngineState]):
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        values = {**state.__dict__}
        yield GaugeMetricFamily("tessella_engine_up", "1 while the engine's thread runs.", float(state.alive))
        for name, about in GAUGES.items():
            yield GaugeMetricFamily(f"tessella_engine_{name}", about, float(values[name]))
        for name, about in COUNTERS.items():
            yield CounterMetricFamily(f"tessella_engine_{name}", about, float(values[name]))


class Metrics:
    """One registry a server, so that two in one process do not mix."""

    def __init__(self, state: Callable[[], EngineState]):
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(state))
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self.first_token = Histogram(
            "tessella_time_to_first_token_seconds", "Submit to first token.", buckets=FAST, registry=registry
        )
        self.between = Histogram(
            "tessella_inter_token_seconds",
            "Between tokens of one answer, as they reached the server.",
            buckets=BETWEEN,
            registry=registry,
        )
        self.prepare = Histogram(
            "tessella_prepare_seconds", "Body read to prompt ready: pictures, tiles, tokens.", buckets=FAST, registry=registry
        )
        self.whole = Histogram("tessella_request_seconds", "Submit to the last piece.", buckets=WHOLE, registry=registry)
        self.requests = Counter("tessella_requests", "Requests by how they ended.", ("route", "status"), registry=registry)
        self.errors = Counter("tessella_errors", "Refusals and failures.", ("status", "code"), registry=registry)

    def refused(self, refusal: Refusal) -> None:
        self.errors.labels(refusal.status, refusal.body.error.code or "").inc()

    def answered(self, path: str, status: int) -> None:
        self.requests.labels(path if path in ROUTES else "other", status).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def watch(self) -> "Watch":
        return Watch(self)


class Watch:
    """The times of one request's answers."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}

    def saw(self, index: int, piece: Piece) -> None:
        now = time.perf_counter()
        if piece.ids:
            if index in self._last:
                self._metrics.between.observe((now - self._last[index]) / len(piece.ids))
            self._last[index] = now
        if piece.usage is not None:
            self._observe(piece.usage, now)

    def _observe(self, usage: Usage, now: float) -> None:
        if usage.seconds_to_first_token is not None:
            self._metrics.first_token.observe(usage.seconds_to_first_token)
        self._metrics.whole.observe(now - self._start)
