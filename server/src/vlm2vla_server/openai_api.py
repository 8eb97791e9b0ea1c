"""OpenAI's side of the HTTP API: POST /v1/chat/completions and GET /v1/models, over the same engine and admission.

The subset and the errors are those of docs/protocol.md. Shapes: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json
import time
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from vlm2vla_schema.errors import ErrorCode
from vlm2vla_server.bodies import parse_body, read_body
from vlm2vla_server.chat import DEFAULT_DEADLINE_MS, ChatRequest, ChatResult, StreamOptions, TextEvent, complete
from vlm2vla_server.errors import ServerError
from vlm2vla_server.exchange import EventStream, begin, echo_id, first_event
from vlm2vla_server.guard import LOG_KEY, OpenAIErrorBody, openai_error_body, openai_status
from vlm2vla_server.service import Service
from vlm2vla_server.settings import BASE_MODEL_NAME

PATHS = frozenset({"/v1/chat/completions", "/v1/models"})
SSE = "text/event-stream"


class Model(BaseModel):
    """One model of /v1/models. parent and max_model_len as vLLM has them: the base of an adapter, the context."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["vlm2vla"] = "vlm2vla"
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class CachedTokens(BaseModel):
    """Prompt tokens that were not read again."""

    cached_tokens: int


class ChatUsage(BaseModel):
    """Tokens of one completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Answer(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: Answer
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Answer of POST /v1/chat/completions without `stream`. prompt_logprobs: as vLLM has it, only when asked for."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice] = Field(min_length=1, max_length=1)
    usage: ChatUsage
    prompt_logprobs: list[dict[str, dict[str, float]] | None] | None = None


def add_routes(api: FastAPI, service: Service) -> None:
    """Add /v1 to the application."""

    async def chat_completions(request: Request) -> Response:
        return await _chat_completions(service, request)

    async def models() -> ModelList:
        return _models(service)

    api.add_api_route(
        "/v1/chat/completions",
        chat_completions,
        methods=["POST"],
        summary="OpenAI's chat completions: pictures as data URLs, stream, base or adapter by model",
        response_model=None,
        responses={200: {"model": ChatCompletion, "content": {SSE: {"schema": {}}}}, **_errors()},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _inlined(ChatRequest.model_json_schema())}},
            }
        },
    )
    api.add_api_route("/v1/models", models, methods=["GET"], summary="OpenAI's list of models", responses=_errors())


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema without `$defs`: inside an OpenAPI document, references start at the document's root."""
    definitions = schema.pop("$defs", {})

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rsplit("/", 1)[1]])
        return {key: resolve(value) for key, value in node.items() if key != "discriminator"}

    resolved: dict[str, Any] = resolve(schema)
    return resolved


def _errors() -> dict[int | str, dict[str, Any]]:
    codes: dict[int, list[str]] = {}
    for code in ErrorCode:
        codes.setdefault(openai_status(code), []).append(code.value)
    return {status: {"model": OpenAIErrorBody, "description": ", ".join(names)} for status, names in codes.items()}


def _models(service: Service) -> ModelList:
    service.require_ready()
    info, now_s = service.info(), int(time.time())
    return ModelList(
        data=[
            Model(
                id=model.name,
                created=now_s,
                parent=None if model.adapter is None else BASE_MODEL_NAME,
                max_model_len=info.context_tokens or None,
            )
            for model in service.models.values()
        ]
    )


async def _chat_completions(service: Service, request: Request) -> Response:
    with service.admission.reading():
        body = await read_body(request, service.settings.max_body_bytes, service.settings.body_timeout_s)
        parsed = await parse_body(request.headers, body, ChatRequest, forms=False)
        del body
    request.scope[LOG_KEY]["model"] = service.label(parsed.model)
    service.require_ready()
    work = begin(
        service,
        request,
        lambda call: complete(parsed, call),
        deadline_ms=parsed.deadline_ms or DEFAULT_DEADLINE_MS,
        episode=None,
        stream=bool(parsed.stream),
    )
    first = await first_event(work)
    frame = _Frame(f"chatcmpl-{echo_id(request.scope)}", int(time.time()))
    if parsed.stream:
        return EventStream(work, first, SSE, _Chunks(frame, parsed.stream_options or StreamOptions()).encode)
    await work.stop()
    assert isinstance(first, ChatResult)
    answer = frame.completion(first)
    return Response(answer.model_dump_json(), media_type="application/json")


class _Frame:
    """What all parts of one answer share."""

    def __init__(self, name: str, created_s: int) -> None:
        self._name, self._created_s = name, created_s

    def completion(self, result: ChatResult) -> ChatCompletion:
        """The whole answer."""
        values = result.prompt_logprobs
        entries = None if values is None else [_entry(index, value) for index, value in enumerate(values)]
        return ChatCompletion(
            id=self._name,
            created=self._created_s,
            model=result.model,
            choices=[Choice(message=Answer(content=result.text), finish_reason=result.finish_reason)],
            usage=_usage(result),
            prompt_logprobs=entries,
        )

    def chunk(self, model: str, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """One event of a stream."""
        head = {"id": self._name, "object": "chat.completion.chunk", "created": self._created_s, "model": model}
        return _event({**head, "choices": choices, **more})


class _Chunks:
    """Encodes a stream: the role, pieces of text, the reason for the end, the usage when wanted, `[DONE]`."""

    def __init__(self, frame: _Frame, options: StreamOptions) -> None:
        self._frame, self._options = frame, options
        self._begun = False

    def encode(self, event: BaseModel | ServerError) -> tuple[bytes, bool]:
        """The bytes of an event, and whether it is the last."""
        if isinstance(event, ServerError):
            return b"data: " + openai_error_body(event) + b"\n\n", True
        assert isinstance(event, TextEvent)
        tokens = _usage(event).model_dump()
        each = {"usage": tokens} if self._options.continuous_usage_stats else {}
        if not isinstance(event, ChatResult):
            piece = self._frame.chunk(event.model, [_choice({"content": event.text})], **each)
            return self._head(event.model) + piece, False
        data = self._head(event.model) + self._frame.chunk(event.model, [_choice({}, event.finish_reason)], **each)
        if self._options.include_usage:
            data += self._frame.chunk(event.model, [], usage=tokens)
        return data + b"data: [DONE]\n\n", True

    def _head(self, model: str) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        return self._frame.chunk(model, [_choice({"role": "assistant", "content": ""})])


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def _usage(result: TextEvent) -> ChatUsage:
    return ChatUsage(
        prompt_tokens=result.prompt_tokens,
        completion_tokens=result.completion_tokens,
        total_tokens=result.prompt_tokens + result.completion_tokens,
        prompt_tokens_details=CachedTokens(cached_tokens=result.cached_tokens),
    )


def _entry(index: int, value: float | None) -> dict[str, dict[str, float]] | None:
    """vLLM keys an entry by token id; the engine gives values without ids, so the place stands for it."""
    return None if value is None else {str(index): {"logprob": value}}
