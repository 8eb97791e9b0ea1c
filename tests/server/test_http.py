"""The HTTP surface with a scripted engine: answers, refusals, and their codes (docs/protocol.md)."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from server_fakes import (
    GOOD,
    IMAGE,
    PLAN_TEXT,
    ROWS,
    FakeEngine,
    image_bytes,
    run,
    serving,
    with_settings,
    write_models,
)

from vlm2vla_schema import messages as wire
from vlm2vla_server.app import create_app

COMMON = set(wire.StageResult.model_fields)
MODELS: dict[str, Any] = {
    "/subtasks": wire.SubtasksResponse,
    "/motion_plan": wire.MotionPlanResponse,
    "/actions": wire.ActionsResponse,
    "/cycle": wire.CycleResponse,
    "/verify": wire.VerifyResponse,
    "/vqa": wire.VqaResponse,
}


@pytest.mark.parametrize("path", sorted(GOOD))
def test_every_endpoint_answers_with_the_common_fields_and_echoes(tmp_path: Path, path: str) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), FakeEngine())) as caller:
            body = {**GOOD[path], "request_id": "r-1", "episode_id": "e-1", "frame_id": "f-1"}
            answer = await caller.post(path, body)
            assert answer.status == 200, answer.body
            got = answer.json()
            assert set(got) >= COMMON
            assert (got["request_id"], got["episode_id"], got["frame_id"]) == ("r-1", "e-1", "f-1")
            assert got["model"] == "twin" and got["policy"] is True and got["attempts"] >= 1
            assert got["timing_ms"]["total"] >= got["timing_ms"]["queue"] >= 0
            assert got["timing_ms"]["parse"] > 0
            MODELS[path].model_validate_json(answer.body)

    run(work())


def test_default_sampling_is_that_of_appendix_d4(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            engine.requests.clear()
            await caller.post("/subtasks", GOOD["/subtasks"])
            await caller.post("/subtasks", {**GOOD["/subtasks"], "scenario": "in_distribution"})
            await caller.post("/cycle", GOOD["/cycle"])
            await caller.post("/verify", GOOD["/verify"])
            await caller.post("/vqa", GOOD["/vqa"])
            assert [(r.temperature, r.top_p) for r in engine.requests[:4]] == [
                (1.0, 0.95),
                (0.5, 0.95),
                (0.1, 0.95),
                (0.5, 0.95),
            ]
            assert [r.temperature for r in engine.requests[4:]] == [0.0, 0.0]
            assert [r.grammar is None for r in engine.requests] == [False, False, True, False, False, True]
            assert engine.requests[2].max_tokens == 400
            assert PLAN_TEXT in engine.requests[3].prompt
            assert engine.requests[0].images[0].shape == (28, 28, 3)
            assert [len(r.images) for r in engine.requests[4:]] == [2, 1]

    run(work())


def test_cycle_sums_its_stages(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), FakeEngine())) as caller:
            got = (await caller.post("/cycle", GOOD["/cycle"])).json()
            plan, rows = got["stages"]["motion_plan"], got["stages"]["actions"]
            assert got["actions"] == ROWS and got["motion_plan"] == PLAN_TEXT
            assert got["attempts"] == plan["attempts"] + rows["attempts"] == 2
            for group in ("usage", "timing_ms"):
                for name, value in got[group].items():
                    assert value == pytest.approx(plan[group][name] + rows[group][name])

    run(work())


def test_base_is_a_reserved_model_and_unknown_ones_are_404(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            got = (await caller.post("/vqa", {**GOOD["/vqa"], "model": "base"})).json()
            assert got["model"] == "base" and got["policy"] is False
            assert engine.requests[-1].adapter is None
            answer = await caller.post("/vqa", {**GOOD["/vqa"], "model": "other"})
            assert (answer.status, answer.code) == (404, "unknown_model")
            assert "other" not in answer.body.decode()

    run(work())


MULTIPART = "multipart/form-data; boundary=XX"


def form(*parts: tuple[str, str | bytes]) -> bytes:
    out = b""
    for name, value in parts:
        extra = b'; filename="f.jpg"\r\nContent-Type: image/jpeg' if isinstance(value, bytes) else b""
        raw = value if isinstance(value, bytes) else value.encode()
        out += (
            b'--XX\r\nContent-Disposition: form-data; name="'
            + name.encode()
            + b'"'
            + extra
            + b"\r\n\r\n"
            + raw
            + b"\r\n"
        )
    return out + b"--XX--\r\n"


def test_multipart_takes_the_same_fields_and_converts_text_first(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            body = form(
                ("image", image_bytes("PNG")),
                ("question", "What?"),
                ("temperature", "0.7"),
                ("seed", "5"),
                ("constrained", "false"),
                ("max_tokens", "9"),
            )
            answer = await caller.send("POST", "/vqa", body, [("content-type", MULTIPART)])
            assert answer.status == 200, answer.body
            request = engine.requests[-1]
            assert (request.temperature, request.seed, request.max_tokens) == (0.7, 5, 9)
            two = form(("images", image_bytes("WEBP")), ("images", IMAGE), ("question", "Which?"))
            assert (await caller.send("POST", "/vqa", two, [("content-type", MULTIPART)])).status == 200
            assert len(engine.requests[-1].images) == 2
            last = form(("before", image_bytes()), ("after", image_bytes()), ("subtask", "Grasp"))
            assert (await caller.send("POST", "/verify", last, [("content-type", MULTIPART)])).json()[
                "prompt_version"
            ] == "d5-last"
            for bad in (
                form(("question", "x"), ("seed", "1.5")),
                form(("question", "x"), ("question", "y")),
                form(("question", "x"), ("temperature", "nan")),
                form(("question", "x"), ("extra", "1")),
            ):
                answer = await caller.send("POST", "/vqa", bad, [("content-type", MULTIPART)])
                assert (answer.status, answer.code) == (422, "invalid_request")
            for headers in (
                [("content-type", "multipart/form-data")],
                [("content-type", "multipart/form-data; boundary=YY")],
            ):
                answer = await caller.send("POST", "/vqa", form(("question", "x")), headers)
                assert (answer.status, answer.code) == (422, "invalid_request")

    run(work())


SECRET = "s3cr3t-value"


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/vqa", {"question": ""}),
        ("/vqa", {"question": "x" * 2001}),
        ("/vqa", {"question": 5}),
        ("/vqa", {"question": None}),
        ("/vqa", {"temperature": "0.5"}),
        ("/vqa", {"temperature": True}),
        ("/vqa", {"temperature": 2.1}),
        ("/vqa", {"top_p": 0}),
        ("/vqa", {"top_p": 1.01}),
        ("/vqa", {"max_attempts": 0}),
        ("/vqa", {"max_attempts": 11}),
        ("/vqa", {"max_attempts": 1.0}),
        ("/vqa", {"deadline_ms": 0}),
        ("/vqa", {"deadline_ms": 600001}),
        ("/vqa", {"constrained": 1}),
        ("/vqa", {"unknown": SECRET}),
        ("/vqa", {"request_id": 7}),
        ("/vqa", {"images": [IMAGE] * 9, "image": None}),
        ("/vqa", {"question": "say <end_of_turn> now"}),
        ("/cycle", {"temperature": 0.5}),
        ("/cycle", {"image": None}),
        ("/actions", {"motion_plan": None}),
        ("/actions", {"motion_plan": ""}),
        ("/actions", {"motion_plan": "x" * 1501}),
        ("/subtasks", {"scenario": SECRET}),
        ("/verify", {"after": None}),
    ],
)
def test_what_the_schema_refuses_is_422_and_nothing_is_echoed(
    tmp_path: Path, path: str, change: dict[str, Any]
) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), FakeEngine())) as caller:
            answer = await caller.post(path, {**GOOD[path], **change})
            assert (answer.status, answer.code) == (422, "invalid_request"), answer.body
            assert SECRET not in answer.body.decode()
            assert set(answer.json()["error"]) == {"code", "message", "details", "request_id"}

    run(work())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b"{" * 5000,
        b"[" * 100_000,
        b'{"question":' * 3000,
        b'{"question":"x","temperature":NaN}',
        b'{"question":"x","temperature":1e999}',
        b'{"question":"\\ud800"}',
        b'{"question":"x","temperature":Infinity}',
        b'{"question":"x","seed":' + b"9" * 5000 + b"}",
    ],
)
def test_malformed_json_is_422(tmp_path: Path, body: bytes) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), FakeEngine())) as caller:
            answer = await caller.post("/vqa", body)
            assert (answer.status, answer.code) == (422, "invalid_request"), answer.body

    run(work())


@pytest.mark.parametrize(
    "image",
    [
        "not base64!",
        "https://example.org/a.jpg",
        "/etc/passwd",
        "file:///etc/passwd",
        base64.b64encode(b"GIF89a").decode(),
        base64.b64encode(image_bytes("GIF")).decode(),
        base64.b64encode(image_bytes()[:200]).decode(),
        "data:image/png;base64,",
    ],
)
def test_what_is_no_image_is_400(tmp_path: Path, image: str) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), FakeEngine())) as caller:
            answer = await caller.post("/vqa", {**GOOD["/vqa"], "image": image})
            assert (answer.status, answer.code) == (400, "invalid_image"), answer.body

    run(work())


def test_pictures_and_data_urls_that_are_accepted(tmp_path: Path) -> None:
    async def work() -> None:
        engine = FakeEngine()
        async with serving(create_app(write_models(tmp_path), engine)) as caller:
            for kind in ("JPEG", "PNG", "WEBP"):
                text = f"data:image/{kind.lower()};base64," + base64.b64encode(image_bytes(kind)).decode()
                assert (await caller.post("/vqa", {**GOOD["/vqa"], "image": text})).status == 200
            for none in (
                {"question": "Hello?"},
                {"question": "Hello?", "image": None},
                {"question": "Hello?", "images": []},
            ):
                assert (await caller.post("/vqa", none)).status == 200
                assert engine.requests[-1].images == ()

    run(work())


def test_framework_errors_have_our_shape(tmp_path: Path) -> None:
    async def work() -> None:
        settings = with_settings(write_models(tmp_path), max_body_mb=1)
        async with serving(create_app(settings, FakeEngine())) as caller:
            for path in ("/nope", "/vqa/", "/models", "/", "/docs/x"):
                answer = await caller.get(path)
                assert (answer.status, answer.code) == (404, "not_found")
            for method, path in (
                ("GET", "/vqa"),
                ("POST", "/info"),
                ("DELETE", "/cycle"),
                ("OPTIONS", "/vqa"),
                ("PATCH", "/healthz"),
            ):
                answer = await caller.send(method, path)
                assert (answer.status, answer.code) == (405, "method_not_allowed")
                assert answer.headers["allow"]
            for kind in (
                "text/plain",
                "application/x-www-form-urlencoded",
                "application/json; charset=utf-16",
                ";",
                "a/b/c",
                "",
            ):
                answer = await caller.send("POST", "/vqa", b"{}", [("content-type", kind)])
                assert (answer.status, answer.code) == (415, "unsupported_media_type")
            zipped = [("content-type", "application/json"), ("content-encoding", "gzip")]
            assert (await caller.send("POST", "/vqa", b"{}", zipped)).status == 415
            big = b'{"question": "' + b"x" * (1 << 20) + b'"}'
            for headers in ([], [("content-length", str(len(big)))], [("content-length", "9" * 30)]):
                answer = await caller.send("POST", "/vqa", big, [("content-type", "application/json"), *headers])
                assert (answer.status, answer.code) == (413, "payload_too_large")

    run(work())


def test_api_key_guards_all_but_health(tmp_path: Path) -> None:
    async def work() -> None:
        settings = with_settings(write_models(tmp_path), api_key="k3y")
        async with serving(create_app(settings, FakeEngine())) as caller:
            for path in ("/healthz", "/readyz"):
                assert (await caller.get(path)).status == 200
            for path in ("/info", "/metrics", "/docs", "/openapi.json", "/nope"):
                answer = await caller.get(path)
                assert (answer.status, answer.code) == (401, "unauthorized")
                assert answer.headers["www-authenticate"] == "Bearer"
                for wrong in ("Bearer k3", "Bearer k3yy", "Basic k3y", "k3y", "Bearer", "Bearer k3y\u00e9"):
                    assert (await caller.get(path, authorization=wrong)).status == 401
            for path in ("/info", "/metrics", "/docs", "/openapi.json"):
                assert (await caller.get(path, authorization="Bearer k3y")).status == 200
            assert (await caller.post("/vqa", GOOD["/vqa"])).status == 401
            info = await caller.get("/info", authorization="Bearer k3y")
            assert "k3y" not in info.body.decode()

    run(work())


def test_info_metrics_and_openapi(tmp_path: Path) -> None:
    async def work() -> None:
        async with serving(create_app(write_models(tmp_path), FakeEngine())) as caller:
            info = wire.InfoResponse.model_validate_json((await caller.get("/info")).body)
            assert info.protocol == 1 and info.model == "twin" and info.policy and info.image_size == 28
            assert (
                info.adapters[0].proven and info.adapters[0].hash == "ab" * 32 and info.adapters[0].card.name == "twin"
            )
            assert (
                info.limits.max_rows == 32 and info.limits.max_body_mb == 16 and info.prompt_versions["actions"] == "d4"
            )
            await caller.post("/vqa", GOOD["/vqa"])
            text = (await caller.get("/metrics")).body.decode()
            assert 'vlm2vla_requests_total{path="/vqa",status="200"} 1.0' in text and "vlm2vla_ready 1.0" in text
            paths = (await caller.get("/openapi.json")).json()["paths"]
            others = {"/act", "/v1/chat/completions", "/v1/models"}
            assert set(paths) == {*GOOD, "/healthz", "/readyz", "/info", "/metrics"} | others
            schema = paths["/cycle"]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert "motion_plan_temperature" in schema["properties"]

    run(work())
