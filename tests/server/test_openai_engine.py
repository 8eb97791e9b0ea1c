"""The openai engine against an endpoint that misbehaves on purpose; test_openai_live has a good one."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scripted_endpoint import (
    GOOD,
    MODELS,
    Endpoint,
    Reply,
    answer,
    chunk,
    completion,
    endpoint,
    hang_up,
    silence,
    stream,
)
from server_fakes import run, write_models

from vlm2vla_server.engines.base import (
    Delta,
    EngineStartError,
    GenerationError,
    GenerationLost,
    GenerationRequest,
    PromptTooLong,
    ScoreRequest,
    ScoreUnavailable,
    Turn,
)
from vlm2vla_server.engines.openai_engine import RETRY_PAUSES_S, OpenAIEngine
from vlm2vla_server.engines.openai_options import KNOWN_CONTROL_TOKENS, EndpointOptions, control_tokens, read_options
from vlm2vla_server.errors import ConfigurationError, Overloaded, ServerError
from vlm2vla_server.service import Service

IMAGE = np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8)
REQUEST = GenerationRequest((IMAGE,), "What is orange?", "twin", 0.5, 0.95, 7, 40, 'root ::= "a"')
SECRET = "s3cr3t-value"
REFUSED = json.dumps({"error": {"message": f"bad {SECRET}", "code": 400}})
TOO_LONG = json.dumps({"error": {"message": "This model's maximum context length is 4096 tokens."}})


def options(url: str, **changes: Any) -> EndpointOptions:
    made = EndpointOptions(url=url, adapters=(("twin", "twin"),), read_timeout_s=5.0, start_timeout_s=5.0)
    return replace(made, **changes)


@asynccontextmanager
async def started(there: Endpoint, **changes: Any) -> AsyncIterator[OpenAIEngine]:
    engine = OpenAIEngine(options(there.url, **changes))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()
        await engine.close()


async def deltas(engine: OpenAIEngine, request: GenerationRequest = REQUEST) -> list[Delta]:
    return [delta async for delta in engine.generate(request)]


def test_a_stream_becomes_deltas_and_the_last_has_the_counts() -> None:
    async def work() -> None:
        async with endpoint() as there, started(there, api_key="k") as engine:
            got = await deltas(engine)
            assert "".join(delta.text for delta in got) == "A carrot."
            assert [delta.finish_reason for delta in got] == [None, None, "stop"]
            assert (got[-1].prompt_tokens, got[-1].completion_tokens, got[-1].cached_tokens) == (70, 5, 60)
            assert set(there.keys) == {"Bearer k"} and engine.load().running == 0
            assert engine.info().context_tokens == 4096
            with pytest.raises(GenerationError, match="no adapter"):
                await deltas(engine, replace(REQUEST, adapter="nobody"))

    run(work())


def test_what_is_sent_in_either_dialect() -> None:
    async def work() -> None:
        async with endpoint() as there:
            async with started(there) as engine:
                await deltas(engine)
            async with started(there, dialect="openai", grammar="off") as engine:
                await deltas(engine)
            async with started(there, grammar="guided_grammar") as engine:
                turns = (Turn("system", ("Be short.",)), Turn("user", ("What?", None)))
                await deltas(engine, replace(REQUEST, adapter=None, prompt="", turns=turns))
        vllm, plain, chat = there.requests
        common = {"model", "messages", "stream", "stream_options", "temperature", "top_p", "seed", "max_tokens"}
        assert set(plain) == common
        assert set(vllm) == common | {"top_k", "min_p", "repetition_penalty", "structured_outputs"}
        assert vllm["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
        assert plain["stream_options"] == {"include_usage": True}
        assert vllm["structured_outputs"] == {"grammar": 'root ::= "a"'} and vllm["top_k"] == -1
        assert (vllm["model"], vllm["seed"], vllm["temperature"], vllm["top_p"]) == ("twin", 7, 0.5, 0.95)
        image, text = vllm["messages"][0]["content"]
        assert text == {"type": "text", "text": "What is orange?"}
        raw = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert np.array_equal(np.array(Image.open(io.BytesIO(raw))), IMAGE)
        assert chat["model"] == "org/base" and chat["guided_grammar"] == 'root ::= "a"'
        assert [message["role"] for message in chat["messages"]] == ["system", "user"]
        assert [part["type"] for part in chat["messages"][1]["content"]] == ["text", "image_url"]

    run(work())


PROXY = answer(503, "<html>no server is available</html>", kind="text/html")


@pytest.mark.parametrize("lost", [[hang_up], [PROXY], [answer(502, ""), hang_up], [stream()], [stream(chunk(""))]])
def test_what_is_lost_before_its_first_text_is_asked_for_again(lost: list[Reply]) -> None:
    async def work() -> None:
        async with endpoint(*lost, GOOD) as there, started(there) as engine:
            got = await deltas(engine)
            assert "".join(delta.text for delta in got) == "A carrot."
            assert len(there.requests) == len(lost) + 1
            assert all(request == there.requests[0] for request in there.requests)

    run(work())


def test_it_is_asked_for_a_limited_number_of_times() -> None:
    async def work() -> None:
        async with endpoint(PROXY) as there, started(there) as engine:
            began_s = time.monotonic()
            with pytest.raises(GenerationLost):
                await deltas(engine)
            assert len(there.requests) == len(RETRY_PAUSES_S) + 1
            assert time.monotonic() - began_s < 20

    run(work())


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (stream(chunk("A car")), GenerationLost),
        (stream(chunk("A car"), '{"error": {"message": "s3cr3t-value"}}'), GenerationLost),
        (stream(chunk("A car"), "{no json"), GenerationError),
        (stream(chunk("A car"), chunk(finish="content_filter")), GenerationError),
        (stream(chunk("A car"), "x" * 2_000_000), GenerationError),
        (answer(400, TOO_LONG), PromptTooLong),
        (answer(400, REFUSED), GenerationError),
        (answer(401, REFUSED), GenerationError),
        (answer(404, REFUSED), GenerationError),
        (answer(500, REFUSED), GenerationError),
        (answer(429, REFUSED, "Retry-After: 9"), Overloaded),
        (answer(503, REFUSED, "Retry-After: 9"), Overloaded),
    ],
)
def test_what_cannot_be_asked_again_is_an_error_of_its_kind(reply: Reply, kind: type[ServerError]) -> None:
    async def work() -> None:
        async with endpoint(reply) as there, started(there) as engine:
            with pytest.raises(kind) as problem:
                await deltas(engine)
            assert len(there.requests) == 1 and SECRET not in str(problem.value) + str(problem.value.details)
            if isinstance(problem.value, Overloaded):
                assert problem.value.headers == {"Retry-After": "9"}
            assert engine.load().running == 0

    run(work())


def test_silence_ends_after_the_read_timeout() -> None:
    async def work() -> None:
        for reply in (silence, stream(chunk("A car"), then=silence)):
            async with endpoint(reply) as there, started(there, read_timeout_s=0.3) as engine:
                began_s = time.monotonic()
                with pytest.raises(GenerationError, match=r"nothing for 0\.3 s"):
                    await deltas(engine)
                assert time.monotonic() - began_s < 10 and len(there.requests) == 1

    run(work())


def test_leaving_closes_the_connection() -> None:
    async def work() -> None:
        async with endpoint(stream(chunk("A car"), then=silence)) as there, started(there) as engine:
            running = engine.generate(REQUEST)
            assert (await anext(running)).text == "A car"
            await running.aclose()  # type: ignore[attr-defined]  # the Protocol promises an iterator only
            async with asyncio.timeout(5):
                await there.left.wait()
            task = asyncio.create_task(deltas(engine))
            while engine.load().running == 0:
                await asyncio.sleep(0.01)
            there.left.clear()
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with asyncio.timeout(5):
                await there.left.wait()

    run(work())


TWO = json.dumps({"data": [{"id": "one"}, {"id": "two"}, {"id": "twin"}]})


@pytest.mark.parametrize(
    ("models", "changes", "says"),
    [
        (answer(200, MODELS), {"adapters": (("twin", "lora-7"),)}, r"model\.twin=ID"),
        (answer(200, MODELS), {"base": "other"}, "base=ID"),
        (answer(200, TWO), {}, "base=ID"),
        (answer(200, "[]"), {}, "no list of models"),
        (answer(401, REFUSED), {}, "VLM2VLA_UPSTREAM_API_KEY"),
        (PROXY, {"start_timeout_s": 0.1}, r"within 0\.1 s"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_named_at_the_start(
    models: Reply, changes: dict[str, Any], says: str
) -> None:
    async def work() -> None:
        async with endpoint(models=models) as there:
            engine = OpenAIEngine(options(there.url, **changes))
            with pytest.raises(EngineStartError, match=says):
                await engine.start()
            await engine.close()

    run(work())


def test_the_start_waits_for_an_endpoint_that_comes_up() -> None:
    async def work() -> None:
        tries: list[int] = []

        async def later(writer: asyncio.StreamWriter) -> None:
            tries.append(1)
            await (answer(200, MODELS) if len(tries) > 1 else PROXY)(writer)

        async with endpoint(models=later) as there, started(there) as engine:
            assert len(tries) == 2 and engine.info().adapters[0].name == "twin"

    run(work())


def entry(value: float, text: str) -> dict[str, Any]:
    return {"7": {"logprob": value, "rank": 1, "decoded_token": text}, "9": {"logprob": -0.1, "decoded_token": "x"}}


def test_scores_are_read_behind_the_prompt_and_without_the_templates_tail() -> None:
    async def work() -> None:
        values = [None, entry(-5.0, "<bos>"), entry(-1.5, "carrot"), entry(-0.25, "<end_of_turn>"), entry(-9.0, "\n")]
        replies = completion(usage={"prompt_tokens": 2}), completion(prompt_logprobs=values)
        async with endpoint(*replies) as there, started(there) as engine:
            score = await engine.score(ScoreRequest((), "What?", "carrot", "twin"))
            assert score == [-1.5, -0.25]
            asked = there.requests[1]
            assert asked["messages"][-1] == {"role": "assistant", "content": "carrot"}
            assert asked["add_generation_prompt"] is False and asked["prompt_logprobs"] == 1

    run(work())


@pytest.mark.parametrize(
    ("replies", "changes"),
    [
        ((completion(usage={"prompt_tokens": 2}),), {}),
        ((completion(usage={"prompt_tokens": 2}), answer(400, REFUSED)), {}),
        ((completion(usage={"prompt_tokens": 1}), completion(prompt_logprobs=[None, None])), {}),
        ((completion(),), {"dialect": "openai"}),
    ],
)
def test_an_endpoint_without_log_probabilities_says_so(replies: tuple[Reply, ...], changes: dict[str, Any]) -> None:
    async def work() -> None:
        async with endpoint(*replies) as there, started(there, **changes) as engine:
            with pytest.raises(ScoreUnavailable):
                await engine.score(ScoreRequest((), "What?", "carrot", "twin"))

    run(work())


def test_an_adapter_that_cannot_be_proven_is_served_only_when_that_is_allowed(tmp_path: Path) -> None:
    async def work() -> None:
        async with endpoint() as there:
            for allowed in (False, True):
                settings = replace(write_models(tmp_path), engine="openai", allow_unproven=allowed)
                service = Service(settings, OpenAIEngine(options(there.url, dialect="openai", grammar="off")))
                await service.start()
                info = service.info()
                assert service.ready is allowed and "cannot be proven" in str(service.reason)
                assert info.policy is False and info.adapters[0].proven is False
                assert "log-probabilit" in str(info.adapters[0].problem) or "log-probabilit" in str(service.reason)
                await service.close()

    run(work())


def read(folder: Path, **given: str) -> EndpointOptions:
    return read_options(given, ("twin",), folder, {"VLM2VLA_UPSTREAM_API_KEY": "k"})


def test_options_are_read_and_wrong_ones_named(tmp_path: Path) -> None:
    made = read(tmp_path, url="http://h:1/v1/", dialect="openai", read_timeout_s="9.5", **{"model.twin": "lora"})
    assert (made.url, made.grammar, made.read_timeout_s) == ("http://h:1/v1", "off", 9.5)
    assert made.adapters == (("twin", "lora"),) and made.api_key == "k" and "'k'" not in repr(made)
    assert read(tmp_path, url="http://h/v1").grammar == "structured_outputs"
    for wrong in (
        {},
        {"url": "h:1"},
        {"url": "file:///v1"},
        {"url": "http://h", "dialect": "tgi"},
        {"url": "http://h", "grammar": "json"},
        {"url": "http://h", "read_timeout_s": "0"},
        {"url": "http://h", "read_timeout_s": "nan"},
        {"url": "http://h", "model.other": "x"},
        {"url": "http://h", "temperature": "1"},
    ):
        with pytest.raises(ConfigurationError, match="--engine-option"):
            read(tmp_path, **wrong)


def test_control_tokens_come_from_the_folders_tokenizer(tmp_path: Path) -> None:
    assert control_tokens(tmp_path) == control_tokens(None) == KNOWN_CONTROL_TOKENS
    added = [
        {"content": "<my_turn>", "special": True},
        {"content": "<unused6133>", "special": True},
        {"content": "word", "special": False},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert control_tokens(tmp_path) == KNOWN_CONTROL_TOKENS | {"<my_turn>"}
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
        control_tokens(tmp_path)
