"""Prompt -> generate -> parse -> again: retries, seeds, deadlines, streams, and models with other cards."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from server_fakes import (
    GOOD,
    PLAN_TEXT,
    ROWS,
    ROWS_TEXT,
    VERDICT_TEXT,
    FakeEngine,
    run,
    serving,
    write_models,
)

from vlm2vla_schema.messages import PlanEvent, RowEvent, parse_actions_event, parse_cycle_event
from vlm2vla_schema.parsing import encode_digits
from vlm2vla_server.app import create_app
from vlm2vla_server.engines.base import GenerationError, GenerationRequest, PromptTooLong

BAD_ROWS = "[[0.5, 0.0, 0.0, 1.0]]"
LATE_BAD_ROWS = "[[0.01, 0.0, 0.0, 1.0], [0.5, 0.0, 0.0, 1.0]]"


def test_a_refused_text_is_sampled_again_with_a_new_seed(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.requests.clear()
            engine.texts = ["nonsense", BAD_ROWS, ROWS_TEXT]
            got = (await caller.post("/actions", {**GOOD["/actions"], "seed": 7})).json()
            assert got["attempts"] == 3 and got["actions"] == ROWS and got["raw_text"] == ROWS_TEXT
            assert [r.seed for r in engine.requests] == [7, 8, 9]
            tokens = [-(-len(text) // 4) for text in ("nonsense", BAD_ROWS, ROWS_TEXT)]
            assert got["usage"] == {"prompt_tokens": 300, "completion_tokens": sum(tokens), "cached_tokens": 0}
            engine.requests.clear()
            engine.texts = ["nonsense", ROWS_TEXT]
            await caller.post("/actions", GOOD["/actions"])
            assert len({r.seed for r in engine.requests}) == 2

    run(work())


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/actions", BAD_ROWS),
        ("/actions", "[]"),
        ("/actions", "[[True, 0, 0, 1]]"),
        ("/actions", ROWS_TEXT + " and then stop"),
        ("/subtasks", "1. Move 2. Grasp"),
        ("/verify", VERDICT_TEXT + VERDICT_TEXT),
        ("/motion_plan", "  "),
        ("/motion_plan", "x" * 1501),
        ("/motion_plan", "forward <end_of_turn> down"),
        ("/cycle", ""),
    ],
)
def test_when_no_attempt_parses_the_raw_texts_are_in_the_details(tmp_path: Path, path: str, text: str) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.requests.clear()
            engine.texts = [text] * 4
            answer = await caller.post(path, {**GOOD[path], "max_attempts": 4, "request_id": "mine"})
            assert (answer.status, answer.code) == (502, "unparseable_output")
            error = answer.json()["error"]
            assert [a["raw_text"] for a in error["details"]["attempts"]] == [text] * 4
            assert error["request_id"] == "mine" and len(engine.requests) == 4

    run(work())


def test_a_motion_plan_cut_by_max_tokens_failed_but_an_answer_may_be_cut(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(finish="length")
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            answer = await caller.post("/motion_plan", GOOD["/motion_plan"])
            assert (answer.status, answer.code) == (502, "unparseable_output")
            assert answer.json()["error"]["details"]["attempts"][0]["finish_reason"] == "length"
            assert (await caller.post("/vqa", GOOD["/vqa"])).json()["finish_reason"] == "length"

    run(work())


@pytest.mark.clock
def test_the_deadline_counts_from_receipt_and_covers_all_attempts(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.token_s, engine.texts = 0.005, ["nonsense", "x" * 4000]
            began_s = time.monotonic()
            answer = await caller.post("/actions", {**GOOD["/actions"], "deadline_ms": 200, "max_attempts": 10})
            assert (answer.status, answer.code) == (504, "deadline_exceeded")
            attempts = answer.json()["error"]["details"]["attempts"]
            assert [a["raw_text"][:8] for a in attempts] == ["nonsense", "xxxxxxxx"]
            assert 0.15 < time.monotonic() - began_s < 2.0
            assert engine.running == 0 and engine.aborted == 1

    run(work())


def test_engine_failures_are_typed_and_do_not_leak(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            for failure, status, code in (
                (GenerationError("the model failed"), 500, "engine_failure"),
                (RuntimeError("secret path"), 500, "engine_failure"),
                (PromptTooLong("too long"), 422, "invalid_request"),
            ):
                engine.failure = failure
                for stream in (False, True):
                    answer = await caller.post("/cycle", GOOD["/cycle"], stream=stream)
                    assert (answer.status, answer.code) == (status, code)
                    assert b"secret" not in answer.body and b"Traceback" not in answer.body

    run(work())


def test_rows_stream_in_order_as_soon_as_they_are_complete(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(piece_chars=1)
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            seen: list[tuple[bytes, int]] = []
            begun = engine.tokens

            async def note(chunk: bytes) -> None:
                seen.append((chunk, engine.tokens - begun))

            answer = await caller.post("/actions", GOOD["/actions"], stream=True, on_chunk=note)
            assert answer.status == 200 and answer.headers["content-type"].startswith("application/x-ndjson")
            events = [parse_actions_event(line) for line in answer.body.splitlines()]
            assert [e.event for e in events] == ["row", "row", "done"]
            assert [e.row for e in events if isinstance(e, RowEvent)] == ROWS
            assert [e["index"] for e in answer.lines[:2]] == [0, 1]
            first_row_chars = ROWS_TEXT.index("]") + 1
            assert first_row_chars <= seen[0][1] <= first_row_chars + 3
            assert answer.lines[-1]["actions"] == ROWS and answer.lines[-1]["usage"]["completion_tokens"] == len(
                ROWS_TEXT
            )
            assert answer.body.startswith(b'{"event":"row"') and b'\n{"event":"done",' in answer.body

    run(work())


def test_a_streamed_cycle_is_plan_rows_done(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), FakeEngine())) as caller:
            answer = await caller.post("/cycle", GOOD["/cycle"], stream=True)
            events = [parse_cycle_event(line) for line in answer.body.splitlines()]
            assert [e.event for e in events] == ["plan", "row", "row", "done"]
            assert isinstance(events[0], PlanEvent) and events[0].motion_plan == PLAN_TEXT
            plain = (await caller.post("/vqa", GOOD["/vqa"], stream=True)).headers["content-type"]
            assert plain == "application/json"

    run(work())


def test_after_a_row_has_left_the_attempt_is_final(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(piece_chars=1)
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.requests.clear()
            engine.texts = [LATE_BAD_ROWS, ROWS_TEXT]
            answer = await caller.post("/actions", GOOD["/actions"], stream=True)
            assert [e["event"] for e in answer.lines] == ["row", "error"]
            assert answer.lines[-1]["error"]["code"] == "unparseable_output" and len(engine.requests) == 1
            assert engine.aborted == 1  # the rest of a lost attempt is not decoded
            engine.texts = [LATE_BAD_ROWS, ROWS_TEXT]
            got = await caller.post("/actions", GOOD["/actions"])
            assert got.json()["attempts"] == 2
            engine.texts = [BAD_ROWS, ROWS_TEXT]
            answer = await caller.post("/actions", GOOD["/actions"], stream=True)
            assert [e["event"] for e in answer.lines] == ["row", "row", "done"] and answer.lines[-1]["attempts"] == 2
            engine.texts = [BAD_ROWS] * 3
            answer = await caller.post("/actions", GOOD["/actions"], stream=True)
            assert (answer.status, answer.code) == (502, "unparseable_output")
            engine.texts = [PLAN_TEXT, *[BAD_ROWS] * 3]
            answer = await caller.post("/cycle", GOOD["/cycle"], stream=True)
            assert answer.status == 200 and [e["event"] for e in answer.lines] == ["plan", "error"]

    run(work())


def test_a_model_without_the_planning_stage(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path, stages=["actions"]), engine)) as caller:
            for path in ("/subtasks", "/motion_plan"):
                answer = await caller.post(path, GOOD[path])
                assert (answer.status, answer.code) == (422, "invalid_request")
            assert (await caller.post("/actions", GOOD["/actions"])).status == 422
            got = await caller.post("/actions", {**GOOD["/actions"], "motion_plan": None})
            assert got.json()["actions"] == ROWS and "the reasoning" not in engine.requests[-1].prompt
            engine.requests.clear()
            cycle = await caller.post("/cycle", GOOD["/cycle"], stream=True)
            assert [e["event"] for e in cycle.lines] == ["row", "row", "done"] and len(engine.requests) == 1
            assert cycle.lines[-1]["motion_plan"] is None and cycle.lines[-1]["stages"]["motion_plan"] is None

    run(work())


def test_a_model_that_writes_digits_as_tokens(tmp_path: Path) -> None:
    digits = {str(d): f"<unused{6133 + d}>" for d in range(10)}

    def answer(request: GenerationRequest) -> str:
        return encode_digits(ROWS_TEXT, digits) if request.prompt.startswith("You are programming") else PLAN_TEXT

    async def work() -> None:
        engine = FakeEngine(answer=answer)
        settings = write_models(tmp_path, representation="tokens", digit_map=digits)
        async with serving(create_app(settings, engine)) as caller:
            for stream in (False, True):
                got = await caller.post("/actions", GOOD["/actions"], stream=stream)
                assert got.lines[-1]["actions"] == ROWS and "<unused6133>" in got.lines[-1]["raw_text"]
            assert "unused6133" in str(engine.requests[-1].grammar)

    run(work())
