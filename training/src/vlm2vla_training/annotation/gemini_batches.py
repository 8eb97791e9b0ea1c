"""Asking through Google's Batch mode: half the price, an answer within a day.

Questions are queued into a file, a file becomes a job, and whoever asks again once the job has ended gets the answer.
Every request is in the journal under its job's name before the job is submitted: by that name a run that goes on after
another was killed finds out whether the job was created, and it asks for nothing that a job is about.
"""

from __future__ import annotations

import json
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm2vla_schema.gemini import PASSING_STATUS, GeminiAnswer, Price, read_answer
from vlm2vla_training.annotation.gemini_budget import dollars, limit_reached
from vlm2vla_training.annotation.gemini_calls import (
    CallError,
    RefusedError,
    StoppedError,
    contents_of,
    most_prompt_tokens,
    storable,
)
from vlm2vla_training.annotation.gemini_jobs import GeminiJobs
from vlm2vla_training.annotation.gemini_journal import Job, Journal
from vlm2vla_training.annotation.gemini_request import Question, RequestSettings, response_schema
from vlm2vla_training.errors import TrainingError

# Google takes files of at most 2 GB.
MAX_FILE_BYTES = 1_900_000_000
# Inside a result file errors carry google.rpc codes: cancelled, deadline, exhausted, aborted, internal, unavailable.
_PASSING_CODES = frozenset({1, 4, 8, 10, 13, 14}) | PASSING_STATUS
_MAX_MESSAGE_CHARS = 300


class WaitingError(TrainingError):
    """The answer will come with a job of Batch mode."""


@dataclass(frozen=True)
class BatchSettings:
    """How jobs are made.

    Attributes:
        requests: of one job at most; its file has at most MAX_FILE_BYTES as well.
        attempts: for one answer, when a job ends without it for a passing reason.
        poll_s: between two looks at the jobs.
        max_usd: earlier runs in the folder included.
    """

    requests: int
    attempts: int
    poll_s: float
    max_usd: float


