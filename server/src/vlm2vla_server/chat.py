"""Chat completions over the engine: the documented subset of OpenAI's request (docs/protocol.md), and what comes of it.

Nothing here knows HTTP; `openai_api` does. A conversation goes through the model's own chat template, and its answer is
given as it comes: no parser, no second attempt.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from vlm2vla_schema.messages import MAX_IMAGES, Temperature
from vlm2vla_server.engines.base import Conversation, Delta, GenerationRequest, ScoreRequest, Turn
from vlm2vla_server.errors import InvalidImage, InvalidRequest
from vlm2vla_server.generation import Call, model_images, refuse_control_tokens
from vlm2vla_server.policy import MAX_SEED, closing
from vlm2vla_server.service import Service
from vlm2vla_server.stages import FREE_TEXT_MAX_TOKENS, ServedModel

MAX_CHAT_CHARS = 100_000
MAX_GRAMMAR_CHARS = 65_536
MAX_GRAMMAR_DEPTH = 32
DEFAULT_DEADLINE_MS = 600_000
"""An OpenAI client says how long it waits by hanging up."""
SMALLEST_TOP_P = 1e-6
"""OpenAI's callers may send 0, the likeliest token only; engines want a share above it."""
MAX_STOPS, MAX_STOP_CHARS = 4, 200


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class TextPart(_Part):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    """A base64 data URL."""

    url: str


