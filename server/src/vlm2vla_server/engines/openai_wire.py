"""What goes over the wire to an OpenAI-compatible endpoint and what comes back, as data: no connection is made here.

Shapes: https://platform.openai.com/docs/api-reference/chat; vLLM's further fields: its page "OpenAI-Compatible Server".
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlm2vla_server.engines.base import (
    Conversation,
    GenerationError,
    GenerationLost,
    GenerationRequest,
    GrammarRefused,
    PromptTooLong,
    ScoreRequest,
    ScoreUnavailable,
)
from vlm2vla_server.errors import Overloaded, ServerError

log = logging.getLogger("vlm2vla_server")

MAX_EVENT_BYTES = 2**20
MAX_LOGGED_CHARS = 500
Dialect = Literal["vllm", "openai"]
GrammarField = Literal["structured_outputs", "guided_grammar", "off"]


class _Received(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class _CachedTokens(_Received):
    cached_tokens: int | None = None


class Usage(_Received):
    """Tokens of one completion."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _CachedTokens | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens taken from a prefix cache; 0 when the endpoint does not say."""
        details = self.prompt_tokens_details
        return (details.cached_tokens or 0) if details is not None else 0


class _Text(_Received):
    content: str | None = None


class _Choice(_Received):
    delta: _Text = Field(default_factory=_Text)
    finish_reason: str | None = None


class Chunk(_Received):
    """One event of a stream."""

    choices: list[_Choice] = Field(default_factory=list)
    usage: Usage | None = None
    error: Any = None


class _Logprob(_Received):
    logprob: float
    decoded_token: str | None = None


class Completion(_Received):
    """An answer that was not streamed, as far as scoring needs it."""

    usage: Usage = Field(default_factory=Usage)
    prompt_logprobs: list[dict[str, _Logprob] | None] | None = None

    def scores(self, prompt_tokens: int) -> list[float]:
        """Log-probabilities of what stands behind the prompt: the completion and its end of turn. A template may write
        white space after that mark, which is no part of the answer. Raises ScoreUnavailable."""
        # vLLM writes the token that is there first, and the likeliest after it.
        entries = [next(iter(entry.values()), None) if entry else None for entry in self.prompt_logprobs or []]
        tail = entries[prompt_tokens:]
        while tail and tail[-1] is not None and tail[-1].decoded_token and not tail[-1].decoded_token.strip():
            tail.pop()
        values = [entry.logprob for entry in tail if entry is not None]
        if not values or len(values) != len(tail):
            raise ScoreUnavailable("the endpoint gives no log-probabilities of a given answer (prompt_logprobs)")
        return values


class _ListedModel(_Received):
    id: str
    parent: str | None = None
    max_model_len: int | None = None


class ListedModels(_Received):
    """GET /models."""

    data: list[_ListedModel]


@dataclass(frozen=True)
class Names:
    """How the endpoint calls the base and the adapters."""

    base: str
    adapters: Mapping[str, str]

    def of(self, adapter: str | None) -> str:
        """The endpoint's name of an adapter; of the base for None. Raises GenerationError."""
        name = self.base if adapter is None else self.adapters.get(adapter)
        if name is None:
            raise GenerationError(f"the engine has no adapter {adapter!r}; it has {', '.join(self.adapters) or 'none'}")
        return name


@dataclass(frozen=True)
class Writer:
    """Writes requests in one dialect."""

    dialect: Dialect
    grammar: GrammarField
    names: Names

    def generation(self, request: GenerationRequest) -> dict[str, Any]:
        """The body of a streamed generation. Encodes pictures: run it off the event loop."""
        body: dict[str, Any] = {
            "model": self.names.of(request.adapter),
            "messages": messages(request.images, request.conversation),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "max_tokens": request.max_tokens,
        }
        if self.dialect == "vllm":
            # vLLM takes what is not said from the checkpoint (Gemma: top_k 64).
            body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        if request.grammar is not None and self.grammar == "structured_outputs":
            body["structured_outputs"] = {"grammar": request.grammar}
        if request.grammar is not None and self.grammar == "guided_grammar":
            body["guided_grammar"] = request.grammar
        return body

    def length(self, request: ScoreRequest) -> dict[str, Any]:
        """Asks how many tokens stand before the completion."""
        return {
            "model": self.names.of(request.adapter),
            "messages": messages(request.images, request.conversation),
            "max_tokens": 1,
            "temperature": 0.0,
        }

    def score(self, request: ScoreRequest) -> dict[str, Any]:
        """Asks for the log-probabilities of the prompt with the completion in it."""
        body = self.length(request)
        answer = {"role": "assistant", "content": request.completion}
        return {**body, "messages": [*body["messages"], answer], "add_generation_prompt": False, "prompt_logprobs": 1}


def messages(images: Sequence[NDArray[np.uint8]], conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as OpenAI has it; pictures as data URLs of PNG, which loses nothing."""
    waiting = iter(images)

    def part(text: str | None) -> dict[str, Any]:
        if text is not None:
            return {"type": "text", "text": text}
        buffer = io.BytesIO()
        Image.fromarray(next(waiting)).save(buffer, format="PNG", compress_level=1)
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        return {"type": "image_url", "image_url": {"url": url}}

    return [{"role": turn.role, "content": [part(text) for text in turn.parts]} for turn in conversation]


async def events(received: AsyncIterator[bytes]) -> AsyncGenerator[Chunk, None]:
    """The chunks of a stream of server-sent events, up to `[DONE]` or its end. Raises GenerationError."""
    rest = b""
    async for piece in received:
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise GenerationError(f"the endpoint sent an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            yield _chunk(data)


def _chunk(data: bytes) -> Chunk:
    try:
        chunk = Chunk.model_validate_json(data)
    except ValidationError as problem:
        raise GenerationError("the endpoint sent an event that is no chat completion chunk") from problem
    if chunk.error is not None:
        log.error("the endpoint broke off with an error: %s", str(chunk.error)[:MAX_LOGGED_CHARS])
        raise GenerationLost("the endpoint broke off with an error; the server's log has it")
    return chunk


def refusal(status: int, headers: Mapping[str, str], body: bytes) -> ServerError:
    """What an answer other than 200 means. What the endpoint wrote goes to the log only: it may repeat the prompt."""
    text = body[:MAX_EVENT_BYTES].decode("utf-8", "replace")
    if status == 400 and ("context_length_exceeded" in text or "maximum context length" in text):
        return PromptTooLong("the images and the text do not fit the context of the endpoint's model")
    log.error("the endpoint answered %d: %s", status, text[:MAX_LOGGED_CHARS])
    if status == 400 and ("grammar specification" in text or "grammar is not" in text):  # vLLM's words, and ours
        return GrammarRefused("the endpoint cannot read the grammar")
    wait = headers.get("retry-after", "")
    if status in (429, 503) and wait.isdigit():
        return Overloaded("the endpoint behind this server is full", retry_after_s=min(60, max(1, int(wait[:3]))))
    if status == 429:
        return Overloaded("the endpoint behind this server is full", retry_after_s=1)
    if status in (502, 503, 504):
        return GenerationLost(f"the endpoint has nobody to answer (HTTP {status})")
    if status in (401, 403):
        return GenerationError(f"the endpoint refuses this server's key (HTTP {status})")
    return GenerationError(f"the endpoint answered HTTP {status}; the server's log has what it said")
