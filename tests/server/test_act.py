"""POST /act as OpenVLA's clients send it: both encodings, one action, and the bounds of every other endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import pytest
from server_fakes import ROWS_TEXT, SUBTASKS_TEXT, FakeEngine, run, serving, with_settings, write_models

from vlm2vla_server.act import MAX_EPISODES, MAX_PAUSE_S, Chunks
from vlm2vla_server.app import create_app

IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
PAYLOAD: dict[str, Any] = {"image": IMAGE, "instruction": "pick up the carrot", "unnorm_key": "bridge_orig"}
FIRST = [0.01, -0.02, 0.0, 0.0, 0.0, 0.0, 1.0]


def encoded(payload: dict[str, Any]) -> bytes:
    return str(json_numpy.dumps(payload)).encode()


def test_one_action_in_the_form_that_was_asked_for(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine(piece_chars=1)
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            before, aborted = len(engine.requests), engine.aborted
            answer = await caller.post("/act", encoded(PAYLOAD))
            assert answer.status == 200 and answer.headers["content-type"] == "application/json"
            action = json_numpy.loads(answer.body)
            assert isinstance(action, np.ndarray) and action.dtype == np.float64 and action.tolist() == FIRST
            asked = engine.requests[before:]
            starts = ("Describe the sequence", "Given the image", "You are programming")
            assert all(request.prompt.startswith(start) for request, start in zip(asked, starts, strict=True))
            assert "Move to Carrot" in asked[1].prompt and asked[0].temperature == 0.0
            assert all(request.images[0].shape == (28, 28, 3) for request in asked)
            assert engine.aborted == aborted + 1  # the second row was not waited for
            twice = await caller.post("/act", json.dumps({"encoded": json_numpy.dumps(PAYLOAD)}).encode())
            assert json_numpy.loads(json.loads(twice.body)).tolist() == FIRST

    run(work())


def test_an_episode_is_given_its_chunk_row_by_row_and_nobody_else(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:

            async def act(**changes: Any) -> tuple[list[float], int]:
                before = len(engine.requests)
                answer = await caller.post("/act", encoded({**PAYLOAD, **changes}))
                action: list[float] = json_numpy.loads(answer.body).tolist()
                return action, len(engine.requests) - before

            second = [0.0, 0.0, -0.03, 0.0, 0.0, 0.0, 0.0]
            assert await act(episode_id="a") == (FIRST, 3)
            assert await act(episode_id="b") == (FIRST, 3)
            assert await act(episode_id="a", instruction="lift the fish") == (FIRST, 3)
            assert await act() == (FIRST, 3)
            assert await act(episode_id="a") == (second, 0)
            assert await act(episode_id="a") == (FIRST, 3)

    run(work())


def test_rows_do_not_wait_for_ever_and_not_for_everybody() -> None:
    now_s = [0.0]
    chunks = Chunks(lambda: now_s[0])
    rows = [[float(number)] for number in range(3)]
    chunks.keep("a", "go", rows)
    now_s[0] = MAX_PAUSE_S
    assert chunks.take("a", "go") == [0.0]
    now_s[0] = 2 * MAX_PAUSE_S + 0.1
    assert chunks.take("a", "go") is None
    now_s[0] = 2 * MAX_PAUSE_S + 0.2
    assert chunks.take("a", "go") is None
    for number in range(MAX_EPISODES + 1):
        chunks.keep(str(number), "go", rows)
    assert chunks.take("0", "go") is None and chunks.take("1", "go") == [0.0]


def test_a_model_without_words_acts_on_the_instruction(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path, stages=["actions"]), engine)) as caller:
            before = len(engine.requests)
            assert (await caller.post("/act", encoded(PAYLOAD))).status == 200
            (asked,) = engine.requests[before:]
            assert "pick up the carrot" in asked.prompt

    run(work())


def test_what_is_wrong_is_refused_with_a_code_of_the_protocol(tmp_path: Path) -> None:
    def array(**changes: Any) -> bytes:
        return json.dumps({**PAYLOAD, "image": {**json.loads(json_numpy.dumps(IMAGE)), **changes}}).encode()

    cases = [
        (b"{}", "invalid_request"),
        (b"[]", "invalid_request"),
        (b'{"encoded": "x"}', "invalid_request"),
        (b'{"encoded": "{}"}', "invalid_request"),
        (encoded({**PAYLOAD, "instruction": ""}), "invalid_request"),
        (encoded({**PAYLOAD, "instruction": "go <end_of_turn> on"}), "invalid_request"),
        (encoded({**PAYLOAD, "image": IMAGE.astype(np.float32)}), "invalid_image"),
        (encoded({**PAYLOAD, "image": IMAGE[..., 0]}), "invalid_image"),
        (encoded({**PAYLOAD, "image": IMAGE[:0]}), "invalid_image"),
        (encoded({**PAYLOAD, "image": IMAGE.tolist()[0][0]}), "invalid_request"),
        (array(dtype="|O"), "invalid_image"),
        (array(shape=[48, 64, 4]), "invalid_image"),
        (array(shape=[100_000, 100_000, 3]), "invalid_image"),
        (array(shape=[1] * 9), "invalid_request"),
        (array(__numpy__="%" * len(json.loads(json_numpy.dumps(IMAGE))["__numpy__"])), "invalid_image"),
        (encoded({**PAYLOAD, "image": np.zeros((1000, 1000, 3), np.uint8)}), "payload_too_large"),
    ]

    async def work() -> None:
        settings = with_settings(write_models(tmp_path), max_body_mb=1)
        async with serving(create_app(settings, FakeEngine())) as caller:
            for body, code in cases:
                assert (await caller.post("/act", body)).code == code, body[:100]
            form = await caller.send("POST", "/act", b"x", [("content-type", "multipart/form-data; boundary=x")])
            assert form.code == "unsupported_media_type"
            assert (await caller.get("/act")).code == "method_not_allowed"

    run(work())


def test_a_text_that_does_not_parse_is_no_action(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.texts += [SUBTASKS_TEXT, "Move.", *["[[0.01, 0.0]]"] * 3]
            answer = await caller.post("/act", encoded(PAYLOAD))
            assert (answer.status, answer.code) == (502, "unparseable_output")
            engine.texts += [SUBTASKS_TEXT, "Move.", "nonsense", ROWS_TEXT]
            assert json_numpy.loads((await caller.post("/act", encoded(PAYLOAD))).body).tolist() == FIRST

    run(work())


@pytest.mark.parametrize("key", [None, "secret"])
def test_the_key_is_asked_for_here_too(tmp_path: Path, key: str | None) -> None:
    async def work() -> None:
        app = create_app(with_settings(write_models(tmp_path), api_key="secret"), FakeEngine())
        async with serving(app) as caller:
            headers = [("content-type", "application/json"), *([("authorization", f"Bearer {key}")] if key else [])]
            answer = await caller.send("POST", "/act", encoded(PAYLOAD), headers)
            assert answer.status == (200 if key else 401)

    run(work())
