"""The policy of the paper over an Engine: prompt -> generate -> parse -> again with a new seed.

A stage either yields a value that the strict parser accepted, or raises. Nothing is padded, repaired or replaced by a
default: a robot would move by it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.parsing import RowStream
from vlm2vla_schema.types import Chunk
from vlm2vla_server import logs
from vlm2vla_server.engines.base import Delta, Engine, GenerationLost, GenerationRequest
from vlm2vla_server.errors import DeadlineExceeded, UnparseableOutput, attempt_details
from vlm2vla_server.metrics import Metrics
from vlm2vla_server.stages import ServedModel, Stage

log = logging.getLogger("vlm2vla_server")

T = TypeVar("T")
RowSink = Callable[[int, list[float]], Awaitable[None]]
"""Called with (index, row) as soon as a row's closing bracket is decoded. After the first call the attempt is final."""

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """How to sample and how often to try. seed None draws one; attempt k uses seed + k. max_tokens None takes the
    stage's own default."""

    temperature: float
    top_p: float
    seed: int | None
    max_tokens: int | None
    max_attempts: int
    constrained: bool


@dataclass(frozen=True)
class FailedAttempt:
    """An attempt that gave no acceptable text."""

    stage: str
    raw_text: str
    finish_reason: str
    problem: str

    def details(self) -> dict[str, Any]:
        """As it stands in error details."""
        return {
            "stage": self.stage,
            "raw_text": self.raw_text,
            "finish_reason": self.finish_reason,
            "problem": self.problem,
        }


@dataclass
class Spent:
    """What the attempts of one stage cost, added up. Times in milliseconds."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_ms: float = 0.0
    preprocess_ms: float = 0.0
    first_token_ms: float = 0.0
    generate_ms: float = 0.0
    parse_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """A stage's accepted value and how it came about."""

    value: T
    raw_text: str
    attempts: int
    finish_reason: str
    prompt_version: str
    spent: Spent


@dataclass
class Clocking:
    """Points in time on the monotonic clock, in seconds: when the stage's time began (receipt of the request, or the
    end of the stage before), and when the request's deadline falls. queued_s: how much of the time since then went by
    in the server's queue."""

    began_s: float
    deadline_s: float
    queued_s: float = 0.0


class _AttemptFailed(Exception):
    """Carries the failure out of one attempt; `final` when rows have left already."""

    def __init__(self, failure: FailedAttempt, final: bool) -> None:
        super().__init__(failure.problem)
        self.failure = failure
        self.final = final


@dataclass
class _Text:
    """What one attempt has produced so far."""

    pieces: list[str] = field(default_factory=list)
    last: Delta | None = None
    sent_rows: int = 0

    @property
    def raw(self) -> str:
        return "".join(self.pieces)

    @property
    def finish(self) -> str:
        return (self.last.finish_reason if self.last else None) or "aborted"


