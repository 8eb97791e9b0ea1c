"""Prometheus metrics of one server. Each app has its own registry, so that two in one process do not mix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from vlm2vla_server.engines.base import Delta, EngineLoad

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 6.0, 10.0, 15.0, 30.0, 60.0, 120.0)
_STAGE = ["stage", "model"]


class Metrics:
    """Counters of requests, attempts and tokens. Labels come from closed sets: nothing a caller sends becomes one.
    `model` is the name of an adapter, or base."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("vlm2vla_requests", "Answers by path and HTTP status", ["path", "status"])
        self.seconds = self._seconds("vlm2vla_request_seconds", "Receipt to end of answer", ["path"])
        self.queue_seconds = self._seconds(
            "vlm2vla_queue_seconds", "Wait for a turn, by what the request is for: act, verify, ask", ["priority"]
        )
        self.stage_seconds = self._seconds(
            "vlm2vla_stage_seconds", "A stage from its start to its accepted value, retries included", _STAGE
        )
        self.first_token_seconds = self._seconds(
            "vlm2vla_first_token_seconds", "Start of a generation to its first token", _STAGE
        )
        self.first_row_seconds = self._seconds(
            "vlm2vla_first_row_seconds", "Start of a streamed actions stage to its first row", ["model"]
        )
        self.attempts = self._counter("vlm2vla_attempts", "Generations begun", _STAGE)
        self.failed_attempts = self._counter(
            "vlm2vla_failed_attempts", "Generations whose text the strict parser refused", _STAGE
        )
        self.tokens = self._counter("vlm2vla_tokens", "Tokens by stage and kind", ["stage", "model", "kind"])
        self.cancelled = self._counter(
            "vlm2vla_cancelled",
            "Generations stopped early: disconnected, superseded, shutdown, engine_died",
            ["reason", "model"],
        )
        self.in_flight = self._gauge("vlm2vla_in_flight", "Generating requests admitted and not answered")
        self.queued = self._gauge("vlm2vla_queued", "Admitted requests that wait for their turn")
        self.ready = self._gauge("vlm2vla_ready", "1 when the server can serve")
        self._running = self._gauge("vlm2vla_engine_running", "Generations running in the engine")
        self._waiting = self._gauge("vlm2vla_engine_waiting", "Generations waiting for the engine")
        self._decoded = self._gauge("vlm2vla_engine_decoded_tokens", "Tokens the engine decoded since start")

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _seconds(self, name: str, text: str, labels: list[str]) -> Histogram:
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def count_tokens(self, stage: str, model: str, last: Delta | None) -> None:
        """Add one generation's tokens."""
        if last is not None:
            self.tokens.labels(stage, model, "prompt").inc(last.prompt_tokens)
            self.tokens.labels(stage, model, "completion").inc(last.completion_tokens)
            self.tokens.labels(stage, model, "cached").inc(last.cached_tokens)

    def exposition(self, load: EngineLoad) -> bytes:
        """The text of /metrics."""
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._decoded.set(load.decoded_tokens)
        return generate_latest(self.registry)
