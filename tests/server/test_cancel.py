"""Who may generate: callers that leave, newer requests of an episode, full servers, slow senders."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from server_fakes import GOOD, FakeEngine, run, serving, until, with_settings, write_models

from vlm2vla_server.app import create_app
from vlm2vla_server.engines.base import GenerationRequest

LONG = "[[0.01, 0.0, 0.0, 1.0]" + ", [0.01, 0.0, 0.0, 1.0]" * 30 + "]"


def slow_rows(request: GenerationRequest) -> str:
    return LONG if request.prompt.startswith("You are programming") else "Move forward."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/actions", "/cycle"])
def test_a_caller_that_leaves_frees_the_engine_within_a_token(tmp_path: Path, path: str, stream: bool) -> None:
    async def work() -> None:
        engine = FakeEngine(answer=slow_rows)
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.token_s = 0.01
            gone = asyncio.Event()
            task = asyncio.create_task(caller.post(path, GOOD[path], stream=stream, hang_up=gone))
            begun = engine.tokens
            await until(lambda: engine.running == 1 and engine.tokens >= begun + 10)
            gone.set()
            tokens = engine.tokens
            await until(lambda: engine.running == 0)
            assert engine.tokens <= tokens + 1 and engine.aborted == 1
            await task
            metrics = (await caller.get("/metrics")).body.decode()
            assert 'vlm2vla_cancelled_total{model="twin",reason="disconnected"} 1.0' in metrics
            assert "vlm2vla_in_flight 0.0" in metrics

    run(work())


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize(("first", "second"), [("/actions", "/cycle"), ("/cycle", "/actions")])
def test_the_newest_request_of_an_episode_wins(tmp_path: Path, first: str, second: str, concurrency: int) -> None:
    async def work() -> None:
        engine = FakeEngine(answer=slow_rows)
        settings = with_settings(write_models(tmp_path), max_concurrency=concurrency)
        async with serving(create_app(settings, engine)) as caller:
            engine.token_s = 0.005
            body = {"episode_id": "e"}
            older = asyncio.create_task(caller.post(first, {**GOOD[first], **body}))
            await until(lambda: engine.running == 1)
            newer = asyncio.create_task(caller.post(second, {**GOOD[second], **body}))
            answer = await older
            assert (answer.status, answer.code) == (499, "cancelled")
            assert (await newer).status == 200

    run(work())


def test_a_superseded_stream_ends_in_one_error_event(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(answer=slow_rows)
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.token_s = 0.002
            body = {**GOOD["/actions"], "episode_id": "e"}
            sent: list[bytes] = []

            async def note(chunk: bytes) -> None:
                sent.append(chunk)

            older = asyncio.create_task(caller.post("/actions", body, stream=True, on_chunk=note))
            await until(lambda: len(sent) > 2)
            newer = await caller.post("/actions", body, stream=True)
            events = [e["event"] for e in (await older).lines]
            assert events[-1] == "error" and events.count("error") == 1 and set(events[:-1]) == {"row"}
            assert (await older).lines[-1]["error"]["code"] == "cancelled"
            assert [e["event"] for e in newer.lines].count("done") == 1

    run(work())


def test_other_episodes_and_other_endpoints_are_left_alone(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(answer=slow_rows)
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.token_s = 0.0005
            answers = await asyncio.gather(
                caller.post("/actions", {**GOOD["/actions"], "episode_id": "a"}),
                caller.post("/actions", {**GOOD["/actions"], "episode_id": "b"}),
                caller.post("/actions", GOOD["/actions"]),
                caller.post("/actions", {**GOOD["/actions"], "episode_id": None}),
                caller.post("/motion_plan", {**GOOD["/motion_plan"], "episode_id": "a"}),
            )
            assert [a.status for a in answers] == [200] * 5

    run(work())


def test_a_full_server_says_when_to_come_back(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(answer=slow_rows)
        settings = with_settings(write_models(tmp_path), max_concurrency=2)
        async with serving(create_app(settings, engine)) as caller:
            engine.token_s = 0.01
            busy = [asyncio.create_task(caller.post("/actions", GOOD["/actions"])) for _ in range(2)]
            await until(lambda: engine.running == 2)
            for stream in (False, True):
                answer = await caller.post("/cycle", GOOD["/cycle"], stream=stream)
                assert (answer.status, answer.code) == (503, "overloaded")
                assert int(answer.headers["retry-after"]) >= 1
            assert (await caller.get("/healthz")).status == 200
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)
            await until(lambda: engine.running == 0)
            engine.token_s = 0.0
            assert (await caller.post("/cycle", GOOD["/cycle"])).status == 200

    run(work())


def test_a_body_that_never_comes_is_given_up(tmp_path: Path) -> None:
    async def work() -> None:
        settings = with_settings(write_models(tmp_path), body_timeout_s=0.1)
        async with serving(create_app(settings, FakeEngine())) as caller:
            status: list[int] = []

            async def receive() -> dict[str, Any]:
                await asyncio.sleep(0.02)
                return {"type": "http.request", "body": b"x", "more_body": True}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    status.append(int(str(message["status"])))

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/vqa",
                "headers": [],
                "query_string": b"",
                "root_path": "",
            }
            async with asyncio.timeout(10):
                await caller.app(scope, receive, send)
            assert status == [504]

    run(work())


def test_shutting_down_ends_what_runs(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(answer=slow_rows)
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.token_s = 0.01
            task = asyncio.create_task(caller.post("/actions", GOOD["/actions"]))
            await until(lambda: engine.running == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await until(lambda: engine.running == 0)
            assert engine.aborted == 1

    run(work())
