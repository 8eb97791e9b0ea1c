"""What an operator relies on: draining, a dead engine, logs, metrics, clocks."""

from __future__ import annotations

import ast
import asyncio
import io
import json
import logging
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_fakes import GOOD, IMAGE, FakeEngine, run, serving, until, with_settings, write_models

import vlm2vla_server
from vlm2vla_schema.images import to_base64
from vlm2vla_server.app import build_app
from vlm2vla_server.engines.base import GenerationRequest
from vlm2vla_server.logs import JsonFormatter, TextFormatter, describe
from vlm2vla_server.service import Service

LONG = "[[0.01, 0.0, 0.0, 1.0]" + ", [0.01, 0.0, 0.0, 1.0]" * 30 + "]"


def long_rows(request: GenerationRequest) -> str:
    return LONG if request.prompt.startswith("You are programming") else "Move forward."


# --- draining ---------------------------------------------------------------------------------------------------------


def test_draining_lets_what_runs_finish_and_refuses_what_comes(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(answer=long_rows)
        service = Service(write_models(tmp_path), engine)
        async with serving(build_app(service)) as caller:
            engine.token_s = 0.002
            stream = asyncio.create_task(caller.post("/actions", GOOD["/actions"], stream=True))
            await until(lambda: engine.running == 1)
            draining = asyncio.create_task(service.drain(20))
            await asyncio.sleep(0)
            for answer in (await caller.get("/readyz"), await caller.post("/vqa", GOOD["/vqa"])):
                assert (answer.status, answer.code) == (503, "not_ready")
                assert "shutting down" in answer.json()["error"]["details"]["reason"]
            assert (await caller.get("/healthz")).status == 200
            assert (await stream).lines[-1]["event"] == "done"
            await draining

    run(work())


def test_what_does_not_finish_in_time_is_ended_and_every_stream_gets_its_end(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(answer=long_rows, slots=2)
        service = Service(write_models(tmp_path), engine)
        async with serving(build_app(service)) as caller:
            engine.token_s = 0.02
            sent: list[bytes] = []

            async def note(chunk: bytes) -> None:
                sent.append(chunk)

            stream = asyncio.create_task(caller.post("/actions", GOOD["/actions"], stream=True, on_chunk=note))
            plain = asyncio.create_task(caller.post("/actions", GOOD["/actions"]))
            waiting = asyncio.create_task(caller.post("/cycle", GOOD["/cycle"], stream=True))
            await until(lambda: engine.running == 2 and len(sent) > 1)
            async with asyncio.timeout(10):
                await service.drain(0.05)
            events = (await stream).lines
            assert events[-1]["event"] == "error" and events[-1]["error"]["code"] == "not_ready"
            assert [event["event"] for event in events[:-1]] == ["row"] * (len(events) - 1)
            for answer in (await plain, await waiting):
                assert (answer.status, answer.code) == (503, "not_ready")
            assert engine.running == 0 and engine.aborted == 2
            text = (await caller.get("/metrics")).body.decode()
            assert 'vlm2vla_cancelled_total{model="twin",reason="shutdown"} 3.0' in text and "vlm2vla_ready 0.0" in text

    run(work())


# --- a dead engine ----------------------------------------------------------------------------------------------------


def test_a_dead_engine_is_not_ready_and_its_callers_learn_of_it(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(answer=long_rows, slots=1)
        service = Service(write_models(tmp_path), engine)
        async with serving(build_app(service)) as caller:
            engine.token_s = 0.02
            sent: list[bytes] = []

            async def note(chunk: bytes) -> None:
                sent.append(chunk)

            stream = asyncio.create_task(caller.post("/actions", GOOD["/actions"], stream=True, on_chunk=note))
            await until(lambda: bool(sent))
            waiting = asyncio.create_task(caller.post("/vqa", GOOD["/vqa"]))
            await asyncio.sleep(0.05)
            engine.death.put_nowait("killed by a test")
            events = (await stream).lines
            assert events[-1]["event"] == "error" and events[-1]["error"]["code"] == "engine_failure"
            assert ((await waiting).status, (await waiting).code) == (500, "engine_failure")
            assert service.dead.is_set()
            red = await caller.get("/readyz")
            assert red.status == 503 and "killed by a test" in red.json()["error"]["details"]["reason"]
            assert (await caller.get("/info")).json()["policy"] is False
            assert (await caller.get("/healthz")).status == 200
            assert 'reason="engine_died"} 2.0' in (await caller.get("/metrics")).body.decode()

    run(work())


# --- logs -------------------------------------------------------------------------------------------------------------

SUBTASK = "Move to the sea-green teapot"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Everything that this project logs, in the JSON form."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    log = logging.getLogger("vlm2vla_server")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield stream
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def logged(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_request_leaves_one_line_with_its_id_and_neither_picture_nor_prompt(
    tmp_path: Path, lines: io.StringIO
) -> None:
    async def work() -> None:
        async with serving(build_app(Service(write_models(tmp_path), FakeEngine()))) as caller:
            body = {**GOOD["/cycle"], "subtask": SUBTASK, "request_id": "r-1", "episode_id": "e-1"}
            answer = await caller.post("/cycle", body)
            bad = await caller.post("/cycle", {**body, "unknown": SUBTASK})
            requests = [line for line in logged(lines) if line["message"] == "request"]
            done, refused = (line for line in requests if line["path"] == "/cycle")
            assert done["request_id"] == answer.headers["x-request-id"] != refused["request_id"]
            assert (done["status"], done["method"], done["model"]) == (200, "POST", "twin")
            assert (done["caller_request_id"], done["episode_id"], done["attempts"]) == ("r-1", "e-1", 2)
            assert done["ms"] > 0 and {"time", "level", "queue_ms", "completion_tokens"} <= set(done)
            assert refused["status"] == bad.status == 422
            assert not [line for line in requests if line["path"] in ("/healthz", "/readyz") and line["status"] == 200]
            text = lines.getvalue()
            assert IMAGE[:40] not in text and SUBTASK not in text and "0.01" not in text

    run(work())


def test_a_failure_is_logged_with_its_request_and_not_told_to_the_caller(tmp_path: Path, lines: io.StringIO) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(build_app(Service(write_models(tmp_path), engine))) as caller:
            engine.failure = RuntimeError("the coolant ran out")
            answer = await caller.post("/vqa", GOOD["/vqa"])
            assert (answer.status, answer.code) == (500, "engine_failure") and b"coolant" not in answer.body
            (failure,) = [line for line in logged(lines) if line["level"] == "error"]
            assert "the coolant ran out" in failure["exception"] and "Traceback" not in failure["message"]
            assert failure["request_id"] == answer.headers["x-request-id"]
            request = next(line for line in logged(lines) if line.get("path") == "/vqa")
            assert (request["status"], request["code"]) == (500, "engine_failure")

    run(work())


def test_texts_are_logged_when_asked_for(tmp_path: Path, lines: io.StringIO) -> None:
    async def work() -> None:
        settings = with_settings(write_models(tmp_path), log_texts=True)
        async with serving(build_app(Service(settings, FakeEngine()))) as caller:
            await caller.post("/cycle", {**GOOD["/cycle"], "subtask": SUBTASK})
            attempts = [line for line in logged(lines) if line["message"] == "attempt" and SUBTASK in line["prompt"]]
            assert [line["stage"] for line in attempts] == ["motion_plan", "actions"]
            assert attempts[1]["raw_text"].startswith("[[0.01")
            assert IMAGE[:40] not in lines.getvalue()

    run(work())


def test_a_validation_error_in_a_traceback_does_not_repeat_what_it_refused() -> None:
    from vlm2vla_schema.types import ReferenceLogprobs

    try:
        try:
            ReferenceLogprobs.model_validate({"prompt": 5, "completion": SUBTASK})
        except ValueError as cause:
            raise RuntimeError("outer") from cause
    except RuntimeError as problem:
        text = describe(problem)
    assert "RuntimeError: outer" in text and "ValidationError: (message left out)" in text and SUBTASK not in text
    record = logging.LogRecord("x", logging.INFO, "f", 1, "hello", None, None)
    record.fields = {"status": 200}
    assert "hello status=200" in TextFormatter().format(record)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_metrics_tell_stages_and_adapters_apart(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(build_app(Service(write_models(tmp_path), engine))) as caller:
            engine.texts = ["Move forward.", "no rows", "[[0.01, 0.0, 0.0, 1.0]]"]
            assert (await caller.post("/cycle", GOOD["/cycle"], stream=True)).lines[-1]["event"] == "done"
            await caller.post("/vqa", {**GOOD["/vqa"], "model": "base"})
            text = (await caller.get("/metrics")).body.decode()
            for expected in (
                'vlm2vla_attempts_total{model="twin",stage="motion_plan"} 1.0',
                'vlm2vla_attempts_total{model="twin",stage="actions"} 2.0',
                'vlm2vla_failed_attempts_total{model="twin",stage="actions"} 1.0',
                'vlm2vla_stage_seconds_count{model="twin",stage="actions"} 1.0',
                'vlm2vla_stage_seconds_count{model="base",stage="vqa"} 1.0',
                'vlm2vla_first_token_seconds_count{model="twin",stage="actions"} 2.0',
                'vlm2vla_first_row_seconds_count{model="twin"} 1.0',
                'vlm2vla_queue_seconds_count{priority="act"} 1.0',
                'vlm2vla_tokens_total{kind="completion",model="base",stage="vqa"}',
            ):
                assert expected in text, expected

    run(work())


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0])
def test_a_jump_of_the_wall_clock_changes_nothing(
    tmp_path: Path, jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    jumped = False

    def answer(request: GenerationRequest) -> str:
        nonlocal jumped
        jumped = True
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        return long_rows(request)

    async def work() -> None:
        engine = FakeEngine()
        async with serving(build_app(Service(write_models(tmp_path), engine))) as caller:
            engine.answer, engine.token_s = answer, 0.001
            got = await caller.post("/actions", {**GOOD["/actions"], "deadline_ms": 20_000})
            assert jumped and got.status == 200, got.body
            assert 0 < got.json()["timing_ms"]["total"] < 20_000
            late = await caller.post("/actions", {**GOOD["/actions"], "deadline_ms": 10})
            assert (late.status, late.code) == (504, "deadline_exceeded")

    run(work())


STAMPS = {"openai_api.py"}  # `created` of OpenAI's answers is a wall-clock stamp


def test_nothing_is_timed_by_the_wall_clock() -> None:
    found = []
    root = Path(next(iter(vlm2vla_server.__path__)))
    for path in (one for one in root.rglob("*.py") if one.name not in STAMPS):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                if name in ("time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "date.today"):
                    found.append(f"{path.name}:{node.lineno} {name}")
            if isinstance(node, ast.ImportFrom) and node.module == "time":
                found.append(f"{path.name}:{node.lineno} imports from time")
    assert found == []


# --- pictures that are too much ---------------------------------------------------------------------------------------


def png_of_zeros(side: int) -> bytes:
    """A complete grey PNG of side x side black pixels: a few hundred bytes a megapixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    bomb = png_of_zeros(6000)  # 36 megapixels in about 36 kB
    assert len(bomb) < 100_000

    async def work() -> None:
        async with serving(build_app(Service(write_models(tmp_path), FakeEngine()))) as caller:
            answer = await caller.post("/vqa", {**GOOD["/vqa"], "image": to_base64(bomb)})
            assert (answer.status, answer.code) == (400, "invalid_image")
            assert "pixels" in answer.json()["error"]["message"]
            assert (await caller.post("/vqa", {**GOOD["/vqa"], "image": to_base64(png_of_zeros(500))})).status == 200

    run(work())
