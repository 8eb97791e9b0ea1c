"""Google's Batch mode on the wire: files of requests go up, jobs are created and looked after, files of results come
down.

Creating a job twice makes two jobs, so each has a display name of ours by which it is found again. Source:
https://ai.google.dev/gemini-api/docs/batch-api (input files).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from google.genai import Client, errors, types
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tenacity.nap import sleep_using_event

from vlm2vla_schema.gemini import PASSING_STATUS
from vlm2vla_training.annotation.gemini_calls import CallError, LineSettings, RefusedError, without_key
from vlm2vla_training.errors import TrainingError

T = TypeVar("T")
_SILENCE_S = 300.0
_LONGEST_WAIT_S = 60.0
_ENDED = frozenset({"SUCCEEDED", "PARTIALLY_SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED"})


class _PassingError(TrainingError):
    """Google is busy or the line failed; another attempt may go through."""


class _GoneError(CallError):
    """Google does not know what was asked for (404)."""


class GeminiJobs:
    """Jobs of Batch mode. Every method blocks and tries again when Google is busy or the line fails.

    Raises:
        CallError: by every method: not in all attempts.
        RefusedError: by every method: Google refuses this account.
    """

    def __init__(self, key: str, model: str, line: LineSettings, stop: threading.Event) -> None:
        """Open the connection; `stop` cuts waiting short."""
        # The version in which Google documents Batch mode; the library's default has changed.
        options = types.HttpOptions(timeout=int(1000 * _SILENCE_S), api_version="v1beta")
        self._client = Client(vertexai=False, api_key=key, http_options=options)
        self._key = key
        self._model = model
        self._line = line
        self._stop = stop

    def upload(self, batch: str, requests: Path) -> str:
        """Upload a file of requests, JSON lines of {key, request}; Google's name for it."""
        config = types.UploadFileConfig(display_name=batch, mime_type="jsonl")
        return str(self._retried(partial(self._client.files.upload, file=requests, config=config)).name)

    def create(self, batch: str, file: str) -> str:
        """Create the job `batch` of an uploaded file, once, whatever happens on the line; Google's name for it."""
        return self._retried(partial(self._create, batch, file))

    def find(self, batch: str) -> str | None:
        """Return Google's name for the job that was created as `batch`, or None when there is none."""
        return self._retried(partial(self._find, batch))

    def look(self, name: str) -> tuple[str | None, str | None]:
        """Return how a job ended, None while it has not, and the name of the file with its results if there is one."""
        try:
            job = self._retried(partial(self._client.batches.get, name=name))
        except _GoneError:
            return "forgotten by Google", None
        state = str(getattr(job.state, "name", job.state)).removeprefix("JOB_STATE_")
        results = job.dest.file_name if job.dest is not None else None
        return (state, results) if state in _ENDED else (None, None)

    def download(self, results: str) -> bytes:
        """Return a file of results, JSON lines of {key, response | error}; nothing when Google has deleted it."""
        try:
            return self._retried(partial(self._client.files.download, file=results))
        except _GoneError:
            return b""

    def forget(self, file: str) -> None:
        """Delete an uploaded file. Google would do so after two days, so it does not matter when this fails."""
        try:
            self._retried(partial(self._client.files.delete, name=file))
        except CallError:
            return

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _create(self, batch: str, file: str) -> str:
        found = self._find(batch)  # by an attempt whose answer got lost
        if found is None:
            config = types.CreateBatchJobConfig(display_name=batch)
            found = self._client.batches.create(model=self._model, src=file, config=config).name
        return str(found)

    def _find(self, batch: str) -> str | None:
        pages = self._client.batches.list(config=types.ListBatchJobsConfig(page_size=100))
        return next((job.name for job in pages if job.display_name == batch), None)

    def _retried(self, call: Callable[[], T]) -> T:
        retrying = Retrying(
            retry=retry_if_exception_type(_PassingError),
            stop=stop_after_attempt(self._line.attempts),
            wait=wait_random_exponential(multiplier=self._line.first_wait_s, max=_LONGEST_WAIT_S),
            sleep=sleep_using_event(self._stop),
            reraise=True,
        )
        try:
            result: T = retrying(self._translated, call)
        except _PassingError as error:
            raise CallError(str(error)) from error
        return result

    def _translated(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except errors.APIError as error:
            message = without_key(f"Google answered {error.code} {error.status or ''}: {error.message}", self._key)
            if error.code in PASSING_STATUS:
                raise _PassingError(message) from error
            raise (_GoneError if error.code == 404 else RefusedError)(message) from error
        except Exception as error:  # two HTTP libraries and Google's parsing raise nearly anything
            message = without_key(f"no answer from Google: {type(error).__name__}: {error}", self._key)
            raise _PassingError(message) from error