class BatchCalls:
    """Asks Gemini through jobs: `ask` queues, `submit` sends, `next_ended` waits. Not for several threads.

    `closed` says why no more jobs are made, None while they are.
    """

    def __init__(
        self,
        settings: RequestSettings,
        batches: BatchSettings,
        price: Price,
        journal: Journal,
        jobs: GeminiJobs,
        folder: Path,
        stop: threading.Event,
    ) -> None:
        """Remember all; `price` is Batch mode's, `folder` the run's, `stop` ends waiting."""
        self.closed: str | None = None
        self._settings = settings
        self._batches = batches
        self._price = price
        self._journal = journal
        self._jobs = jobs
        self._folder = folder
        self._stop = stop
        self._queued: str | None = None
        self._tries: dict[tuple[str, int], tuple[int, str]] = {}
        for leftover in folder.glob("job-*.jsonl"):
            leftover.unlink()

    def ask(self, question: Question, sizes: Sequence[tuple[int, int]], repair: tuple[str, str] | None) -> GeminiAnswer:
        """Return the answer when it is there; otherwise it is queued, or waited for already.

        Raises:
            WaitingError: it is not there yet.
            CallError: Google did not answer this request in all attempts, or refuses it.
            BudgetError: the limit in dollars is reached.
        """
        turn = 0 if repair is None else 1
        this = (question.content, turn)
        recorded = self._journal.recorded(*this)
        if recorded is not None:
            return recorded
        if self.closed is not None or this in self._journal.waiting():
            raise WaitingError("not answered yet")
        tries, message = self._tries.get(this, (0, ""))
        if tries >= self._batches.attempts:
            raise CallError(message)
        prompt_tokens = most_prompt_tokens(question, sizes, repair)
        bound_usd = dollars(prompt_tokens, self._settings.max_output_tokens, self._price)
        spent_usd = self._journal.spent.at_most_usd() + self._journal.waiting_usd()
        if spent_usd + bound_usd > self._batches.max_usd:
            if not self._journal.jobs:
                raise limit_reached(self._batches.max_usd, spent_usd, bound_usd)
            raise WaitingError("open jobs may prove cheaper than their bounds")
        self._queue(question, repair, turn, bound_usd)
        raise WaitingError("queued")

    def _queue(self, question: Question, repair: tuple[str, str] | None, turn: int, bound_usd: float) -> None:
        self._queued = batch = self._queued or f"vlm2vla-{uuid.uuid4().hex}"
        model = self._settings.model
        number = self._journal.asked(question.episode_key, question.content, turn, model, bound_usd, batch)
        turns = [one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in contents_of(question, repair)]
        request = {"contents": turns, "generationConfig": _generation_config(self._settings)}
        with self._requests_of(batch).open("ab") as file:
            file.write(json.dumps({"key": str(number), "request": request}).encode() + b"\n")
            size = file.tell()
        if len(self._journal.jobs[batch].calls) >= self._batches.requests or size >= MAX_FILE_BYTES:
            self.submit()

    def submit(self) -> None:
        """Send what is queued as one job. When Google takes no more jobs, `closed` says why.

        Raises:
            RefusedError: Google refuses all requests of this account.
            CallError: it is not known whether the job was created; the next run will find out.
        """
        if self._queued is None:
            return
        job, self._queued = self._journal.jobs[self._queued], None
        try:
            file = self._jobs.upload(job.batch, self._requests_of(job.batch))
            name = self._jobs.create(job.batch, file)
        except CallError as error:
            self.closed = f"no job could be submitted: {error}"
            self._resolve(job, str(error))
            if isinstance(error, RefusedError):
                raise
        else:
            self._journal.named(job, name, file)
        finally:
            self._requests_of(job.batch).unlink()

    def recover(self) -> None:
        """Learn what became of jobs that an earlier run was about to submit when it ended.

        Raises:
            CallError: Google does not say.
        """
        for job in list(self._journal.jobs.values()):
            if job.name is None:
                self._resolve(job, "never submitted: the run ended before")

    def _resolve(self, job: Job, message: str) -> None:
        """A job that Google's list does not have was not created and costs nothing."""
        name = self._jobs.find(job.batch)
        if name is not None:
            self._journal.named(job, name, "")
            return
        for number in list(job.calls):
            self._journal.refused(number, message)

    def next_ended(self) -> bool:
        """Wait until a job has ended and record its results; False when no job is open.

        Raises:
            CallError: Google does not say how the jobs are.
            StoppedError: `stop` was set.
        """
        jobs = [job for job in self._journal.jobs.values() if job.name is not None]
        if jobs:
            requests = sum(len(job.calls) for job in jobs)
            said = f"annotate: waiting for {len(jobs)} jobs with {requests} requests"
            print(f"{said}; the same command goes on after an interruption", file=sys.stderr, flush=True)
        while jobs:
            for job in jobs:
                state, results = self._jobs.look(str(job.name))
                if state is not None:
                    self._collect(job, state, results)
                    return True
            if self._stop.wait(self._batches.poll_s):
                raise StoppedError("stopped while jobs were under way")
        return False

    def waiting_episodes(self) -> set[str]:
        """Return the keys of the episodes that open jobs are about."""
        return set(self._journal.waiting().values())

    def _collect(self, job: Job, state: str, results: str | None) -> None:
        """Record every result that is not recorded yet, then what is missing as lost."""
        for number, body in _lines(self._jobs.download(results) if results else b""):
            if number in job.calls:
                self._record(number, job.calls[number], body)
        for number, asked in list(job.calls.items()):
            message = f"job {job.name} ended without this answer ({state})"
            self._failed(asked, message, again=False)
            self._journal.lost(number, message, asked["bound_usd"])
        if job.file:
            self._jobs.forget(job.file)

    def _record(self, number: int, asked: dict[str, Any], body: dict[str, Any]) -> None:
        if isinstance(body.get("response"), dict):
            self._journal.answered(number, storable(read_answer(_Fields(body["response"]))), asked["bound_usd"])
            return
        error: Any = body.get("error")
        code, said = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, error)
        message = f"Google answered {code} inside a job: {said}"[:_MAX_MESSAGE_CHARS]
        self._failed(asked, message, again=code in _PASSING_CODES)
        self._journal.refused(number, message)

    def _failed(self, asked: dict[str, Any], message: str, again: bool) -> None:
        this = (asked["content"], asked["round"])
        tries = self._tries.get(this, (0, ""))[0] + 1
        self._tries[this] = (tries if again else self._batches.attempts, message)

    def _requests_of(self, batch: str) -> Path:
        return self._folder / f"job-{batch}.jsonl"

    def close(self) -> None:
        """Delete the files of requests and close the connection."""
        for file in self._folder.glob("job-*.jsonl"):
            file.unlink()
        self._jobs.close()


class _Fields:
    """JSON of the REST protocol, read by the names that Google's library has; what is not there is None."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def __getattr__(self, name: str) -> Any:
        first, *others = name.split("_")
        value = self._fields.get(first + "".join(part.capitalize() for part in others))
        if isinstance(value, list):
            return [_Fields(item) if isinstance(item, dict) else item for item in value]
        return _Fields(value) if isinstance(value, dict) else value


def _lines(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the request's number and the result of every line that can be read; the others count as missing."""
    for line in data.split(b"\n"):
        try:
            body = json.loads(line)
            number = int(body["key"])
        except (ValueError, KeyError, TypeError):
            continue
        yield number, body


def _generation_config(settings: RequestSettings) -> dict[str, Any]:
    config = {
        "responseMimeType": "application/json",
        "responseSchema": response_schema(settings.version),
        "temperature": settings.temperature,
        "topP": settings.top_p,
        "maxOutputTokens": settings.max_output_tokens,
    }
    return {name: value for name, value in config.items() if value is not None}
