"""Prometheus metrics of one server. Each app has its own registry, so that two in one process do not mix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from vlm2vla_server.engines.base import Delta, EngineLoad

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 10.0, 15.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters of requests, attempts and tokens. Labels come from closed sets: nothing a caller sends becomes one."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("vlm2vla_requests", "Answers by path and HTTP status", ["path", "status"], registry=r)
        self.seconds = Histogram(
            "vlm2vla_request_seconds", "Receipt to end of answer", ["path"], buckets=_SECONDS, registry=r
        )
        self.failed_attempts = Counter(
            "vlm2vla_failed_attempts", "Generations whose text the strict parser refused", ["stage"], registry=r
        )
        self.tokens = Counter("vlm2vla_tokens", "Tokens by stage and kind", ["stage", "kind"], registry=r)
        self.cancelled = Counter(
            "vlm2vla_cancelled", "Generations stopped early: caller gone, or newer request", ["reason"], registry=r
        )
        self.in_flight = Gauge("vlm2vla_in_flight", "Generating requests admitted and not answered", registry=r)
        self.ready = Gauge("vlm2vla_ready", "1 when the server can serve", registry=r)
        self._running = Gauge("vlm2vla_engine_running", "Generations running in the engine", registry=r)
        self._waiting = Gauge("vlm2vla_engine_waiting", "Generations waiting for the engine", registry=r)
        self._decoded = Gauge("vlm2vla_engine_decoded_tokens", "Tokens the engine decoded since start", registry=r)

    def count_tokens(self, stage: str, last: Delta | None) -> None:
        """Add one generation's tokens."""
        if last is not None:
            self.tokens.labels(stage, "prompt").inc(last.prompt_tokens)
            self.tokens.labels(stage, "completion").inc(last.completion_tokens)
            self.tokens.labels(stage, "cached").inc(last.cached_tokens)

    def exposition(self, load: EngineLoad) -> bytes:
        """The text of /metrics."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._decoded.set(load.decoded_tokens)
        return generate_latest(self.registry)
