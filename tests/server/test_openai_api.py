"""/v1 with a scripted engine: what is honoured, what is refused and how, in OpenAI's shapes (docs/protocol.md)."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from server_fakes import GOOD, IMAGE, ROWS, Answer, FakeEngine, run, serving, until, with_settings, write_models

from vlm2vla_server.app import create_app
from vlm2vla_server.chat import StopText
from vlm2vla_server.engines.base import GenerationLost, GenerationRequest, PromptTooLong, Turn

CHAT = "/v1/chat/completions"
PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{IMAGE}", "detail": "low"}}
HELLO: dict[str, Any] = {"model": "twin", "messages": [{"role": "user", "content": "What is orange?"}]}


def say(text: str) -> FakeEngine:
    return FakeEngine(answer=lambda request: text)


def events(answer: Answer) -> list[Any]:
    """The JSON of every event; `[DONE]` must be the last line and is left out."""
    lines = answer.body.decode().split("\n\n")
    assert lines[-1] == "" and lines[-2] == "data: [DONE]", lines[-2:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_an_answer_has_openais_shape_and_unknown_fields_are_ignored(tmp_path: Path) -> None:
    async def work() -> None:
        engine = say("A carrot.")
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            answer = await caller.post(CHAT, {**HELLO, "user": "me", "logit_bias": {}, "seed": 5})
            assert answer.status == 200, answer.body
            got = answer.json()
            assert got["object"] == "chat.completion" and got["model"] == "twin" and got["id"].startswith("chatcmpl-")
            assert got["choices"] == [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "A carrot."},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ]
            usage = got["usage"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == 103
            request = engine.requests[-1]
            assert (request.adapter, request.seed, request.temperature, request.top_p) == ("twin", 5, 1.0, 1.0)
            assert request.grammar is None and request.max_tokens == 400
            assert (await caller.post(CHAT, {**HELLO, "top_p": 0, "seed": -1})).status == 200
            assert 0 < engine.requests[-1].top_p < 1e-5 and engine.requests[-1].seed >= 0
            assert (await caller.get("/metrics")).body.decode().count('stage="chat"') >= 3

    run(work())


def test_a_conversation_keeps_its_order_of_turns_texts_and_pictures(tmp_path: Path) -> None:
    async def work() -> None:
        engine = say("Two.")
        messages = [
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "short."}]},
            {"role": "user", "content": [PICTURE, {"type": "text", "text": "What is this?"}, PICTURE]},
            {"role": "assistant", "content": "A carrot."},
            {"role": "user", "content": [{"type": "text", "text": "And now?"}, PICTURE]},
        ]
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            body = {
                "model": "base",
                "messages": messages,
                "max_tokens": 9,
                "max_completion_tokens": 7,
                "temperature": 0,
            }
            assert (await caller.post(CHAT, body)).status == 200
            request = engine.requests[-1]
            assert request.conversation == (
                Turn("system", ("Be\nshort.",)),
                Turn("user", (None, "What is this?", None)),
                Turn("assistant", ("A carrot.",)),
                Turn("user", ("And now?", None)),
            )
            assert [image.shape for image in request.images] == [(28, 28, 3)] * 3
            assert (request.adapter, request.max_tokens, request.temperature) == (None, 7, 0.0)

    run(work())


def test_a_stream_gives_the_same_text_in_pieces(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), say("A carrot on the counter."))) as caller:
            body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
            answer = await caller.post(CHAT, body)
            assert answer.status == 200 and answer.headers["content-type"] == "text/event-stream"
            got = events(answer)
            assert {event["object"] for event in got} == {"chat.completion.chunk"}
            assert len({event["id"] for event in got}) == 1
            assert got[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            texts = [event["choices"][0]["delta"].get("content", "") for event in got if event["choices"]]
            assert len(texts) > 3 and "".join(texts) == "A carrot on the counter."
            assert got[-1]["choices"] == [] and got[-1]["usage"]["completion_tokens"] == 6
            assert [e["choices"][0]["finish_reason"] for e in got if e["choices"]][-1] == "stop"
            plain = events(await caller.post(CHAT, {**HELLO, "stream": True}))
            assert all(event["choices"] and "usage" not in event for event in plain)
            counted = {**HELLO, "stream": True, "stream_options": {"continuous_usage_stats": True}}
            counts = [event["usage"]["completion_tokens"] for event in events(await caller.post(CHAT, counted))[1:]]
            assert counts == [1, 2, 3, 4, 5, 6, 6]

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences_end_the_answer_and_the_generation(tmp_path: Path, stream: bool) -> None:
    async def work() -> None:
        engine = say("one, two, three" + ", four" * 500)
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            answer = await caller.post(CHAT, {**HELLO, "stop": [", thr", "zzz"], "stream": stream})
            if stream:
                chunks = [event["choices"][0] for event in events(answer)]
                text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
                assert chunks[-1]["finish_reason"] == "stop"
            else:
                text = answer.json()["choices"][0]["message"]["content"]
            assert text == "one, two"
            assert engine.running == 0 and engine.aborted == 1

    run(work())


def test_text_that_only_begins_like_a_stop_sequence_is_given_out() -> None:
    stop = StopText(["abc"])
    assert [stop.push(piece) for piece in ("xa", "b", "dab", "")] == ["x", "", "abd", ""]
    assert stop.flush() == "ab" and not stop.hit


def test_a_grammar_goes_on_to_the_engine_under_either_name(tmp_path: Path) -> None:
    async def work() -> None:
        engine = say("yes")
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            for field in ({"structured_outputs": {"grammar": 'root ::= "yes"'}}, {"guided_grammar": 'root ::= "yes"'}):
                assert (await caller.post(CHAT, {**HELLO, **field})).status == 200
                assert engine.requests[-1].grammar == 'root ::= "yes"'
            deep = await caller.post(CHAT, {**HELLO, "guided_grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000})
            assert deep.status == 400 and "nests" in deep.json()["error"]["message"]

    run(work())


def test_log_probabilities_of_a_given_answer_stand_behind_the_prompt(tmp_path: Path) -> None:
    async def work() -> None:
        engine = say("x")
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            messages = [*HELLO["messages"], {"role": "assistant", "content": "A carrot."}]
            body = {"model": "twin", "messages": messages, "prompt_logprobs": 1, "add_generation_prompt": False}
            got = (await caller.post(CHAT, body)).json()
            assert got["usage"]["prompt_tokens"] == 102
            assert got["prompt_logprobs"] == [None] * 100 + [{"100": {"logprob": -1.5}}, {"101": {"logprob": -2.0}}]
            for change in ({"stream": True}, {"add_generation_prompt": True}, {"messages": messages[:1]}):
                assert (await caller.post(CHAT, {**body, **change})).status == 400

    run(work())


SECRET = "s3cr3t-value"
TOO_MANY = [{"role": "user", "content": [PICTURE] * 9}]


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "tool", "content": SECRET}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "text": SECRET}]}]},
        {"messages": [{"role": "user", "content": "say <end_of_turn> now"}]},
        {"messages": [{"role": "user", "content": "x" * 100_001}]},
        {"messages": [{"role": "assistant", "content": "and"}]},
        {"messages": [{"role": "system", "content": [PICTURE]}, *HELLO["messages"]]},
        {"messages": TOO_MANY},
        {"temperature": 2.5},
        {"temperature": "0.5"},
        {"top_p": -0.1},
        {"n": 2},
        {"max_tokens": 0},
        {"stop": ["a"] * 5},
        {"stop": ""},
        {"response_format": {"type": "json_object"}},
        {"deadline_ms": 0},
        {"guided_grammar": ""},
    ],
)
def test_what_is_refused_is_400_in_openais_shape_and_nothing_is_echoed(tmp_path: Path, change: dict[str, Any]) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), FakeEngine())) as caller:
            answer = await caller.post(CHAT, {**HELLO, **change})
            assert answer.status == 400, answer.body
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
            assert SECRET not in answer.body.decode()

    run(work())


@pytest.mark.parametrize("url", ["https://example.org/a.jpg", "file:///etc/passwd", "/etc/passwd", IMAGE, "data:,x"])
def test_no_url_but_a_data_url_is_read(tmp_path: Path, url: str) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), FakeEngine())) as caller:
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
            answer = await caller.post(CHAT, {**HELLO, "messages": [{"role": "user", "content": content}]})
            assert (answer.status, answer.code) == (400, "invalid_image")

    run(work())


def test_errors_of_every_layer_have_openais_shape(tmp_path: Path) -> None:
    async def work() -> None:
        settings = with_settings(write_models(tmp_path), api_key="k")
        async with serving(create_app(settings, FakeEngine())) as caller:
            key = [("authorization", "Bearer k")]
            json_type = [*key, ("content-type", "application/json")]
            asked: list[tuple[Answer, int, str]] = [
                (await caller.get("/v1/models"), 401, "invalid_api_key"),
                (await caller.send("GET", "/v1/other", headers=key), 404, "not_found"),
                (await caller.send("GET", CHAT, headers=key), 405, "method_not_allowed"),
                (await caller.send("POST", CHAT, b"{", json_type), 400, "invalid_request"),
                (await caller.send("POST", CHAT, b"{}", key), 415, "unsupported_media_type"),
                (
                    await caller.send("POST", CHAT, b"x", [*key, ("content-type", "multipart/form-data; boundary=X")]),
                    415,
                    "unsupported_media_type",
                ),
                (await caller.send("POST", CHAT, b"x" * (16 * 2**20 + 1), json_type), 413, "payload_too_large"),
                (
                    await caller.send("POST", CHAT, json.dumps({**HELLO, "model": "gpt"}).encode(), json_type),
                    404,
                    "model_not_found",
                ),
            ]
            for answer, status, code in asked:
                assert (answer.status, answer.code) == (status, code), answer.body
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            assert (await caller.get("/info")).json()["error"]["code"] == "unauthorized"

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine(tmp_path: Path, stream: bool) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            for failure, status, code in (
                (PromptTooLong("too long"), 400, "context_length_exceeded"),
                (GenerationLost("gone"), 500, "engine_failure"),
                (RuntimeError(SECRET), 500, "engine_failure"),
            ):
                engine.failure = failure
                answer = await caller.post(CHAT, {**HELLO, "stream": stream})
                assert (answer.status, answer.code) == (status, code)
                assert SECRET not in answer.body.decode()

    run(work())


def test_a_stream_that_breaks_ends_in_an_error_and_not_in_done(tmp_path: Path) -> None:
    async def work() -> None:
        engine = say("word " * 50)
        async with serving(create_app(write_models(tmp_path), engine)) as caller:

            async def then_fail(chunk: bytes) -> None:
                if b"word" in chunk:
                    engine.failure = GenerationLost("gone")

            answer = await caller.post(CHAT, {**HELLO, "stream": True}, on_chunk=then_fail)
            last = answer.body.decode().split("\n\n")[-2]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failure"
            assert b"[DONE]" not in answer.body

    run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_stops_the_generation(tmp_path: Path, stream: bool) -> None:
    async def work() -> None:
        engine = say("word " * 5000)
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.token_s = 0.002
            gone = asyncio.Event()
            task = asyncio.create_task(caller.post(CHAT, {**HELLO, "stream": stream}, hang_up=gone))
            await until(lambda: engine.running == 1 and engine.tokens > 10)
            gone.set()
            await until(lambda: engine.running == 0)
            await task
            assert engine.aborted == 1

    run(work())


def test_limits_and_deadlines_hold_for_v1_too(tmp_path: Path) -> None:
    async def work() -> None:
        engine = say("word " * 5000)
        settings = with_settings(write_models(tmp_path), max_concurrency=1)
        async with serving(create_app(settings, engine)) as caller:
            engine.token_s = 0.002
            gone = asyncio.Event()
            busy = asyncio.create_task(caller.post(CHAT, HELLO, hang_up=gone))
            await until(lambda: engine.running == 1)
            full = await caller.post(CHAT, HELLO)
            assert (full.status, full.code) == (503, "overloaded") and int(full.headers["retry-after"]) >= 1
            gone.set()
            await busy
            late = await caller.post(CHAT, {**HELLO, "deadline_ms": 50})
            assert (late.status, late.code) == (504, "deadline_exceeded")
            await until(lambda: engine.running == 0)

    run(work())


class Unready(FakeEngine):
    async def start(self) -> None:
        await asyncio.Event().wait()


def test_models_are_listed_once_ready(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), FakeEngine())) as caller:
            got = (await caller.get("/v1/models")).json()
            assert got["object"] == "list"
            listed = [(m["id"], m["parent"], m["object"], m["max_model_len"]) for m in got["data"]]
            assert listed == [("twin", "base", "model", 4096), ("base", None, "model", 4096)]
        async with serving(create_app(write_models(tmp_path), Unready()), ready=False) as caller:
            for answer in (await caller.get("/v1/models"), await caller.post(CHAT, HELLO)):
                assert (answer.status, answer.code) == (503, "not_ready")

    run(work())


def test_a_lost_generation_is_a_failed_attempt_until_rows_have_left(tmp_path: Path) -> None:
    """A machine behind the engine dies: the stage is asked again, but not after a robot may have moved."""

    class Losing(FakeEngine):
        losses = 0

        def generate(self, request: GenerationRequest) -> Any:
            if self.losses:
                self.losses -= 1
                return self._lose(request)
            return super().generate(request)

        async def _lose(self, request: GenerationRequest) -> Any:
            async for delta in super().generate(request):
                if delta.completion_tokens > 8:
                    raise GenerationLost("the connection to the endpoint broke")
                yield delta

    async def work() -> None:
        engine = Losing()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.losses = 2
            got = (await caller.post("/actions", GOOD["/actions"])).json()
            assert got["actions"] == ROWS and got["attempts"] == 3
            engine.losses = 3
            answer = await caller.post("/actions", GOOD["/actions"])
            assert (answer.status, answer.code) == (500, "engine_failure")
            engine.losses = 1
            lines = (await caller.post("/actions", GOOD["/actions"], stream=True)).lines
            assert lines[0]["event"] == "row" and lines[-1]["event"] == "error"
            assert lines[-1]["error"]["code"] == "engine_failure"

    run(work())
