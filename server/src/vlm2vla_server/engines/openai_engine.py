"""The same policy over any OpenAI-compatible endpoint: vLLM's server, several behind a proxy, Ray Serve, Gemini's own.

A generation is one streamed chat completion; closing its connection aborts it. Asked again is only what has given no
text yet. What the endpoint cannot do (grammars, log-probabilities) is an option, see `EndpointOptions`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Literal

import httpx

from vlm2vla_server.engines.base import (
    AdapterLoad,
    Delta,
    EngineInfo,
    EngineLoad,
    EngineStartError,
    GenerationError,
    GenerationLost,
    GenerationRequest,
    ScoreRequest,
    ScoreUnavailable,
)
from vlm2vla_server.engines.openai_options import KEY_VARIABLE, EndpointOptions, control_tokens
from vlm2vla_server.engines.openai_wire import Completion, ListedModels, Names, Usage, Writer, events, refusal
from vlm2vla_server.errors import ServerError
from vlm2vla_server.settings import BASE_MODEL_NAME

log = logging.getLogger("vlm2vla_server")

RETRY_PAUSES_S = (0.1, 0.3, 1.0, 2.0)
"""Pauses before a generation that gave no text is asked for again; a proxy needs as long to notice a dead replica."""
START_PAUSE_S = 1.0
_MAX_ERROR_BYTES = 65_536


class OpenAIEngine:
    """Engine over an endpoint. See `engines.base.Engine` for the contract of each method."""

    def __init__(self, options: EndpointOptions) -> None:
        self._options = options
        self._client: httpx.AsyncClient | None = None
        self._writer: Writer | None = None
        self._context_tokens = 0
        self._running = 0
        self._decoded_tokens = 0
        self._control = control_tokens(options.model)

    async def start(self) -> None:
        """Wait until the endpoint lists the models, at most start_timeout_s."""
        options = self._options
        key = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
        waits = httpx.Timeout(options.read_timeout_s, connect=options.connect_timeout_s)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(base_url=options.url + "/", headers=key, timeout=waits, limits=limits)
        end_s = time.monotonic() + options.start_timeout_s
        while True:
            try:
                listed = await self._listed()
                break
            except GenerationLost as problem:
                if time.monotonic() + START_PAUSE_S > end_s:
                    raise EngineStartError(
                        f"{options.url}: no list of models within {options.start_timeout_s:g} s ({problem})"
                    ) from problem
                await asyncio.sleep(START_PAUSE_S)
        self._writer = Writer(options.dialect, options.grammar, self._names(listed))
        lengths = {model.id: model.max_model_len or 0 for model in listed.data}
        self._context_tokens = lengths.get(self._writer.names.base, 0)

    async def _listed(self) -> ListedModels:
        try:
            response = await self._http().get("models")
        except httpx.HTTPError as problem:
            raise GenerationLost(f"it cannot be reached: {type(problem).__name__}") from problem
        if response.status_code != 200:
            meaning = refusal(response.status_code, response.headers, response.content)
            if isinstance(meaning, GenerationLost):
                raise meaning
            raise EngineStartError(f"{self._options.url}/models: {meaning}; its key is set as {KEY_VARIABLE}")
        try:
            return ListedModels.model_validate_json(response.content)
        except ValueError as problem:
            raise EngineStartError(f"{self._options.url}/models is no list of models as OpenAI has it") from problem

    def _names(self, listed: ListedModels) -> Names:
        offered = [model.id for model in listed.data]
        adapters = dict(self._options.adapters)
        rest = [model.id for model in listed.data if model.parent is None and model.id not in adapters.values()]
        base = self._options.base or (
            BASE_MODEL_NAME if BASE_MODEL_NAME in offered else rest[0] if len(rest) == 1 else ""
        )
        for what, name in (("base", base), *adapters.items()):
            if name not in offered:
                raise EngineStartError(
                    f"{self._options.url} offers {', '.join(offered)}: which of them is {what!r}? Say --engine-option "
                    + ("base=ID" if what == "base" else f"model.{what}=ID")
                )
        return Names(base, adapters)

    def _http(self) -> httpx.AsyncClient:
        if self._client is None or self._client.is_closed:
            raise GenerationError("the engine was used before it was started, or after it was closed")
        return self._client

    def _started(self) -> Writer:
        if self._writer is None:
            raise GenerationError("the engine was used before it was started")
        return self._writer

    async def close(self) -> None:
        """Close every connection, which aborts what runs."""
        if self._client is not None:
            await self._client.aclose()

    async def wait_dead(self) -> str:
        """Never returns: an endpoint that is gone may come back, and requests say meanwhile that it is."""
        await asyncio.Event().wait()
        return ""

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Stream one generation. Lost before its first text, it is asked for again after a short pause."""
        began_s = time.monotonic()
        body = await asyncio.to_thread(self._started().generation, request)
        preprocess_ms = (time.monotonic() - began_s) * 1000.0
        self._running += 1
        try:
            for pause_s in (*RETRY_PAUSES_S, None):
                given = False
                try:
                    async with aclosing(self._stream(body, preprocess_ms)) as deltas:
                        async for delta in deltas:
                            given = True
                            yield delta
                    return
                except GenerationLost:
                    if given or pause_s is None:
                        raise
                await asyncio.sleep(pause_s)
        finally:
            self._running -= 1

    async def _stream(self, body: dict[str, Any], preprocess_ms: float) -> AsyncGenerator[Delta, None]:
        finish: Literal["stop", "length"] | None = None
        usage, count = Usage(), 0
        try:
            async with self._http().stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise refusal(response.status_code, response.headers, await _start_of(response))
                async with aclosing(events(response.aiter_bytes())) as chunks:
                    async for chunk in chunks:
                        usage = chunk.usage or usage
                        for choice in chunk.choices:
                            finish = _finish(choice.finish_reason) or finish
                            if choice.delta.content:
                                count = usage.completion_tokens or count + 1
                                self._decoded_tokens += 1
                                yield _delta(choice.delta.content, None, usage, count, preprocess_ms)
        except httpx.HTTPError as problem:
            raise self._broken(problem) from problem
        if finish is None:
            raise GenerationLost("the endpoint ended the stream before the answer's end")
        total = count if usage.completion_tokens is None else usage.completion_tokens
        yield _delta("", finish, usage, total, preprocess_ms)

    def _broken(self, problem: httpx.HTTPError) -> ServerError:
        if isinstance(problem, httpx.ReadTimeout):
            return GenerationError(
                f"the endpoint said nothing for {self._options.read_timeout_s:g} s (--engine-option read_timeout_s)"
            )
        return GenerationLost(f"the connection to the endpoint broke ({type(problem).__name__})")

    async def score(self, request: ScoreRequest) -> list[float]:
        """Log-probabilities of a completion, by vLLM's prompt_logprobs."""
        writer = self._started()
        if writer.dialect != "vllm":
            raise ScoreUnavailable(
                "OpenAI's own fields (--engine-option dialect=openai) tell no log-probability of a given answer"
            )
        before = await self._post(await asyncio.to_thread(writer.length, request))
        after = await self._post(await asyncio.to_thread(writer.score, request))
        return after.scores(before.usage.prompt_tokens)

    async def _post(self, body: dict[str, Any]) -> Completion:
        try:
            response = await self._http().post("chat/completions", json=body)
        except httpx.HTTPError as problem:
            raise self._broken(problem) from problem
        if response.status_code == 400 and "prompt_logprobs" in body:
            log.error("the endpoint refused prompt_logprobs: %s", response.text[:500])
            raise ScoreUnavailable("the endpoint refuses to give log-probabilities of a given answer (prompt_logprobs)")
        if response.status_code != 200:
            raise refusal(response.status_code, response.headers, response.content)
        try:
            return Completion.model_validate_json(response.content)
        except ValueError as problem:
            raise GenerationError("the endpoint's answer is no chat completion") from problem

    def info(self) -> EngineInfo:
        """What can be known from outside: no hash of the weights and no number of adapted modules."""
        adapters = tuple(AdapterLoad(name, "", None) for name, _ in self._options.adapters)
        versions = {"httpx": httpx.__version__}
        return EngineInfo("openai", "endpoint", self._options.dtype, self._context_tokens, "", adapters, versions)

    def load(self) -> EngineLoad:
        """Momentary load of this server; what the endpoint does for others is not seen. Pieces count as tokens."""
        return EngineLoad(self._running, 0, self._decoded_tokens)

    def control_tokens(self) -> frozenset[str]:
        """The special tokens of the model folder's tokenizer, and the marks of common models."""
        return self._control


def _delta(
    text: str, finish: Literal["stop", "length"] | None, usage: Usage, completion_tokens: int, preprocess_ms: float
) -> Delta:
    return Delta(text, finish, usage.prompt_tokens, completion_tokens, usage.cached_tokens, 0.0, preprocess_ms)


def _finish(reason: str | None) -> Literal["stop", "length"] | None:
    if reason is None:
        return None
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise GenerationError(f"the endpoint ended the answer for another reason than 'stop' or 'length': {reason[:40]!r}")


async def _start_of(response: httpx.Response) -> bytes:
    body = b""
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > _MAX_ERROR_BYTES:
            break
    return body