class ImagePart(_Part):
    """A picture of a user message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Part):
    """One message. `developer` is read as `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(_Part):
    """include_usage: one more chunk, with the tokens. continuous_usage_stats, vLLM's: those so far in each chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ResponseFormat(_Part):
    """Free text; a form is asked for by a grammar."""

    type: Literal["text"]


class StructuredOutputs(_Part):
    """vLLM's extension: EBNF as xgrammar reads it."""

    grammar: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]


class ChatRequest(_Part):
    """POST /v1/chat/completions: the fields that are honoured. Any other is ignored.

    The last five are no part of OpenAI's: vLLM's for grammars and for log-probabilities of a given answer, and ours.
    """

    model: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=32_768)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=32_768)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_grammar: Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    deadline_ms: Annotated[int, Field(ge=1, le=600_000)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def grammar(self) -> str | None:
        """The grammar, under vLLM's new name or its old one. Raises InvalidRequest on one nested too deep."""
        text = self.structured_outputs.grammar if self.structured_outputs is not None else self.guided_grammar
        if text is not None and _depth(text) > MAX_GRAMMAR_DEPTH:
            raise InvalidRequest(f"the grammar nests brackets more than {MAX_GRAMMAR_DEPTH} deep")
        return text


class TextEvent(BaseModel):
    """Text that became final, in a stream, and the tokens so far."""

    model_config = ConfigDict(frozen=True)

    model: str
    text: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class ChatResult(TextEvent):
    """A finished completion. prompt_logprobs: null for a token whose value was not measured."""

    finish_reason: Literal["stop", "length"]
    prompt_logprobs: list[float | None] | None = None


class StopText:
    """Text up to the first stop sequence. What could become one is held back until it is known."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """The text that is final now. After `hit`, nothing more comes."""
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def _depth(grammar: str) -> int:
    deepest = depth = 0
    for char in grammar:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


async def complete(request: ChatRequest, call: Call) -> ChatResult:
    """Answer a conversation. Raises ServerError, TimeoutError at the deadline. Cancelling aborts the generation."""
    service, model = call.service, call.service.resolve(request.model)
    grammar = request.grammar
    turns, urls = _conversation(service, request.messages)
    scoring = request.prompt_logprobs is not None
    if scoring == (turns[-1].role != "assistant"):
        raise InvalidRequest(
            "field 'messages': with prompt_logprobs the last message is the assistant's, which is measured"
            if scoring
            else "field 'messages': the last message is the user's; an answer that is begun cannot be continued"
        )
    images = tuple(await model_images(service, model, urls))
    limit = request.max_completion_tokens or request.max_tokens or FREE_TEXT_MAX_TOKENS
    generation = GenerationRequest(
        images=images,
        prompt="",
        adapter=model.adapter,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else max(request.top_p, SMALLEST_TOP_P),
        seed=secrets.randbelow(2**31) if request.seed is None else request.seed % MAX_SEED,
        max_tokens=limit,
        grammar=grammar,
        turns=turns,
    )
    async with asyncio.timeout(max(0.0, call.clocking.deadline_s - time.monotonic())):
        if scoring:
            return await _score(request, call, model, images, turns)
        return await _generate(generation, StopText(request.stops), call, model)


async def _generate(request: GenerationRequest, stops: StopText, call: Call, model: ServedModel) -> ChatResult:
    pieces: list[str] = []
    last = Delta("")

    async def give(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if call.emit is not None:
                await call.emit(TextEvent(model=model.name, text=piece, **_tokens(last)))

    try:
        async with closing(call.service.engine.generate(request)) as deltas:
            async for delta in deltas:
                last = delta
                await give(stops.push(delta.text))
                if stops.hit:
                    break
    finally:
        call.service.metrics.count_tokens("chat", model.name, last)
    await give(stops.flush())
    return ChatResult(
        model=model.name,
        text="".join(pieces),
        finish_reason="stop" if stops.hit else last.finish_reason or "stop",
        prompt_tokens=last.prompt_tokens,
        completion_tokens=last.completion_tokens,
        cached_tokens=last.cached_tokens,
    )


def _tokens(delta: Delta) -> dict[str, int]:
    return {name: getattr(delta, name) for name in ("prompt_tokens", "completion_tokens", "cached_tokens")}


async def _score(
    request: ChatRequest, call: Call, model: ServedModel, images: tuple[NDArray[np.uint8], ...], turns: Conversation
) -> ChatResult:
    """The log-probabilities of a given answer, where vLLM puts them: behind those of the prompt, which stay null."""
    if request.stream or request.add_generation_prompt is not False:
        raise InvalidRequest("prompt_logprobs goes with add_generation_prompt false and without stream")
    before, completion = turns[:-1], "".join(part or "" for part in turns[-1].parts)
    if not before:
        raise InvalidRequest("field 'messages': nothing stands before the assistant's message")
    engine = call.service.engine
    one = GenerationRequest(images, "", model.adapter, 0.0, 1.0, 0, 1, turns=before)
    async with closing(engine.generate(one)) as deltas:
        length = [delta.prompt_tokens async for delta in deltas][-1]
    values = await engine.score(ScoreRequest(images, "", completion, model.adapter, turns=before))
    return ChatResult(
        model=model.name,
        text="",
        finish_reason="length",
        prompt_tokens=length + len(values),
        completion_tokens=0,
        cached_tokens=0,
        prompt_logprobs=[*[None] * length, *values],
    )


def _conversation(service: Service, messages: Sequence[Message]) -> tuple[Conversation, list[str]]:
    """The turns, and the data URLs in their order. Raises InvalidRequest, InvalidImage."""
    turns: list[Turn] = []
    urls: list[str] = []
    chars = 0
    for number, message in enumerate(messages):
        field = f"messages.{number}.content"
        parts: list[str | None] = []
        content = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        for part in content:
            if isinstance(part, ImagePart):
                parts.append(None)
                urls.append(_data_url(part, message, field))
                continue
            refuse_control_tokens(service, field, part.text)
            chars += len(part.text)
            parts.append(part.text)
        if message.role in ("system", "developer"):
            # One text: Gemma's template reads the first only.
            turns.append(Turn("system", ("\n".join(part for part in parts if part is not None),)))
        else:
            turns.append(Turn("user" if message.role == "user" else "assistant", tuple(parts)))
    if chars > MAX_CHAT_CHARS:
        raise InvalidRequest(f"field 'messages': expected at most {MAX_CHAT_CHARS} characters of text in all")
    if len(urls) > MAX_IMAGES:
        raise InvalidRequest(f"field 'messages': expected at most {MAX_IMAGES} images in all")
    return tuple(turns), urls


def _data_url(part: ImagePart, message: Message, field: str) -> str:
    if message.role != "user":
        raise InvalidRequest(f"field {field!r}: images belong into messages of the user")
    if not part.image_url.url.startswith("data:"):
        raise InvalidImage(f"field {field!r}: expected a base64 data: URL; no other URL and no path is ever opened")
    return part.image_url.url