class Policy:
    """Runs stages. Safe to use from many tasks at once."""

    def __init__(self, engine: Engine, metrics: Metrics, *, log_texts: bool = False) -> None:
        """log_texts: prompts and raw texts go to the log; for debugging only."""
        self._engine = engine
        self._metrics = metrics
        self._log_texts = log_texts

    async def run(
        self,
        stage: Stage[T],
        model: ServedModel,
        images: Sequence[NDArray[np.uint8]],
        sampling: Sampling,
        clocking: Clocking,
        sink: RowSink | None = None,
    ) -> Outcome[T]:
        """Run one stage to an accepted value.

        images: RGB squares of the card's size, in the order in which the prompt speaks of them.
        Raises UnparseableOutput, DeadlineExceeded, GenerationError, PromptTooLong. Cancelling aborts the generation.
        """
        failures: list[FailedAttempt] = []
        text = _Text()
        queue_ms = clocking.queued_s * 1000.0
        spent = Spent(queue_ms=queue_ms, preprocess_ms=max(0.0, _ms_since(clocking.began_s) - queue_ms))
        seed = sampling.seed if sampling.seed is not None else secrets.randbelow(2**31)
        remaining_s = clocking.deadline_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, remaining_s)):
                for attempt in range(sampling.max_attempts):
                    text = _Text()
                    self._check_deadline(clocking)
                    request = _request(stage, model, images, sampling, (seed + attempt) % MAX_SEED)
                    try:
                        self._metrics.attempts.labels(stage.name, model.name).inc()
                        value = await self._attempt(stage, request, text, spent, model.name, sink)
                    except GenerationLost as lost:
                        if text.sent_rows or attempt + 1 == sampling.max_attempts:
                            raise
                        failures.append(FailedAttempt(stage.name, text.raw, "lost", str(lost)))
                        continue
                    except _AttemptFailed as failed:
                        failures.append(failed.failure)
                        self._metrics.failed_attempts.labels(stage.name, model.name).inc()
                        if failed.final:
                            break
                        continue
                    spent.total_ms = _ms_since(clocking.began_s)
                    self._metrics.stage_seconds.labels(stage.name, model.name).observe(spent.total_ms / 1000.0)
                    return Outcome(value, text.raw, attempt + 1, text.finish, stage.prompt_version, spent)
        except TimeoutError:
            if text.pieces:
                failures.append(FailedAttempt(stage.name, text.raw, "deadline", "the deadline passed while generating"))
            raise _too_late(stage.name, failures) from None
        raise _unparseable(stage.name, failures)

    @staticmethod
    def _check_deadline(clocking: Clocking) -> None:
        if time.monotonic() >= clocking.deadline_s:
            raise TimeoutError

    async def _attempt(
        self,
        stage: Stage[T],
        request: GenerationRequest,
        text: _Text,
        spent: Spent,
        model: str,
        sink: RowSink | None,
    ) -> T:
        rows = stage.rows() if stage.rows is not None and sink is not None else None
        started_s = time.monotonic()
        try:
            # Closing the stream frees the engine, whichever way this block is left.
            async with closing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    if not text.pieces:
                        spent.first_token_ms = max(0.0, _ms_since(started_s) - delta.queue_ms - delta.preprocess_ms)
                        first_s = spent.first_token_ms / 1000.0
                        self._metrics.first_token_seconds.labels(stage.name, model).observe(first_s)
                    text.pieces.append(delta.text)
                    text.last = delta
                    if rows is not None and sink is not None:
                        with _timed(spent):
                            ready = rows.feed(delta.text)
                        if ready and not text.sent_rows:
                            self._metrics.first_row_seconds.labels(model).observe(_ms_since(started_s) / 1000.0)
                        await _send_rows(ready, text, sink)
            return await self._accept(stage, text, rows, sink, spent)
        except ParseError as problem:
            failure = FailedAttempt(stage.name, text.raw, text.finish, str(problem))
            raise _AttemptFailed(failure, final=text.sent_rows > 0) from None
        finally:
            _account(spent, text.last, _ms_since(started_s))
            self._metrics.count_tokens(stage.name, model, text.last)
            if self._log_texts:
                texts = logs.fields(stage=stage.name, model=model, prompt=request.prompt, raw_text=text.raw)
                log.info("attempt", extra=texts)

    @staticmethod
    async def _accept(
        stage: Stage[T], text: _Text, rows: RowStream | None, sink: RowSink | None, spent: Spent
    ) -> T:
        if text.finish == "length" and stage.cut_is_failure:
            raise ParseError("the text was cut by max_tokens", text.raw, "an answer that ends by itself")
        with _timed(spent):
            value = stage.parse(text.raw) if rows is None else cast("T", rows.close())
        if sink is not None and isinstance(value, Chunk):
            await _send_rows(value.rows[text.sent_rows :], text, sink)
        return value


async def _send_rows(rows: Sequence[list[float]], text: _Text, sink: RowSink) -> None:
    for row in rows:
        index = text.sent_rows
        text.sent_rows += 1
        await sink(index, row)


@contextmanager
def _timed(spent: Spent) -> Iterator[None]:
    """Count what happens inside as parsing."""
    began_s = time.monotonic()
    try:
        yield
    finally:
        spent.parse_ms += _ms_since(began_s)


@asynccontextmanager
async def closing(deltas: AsyncIterator[Delta]) -> AsyncIterator[AsyncIterator[Delta]]:
    """Close an engine's iterator on the way out; the Protocol asks only for an iterator, which may have no aclose."""
    try:
        yield deltas
    finally:
        close = getattr(deltas, "aclose", None)
        if close is not None:
            await close()


def _too_late(stage: str, failures: Sequence[FailedAttempt]) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the deadline passed in stage {stage!r} after {len(failures)} attempt(s); allow more with deadline_ms, or ask "
        "again",
        details=attempt_details([failure.details() for failure in failures]),
    )


def _unparseable(stage: str, failures: Sequence[FailedAttempt]) -> UnparseableOutput:
    return UnparseableOutput(
        f"stage {stage!r}: no text of {len(failures)} attempt(s) is acceptable; last: {failures[-1].problem}",
        details=attempt_details([failure.details() for failure in failures]),
    )


def _request(
    stage: Stage[Any], model: ServedModel, images: Sequence[NDArray[np.uint8]], sampling: Sampling, seed: int
) -> GenerationRequest:
    return GenerationRequest(
        images=tuple(images),
        prompt=stage.prompt,
        adapter=model.adapter,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=seed,
        max_tokens=sampling.max_tokens if sampling.max_tokens is not None else stage.max_tokens,
        grammar=stage.grammar if sampling.constrained else None,
    )


def _account(spent: Spent, last: Delta | None, elapsed_ms: float) -> None:
    if last is None:
        spent.queue_ms += elapsed_ms
        return
    spent.prompt_tokens += last.prompt_tokens
    spent.completion_tokens += last.completion_tokens
    spent.cached_tokens += last.cached_tokens
    spent.queue_ms += last.queue_ms
    spent.preprocess_ms += last.preprocess_ms
    spent.generate_ms += max(0.0, elapsed_ms - last.queue_ms - last.preprocess_ms)


def _ms_since(moment_s: float) -> float:
    return (time.monotonic() - moment_s) * 1000.0
