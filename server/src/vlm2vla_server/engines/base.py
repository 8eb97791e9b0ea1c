"""The Engine seam: text and pictures in, text out, one token at a time.

An engine knows no stage, prompt or parser of the paper; `policy` does. A new engine is one new file.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlm2vla_server.errors import ConfigurationError, EngineFailure, InvalidRequest

EngineFinish = Literal["stop", "length"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. parts, in order: text, or None where the next of the request's images stands."""

    role: Role
    parts: tuple[str | None, ...]


Conversation: TypeAlias = tuple[Turn, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """One generation.

    images: each uint8 RGB [size, size, 3], already squashed to the model's square; they stand before the text.
    adapter: a name given at start-up, or None for the untouched base model.
    temperature: 0 is greedy. top_p: 0 (exclusive) to 1. top_k is off and the repetition penalty is 1, always.
    grammar: EBNF that the text must follow, or None.
    turns: the conversation to answer, for the model's own chat template; `prompt` is empty then, and the images stand
    where the turns say. Engines read `conversation`.
    """

    images: tuple[NDArray[np.uint8], ...]
    prompt: str
    adapter: str | None
    temperature: float
    top_p: float
    seed: int
    max_tokens: int
    grammar: str | None = None
    turns: Conversation = ()

    @property
    def conversation(self) -> Conversation:
        """The turns; those of a stage are one: its images, then its prompt."""
        return self.turns or _one_turn(len(self.images), self.prompt)


@dataclass(frozen=True)
class ScoreRequest:
    """Log-probabilities of `completion` (and the end of turn after it), given images and prompt (or turns, as in a
    GenerationRequest), under one adapter."""

    images: tuple[NDArray[np.uint8], ...]
    prompt: str
    completion: str
    adapter: str | None
    turns: Conversation = ()

    @property
    def conversation(self) -> Conversation:
        """As in a GenerationRequest."""
        return self.turns or _one_turn(len(self.images), self.prompt)


def _one_turn(images: int, prompt: str) -> Conversation:
    return (Turn("user", (*[None] * images, prompt)),)


@dataclass(frozen=True)
class Delta:
    """Text that one decoding step made final; it may be empty. The last delta of a generation carries
    `finish_reason`. Counts are totals so far; times are milliseconds since the engine received the request."""

    text: str
    finish_reason: EngineFinish | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    queue_ms: float = 0.0
    preprocess_ms: float = 0.0


@dataclass(frozen=True)
class AdapterLoad:
    """What loading one adapter showed. `problem` is None when file, model and card agree; otherwise it says what is
    wrong, and the server does not count the adapter as active. An engine that cannot see the file leaves `hash` empty
    and `adapted_modules` None."""

    name: str
    hash: str
    adapted_modules: int | None
    problem: str | None = None


@dataclass(frozen=True)
class EngineInfo:
    """What /info and /metrics say about the engine. `versions`: library -> version. `context_tokens` 0 and `model_hash`
    "" mean that the engine cannot know. `slots`: generations it runs at once; what exceeds them waits in the server, by
    priority. 0: as many as come."""

    name: str
    device: str
    dtype: str
    context_tokens: int
    model_hash: str
    adapters: tuple[AdapterLoad, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    slots: int = 0


@dataclass(frozen=True)
class EngineLoad:
    """How busy the engine is now: generations running and waiting, and tokens decoded since start."""

    running: int
    waiting: int
    decoded_tokens: int


class EngineStartError(ConfigurationError):
    """The model or an adapter cannot be loaded; the message says which and what to do."""


class GenerationError(EngineFailure):
    """A generation broke inside the engine (500)."""


class GenerationLost(GenerationError):
    """A generation ended before its end through no fault of the request, e.g. because its machine died: asking again
    may work (500 when nobody does)."""


class ScoreUnavailable(GenerationError):
    """This engine's model cannot tell log-probabilities; the message says why (500)."""


class PromptTooLong(InvalidRequest):
    """Images and text do not fit the model's context (422)."""

    openai_code = "context_length_exceeded"


class PromptRefused(InvalidRequest):
    """The model's chat template does not take this order of turns (422)."""


class GrammarRefused(InvalidRequest):
    """The grammar cannot be read (422)."""


class Engine(Protocol):
    """What `policy` needs. All methods are called on the event loop and never block it."""

    async def start(self) -> None:
        """Load everything and warm up. Raises EngineStartError."""
        ...

    async def close(self) -> None:
        """Abort what runs and free the worker, within a few seconds. Safe to call twice."""
        ...

    async def wait_dead(self) -> str:
        """Wait until the engine can no longer serve and will not recover by itself (its process or thread has ended,
        its device is lost), and return why, in words for the log and /readyz; otherwise wait for ever. By then every
        stream of the engine ends with GenerationError. May be called before `start`."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Stream a generation. Closing the iterator (or cancelling the task that reads it) aborts it within one
        token. Raises PromptTooLong, PromptRefused, GrammarRefused, GenerationError."""
        ...

    async def score(self, request: ScoreRequest) -> list[float]:
        """Natural-log probability of each token of the completion and of the end of turn. Raises PromptTooLong,
        ScoreUnavailable, GenerationError."""
        ...

    def info(self) -> EngineInfo:
        """Facts about the loaded model; valid after `start`."""
        ...

    def load(self) -> EngineLoad:
        """Momentary load; cheap."""
        ...

    def control_tokens(self) -> frozenset[str]:
        """Texts that the tokenizer reads as control tokens (turn and image markers). Callers' text must not contain
        them: it could close the user's turn or ask for an image that is not there."""
        ...
