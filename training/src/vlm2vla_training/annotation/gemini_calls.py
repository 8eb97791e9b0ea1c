"""Requests to Gemini: rate limits, retries, the budget and the journal around Google's library."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from google.genai import Client, errors, types
from pyrate_limiter import Duration, Limiter, Rate
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from tenacity.nap import sleep_using_event

from vlm2vla_schema.gemini import PASSING_STATUS, GeminiAnswer, Price, asked_to_wait_s, read_answer
from vlm2vla_training.annotation.gemini_budget import Budget, dollars, image_tokens
from vlm2vla_training.annotation.gemini_journal import Journal
from vlm2vla_training.annotation.gemini_request import Question, RequestSettings, mime_type, response_schema
from vlm2vla_training.errors import TrainingError

if TYPE_CHECKING:
    from google.genai.types import GenerateContentConfig

_MAX_MESSAGE_CHARS = 300
_TOKENS_A_PERMIT = 1000
_SILENCE_S = 300.0
_LONGEST_WAIT_S = 60.0
# Who asks for a longer wait than this means another day.
_LONGEST_WISH_S = 180.0
# These are about the key, the account or the model: every other request would be refused too.
_REFUSES_ALL = frozenset({401, 403, 404})


class CallError(TrainingError):
    """No answer for this episode now; the same command tries again."""


class RefusedError(CallError):
    """Google refuses requests of this kind, whatever the episode; the run must stop."""


class StoppedError(TrainingError):
    """The run is ending: nothing more is sent."""


class _PassingError(CallError):
    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True)
class LineSettings:
    """How fast and how often to ask.

    Attributes:
        requests_per_minute: of the account; likewise tokens_per_minute, of the prompts.
        attempts: requests for one answer at most, when Google is busy or the line fails.
        first_wait_s: upper end of the random wait before the second; doubles. Google's own wish counts when longer.
    """

    requests_per_minute: int = 150
    tokens_per_minute: int = 1_000_000
    attempts: int = 8
    first_wait_s: float = 2.0


class GeminiCalls:
    """Asks Gemini. Safe to use from several threads; every answer is in the journal before it is returned."""

    def __init__(
        self,
        key: str,
        settings: RequestSettings,
        line: LineSettings,
        price: Price,
        journal: Journal,
        budget: Budget,
        stop: threading.Event,
    ) -> None:
        """Open the connection; `key` is the API key, `stop` ends waiting and lets nothing more go."""
        self._client = Client(vertexai=False, api_key=key)
        self._key = key
        self._settings = settings
        self._line = line
        self._price = price
        self._journal = journal
        self._budget = budget
        self._stop = stop
        self._requests = Limiter(Rate(line.requests_per_minute, Duration.MINUTE))
        self._permits = max(1, line.tokens_per_minute // _TOKENS_A_PERMIT)
        self._tokens = Limiter(Rate(self._permits, Duration.MINUTE))

    def ask(self, question: Question, sizes: Sequence[tuple[int, int]], repair: tuple[str, str] | None) -> GeminiAnswer:
        """Return the answer to a question, or to its repair; an answer of an earlier run is not asked for again.

        Args:
            question: what is asked.
            sizes: (width, height) in pixels of its pictures.
            repair: the first answer's text and the repair prompt, for the second round.

        Raises:
            CallError: no answer after all attempts, or this request is refused.
            RefusedError: all requests are refused.
            BudgetError: the limit in dollars is reached.
            StoppedError: `stop` was set.
        """
        turn = 0 if repair is None else 1
        recorded = self._journal.recorded(question.content, turn)
        if recorded is not None:
            return recorded
        prompt_tokens = most_prompt_tokens(question, sizes, repair)
        backoff = wait_random_exponential(multiplier=self._line.first_wait_s, max=_LONGEST_WAIT_S)

        def wait_s(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(backoff(state), error.wait_s if isinstance(error, _PassingError) else 0.0)

        retrying = Retrying(
            retry=retry_if_exception_type(_PassingError),
            stop=stop_after_attempt(self._line.attempts),
            wait=wait_s,
            sleep=sleep_using_event(self._stop),
            reraise=True,
        )
        return retrying(self._once, question, repair, turn, prompt_tokens)

    def _once(self, question: Question, repair: tuple[str, str] | None, turn: int, prompt_tokens: int) -> GeminiAnswer:
        bound_usd = dollars(prompt_tokens, self._settings.max_output_tokens, self._price)
        self._budget.reserve(bound_usd)
        usd = 0.0
        try:
            self._wait_for_rates(prompt_tokens)
            if self._stop.is_set():
                raise StoppedError("stopped before the request was sent")
            number = self._journal.asked(question.episode_key, question.content, turn, self._settings.model, bound_usd)
            usd = bound_usd  # until it is known that it was less
            try:
                response = self._generate(question, repair)
            except errors.APIError as error:
                usd = 0.0
                message = self._clean(f"Google answered {error.code} {error.status or ''}: {error.message}")
                self._journal.refused(number, message)
                raise _refusal(error, message) from error
            except Exception as error:  # two HTTP libraries and Google's parsing raise nearly anything
                message = self._clean(f"no answer from Google: {type(error).__name__}: {error}")
                self._journal.lost(number, message, bound_usd)
                raise _PassingError(message) from error
            answer = storable(read_answer(response))
            usd = self._journal.answered(number, answer, bound_usd)
            return answer
        finally:
            self._budget.settle(bound_usd, usd)

    def _wait_for_rates(self, prompt_tokens: int) -> None:
        permits = min(self._permits, -(-prompt_tokens // _TOKENS_A_PERMIT))
        for limiter, weight in ((self._requests, 1), (self._tokens, permits)):
            while not self._stop.is_set() and not limiter.try_acquire("gemini", weight, timeout=0.5):
                pass

    def _generate(self, question: Question, repair: tuple[str, str] | None) -> Any:
        contents: list[Any] = [*contents_of(question, repair)]
        return self._client.models.generate_content(
            model=self._settings.model, contents=contents, config=self._config()
        )

    def _config(self) -> GenerateContentConfig:
        return types.GenerateContentConfig(
            response_mime_type="application/json",
            response_schema=response_schema(self._settings.version),
            temperature=self._settings.temperature,
            top_p=self._settings.top_p,
            max_output_tokens=self._settings.max_output_tokens,
            automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
            http_options=types.HttpOptions(timeout=int(1000 * _SILENCE_S)),
        )

    def _clean(self, text: str) -> str:
        return without_key(text, self._key)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def contents_of(question: Question, repair: tuple[str, str] | None) -> list[types.Content]:
    """The turns of a question, or of its repair: pictures, the log, what was said, what is wrong with it."""
    parts: list[types.Part] = []
    for number, data in question.frames:
        if question.labelled:
            parts.append(types.Part.from_text(text=f"Observation {number}:"))
        parts.append(types.Part.from_bytes(data=data, mime_type=mime_type(data)))
    contents = [types.Content(role="user", parts=[*parts, types.Part.from_text(text=question.prompt)])]
    if repair is not None:
        said, findings = repair
        if said:
            contents.append(types.Content(role="model", parts=[types.Part.from_text(text=said)]))
        contents.append(types.Content(role="user", parts=[types.Part.from_text(text=findings)]))
    return contents


def most_prompt_tokens(question: Question, sizes: Sequence[tuple[int, int]], repair: tuple[str, str] | None) -> int:
    """The most tokens that a question can count: a token is at least one byte of text."""
    letters = question.prompt + ("" if repair is None else "".join(repair))
    return sum(image_tokens(*size) for size in sizes) + len(letters.encode())


def without_key(text: str, key: str) -> str:
    """An error's text, short and without the API key."""
    return text.replace(key, "[key]")[:_MAX_MESSAGE_CHARS]


def _refusal(error: errors.APIError, message: str) -> CallError:
    code = int(error.code or 0)
    if code in PASSING_STATUS:
        wish_s = asked_to_wait_s(error)
        if wish_s > _LONGEST_WISH_S:
            return CallError(f"{message} (and asks to wait {wish_s:.0f} s)")
        return _PassingError(message, wish_s)
    refuses_all = code in _REFUSES_ALL or "api key" in message.lower()
    return RefusedError(message) if refuses_all else CallError(message)


def storable(answer: GeminiAnswer) -> GeminiAnswer:
    """Half of a surrogate pair has no place in a file; what is judged is what was stored."""
    if answer.text is None:
        return answer
    text = answer.text.encode(errors="replace").decode()
    return GeminiAnswer(answer.outcome, text, answer.finish_reason, answer.message, answer.tokens)
