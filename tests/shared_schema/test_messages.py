"""Requests are strict; answers, events and errors keep the shape of protocol 1."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vlm2vla_schema import messages as m
from vlm2vla_schema.errors import ErrorBody, ErrorCode, ErrorInfo, ParseError, VLM2VLAError, validation_details
from vlm2vla_schema.types import ModelCard

MINIMAL: dict[type[m.GenerationFields], dict[str, Any]] = {
    m.SubtasksRequest: {"image": "aGk=", "task": "t"},
    m.MotionPlanRequest: {"image": "aGk=", "subtask": "s"},
    m.ActionsRequest: {"image": "aGk=", "subtask": "s", "motion_plan": None},
    m.CycleRequest: {"image": "aGk=", "subtask": "s"},
    m.VerifyRequest: {"before": "aGk=", "after": "aGk=", "subtask": "s", "next_subtask": None},
    m.VqaRequest: {"question": "q"},
}
TEXT_FIELDS = ("task", "subtask", "next_subtask", "question")


def read(kind: type[m.GenerationFields], **fields: Any) -> Any:
    return kind.model_validate_json(json.dumps({**MINIMAL[kind], **fields}))


def refused(kind: type[m.GenerationFields], **fields: Any) -> None:
    with pytest.raises(ValidationError):
        read(kind, **fields)
    with pytest.raises(ValidationError):
        kind.model_validate({**MINIMAL[kind], **fields})


@pytest.mark.parametrize("kind", MINIMAL)
def test_defaults(kind: type[m.GenerationFields]) -> None:
    request = read(kind)
    assert request.deadline_ms == 60_000
    assert request.max_attempts == 3
    assert request.constrained is True
    assert request.model is request.top_p is request.seed is request.max_tokens is request.episode_id is None


def test_the_scenario_defaults_to_all_other_scenarios() -> None:
    assert read(m.SubtasksRequest).scenario == "out_of_distribution"
    assert m.TEMPERATURE_SUBTASKS == {"in_distribution": 0.5, "out_of_distribution": 1.0}
    assert (m.TEMPERATURE_MOTION_PLAN, m.TEMPERATURE_ACTIONS, m.TOP_P_POLICY) == (0.1, 0.5, 0.95)


@pytest.mark.parametrize("kind", MINIMAL)
@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("top_p", [1, 0.001, 1.0, None], [0, -0.1, 1.01, True, "0.5", float("nan"), float("inf"), [1]]),
        ("seed", [0, 7, None], [-1, 1.5, 1.0, True, "1", 2**63]),
        ("max_tokens", [1, 100, None], [0, -1, 1.5, True, "5"]),
        ("deadline_ms", [1, 600_000], [0, 600_001, -5, True, "60000", 1.5, None]),
        ("max_attempts", [1, 10], [0, 11, True, "3", 1.5, None]),
        ("constrained", [True, False], [0, 1, "true", None]),
        ("model", ["base", None], ["", 3, True]),
        ("request_id", ["r", "", None], [3, True, "x" * 201]),
        ("episode_id", ["e", None], [3, True]),
        ("frame_id", ["000001", None], [3, True]),
    ],
)
def test_common_fields(kind: type[m.GenerationFields], field: str, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert getattr(read(kind, **{field: value}), field) == value
    for value in bad:
        refused(kind, **{field: value})


@pytest.mark.parametrize("kind", MINIMAL)
def test_temperatures(kind: type[m.GenerationFields]) -> None:
    fields = ("motion_plan_temperature", "actions_temperature") if kind is m.CycleRequest else ("temperature",)
    for field in fields:
        for value in (0, 1, 0.5, 2, None):
            assert getattr(read(kind, **{field: value}), field) == value
        for bad in (-0.1, 2.1, True, "1", float("nan")):
            refused(kind, **{field: bad})


def test_a_cycle_has_no_single_temperature() -> None:
    refused(m.CycleRequest, temperature=0.5)
    refused(m.ActionsRequest, actions_temperature=0.5)


@pytest.mark.parametrize("kind", MINIMAL)
def test_required_and_unknown_fields(kind: type[m.GenerationFields]) -> None:
    refused(kind, surprise=1)
    for field in MINIMAL[kind]:
        rest = {name: value for name, value in MINIMAL[kind].items() if name != field}
        with pytest.raises(ValidationError):
            kind.model_validate(rest)


@pytest.mark.parametrize("kind", MINIMAL)
def test_texts_and_images(kind: type[m.GenerationFields]) -> None:
    for field in MINIMAL[kind]:
        if field in TEXT_FIELDS:
            assert getattr(read(kind, **{field: "é" * 2000}), field) == "é" * 2000
        for bad in ("", 5, True, ["a"], {"a": 1}):
            refused(kind, **{field: bad})
        if field in TEXT_FIELDS:
            refused(kind, **{field: "x" * 2001})
        if field in ("image", "before", "after"):
            refused(kind, **{field: None})


def test_motion_plan_of_actions() -> None:
    assert read(m.ActionsRequest, motion_plan="x" * 1500).motion_plan == "x" * 1500
    refused(m.ActionsRequest, motion_plan="x" * 1501)
    refused(m.CycleRequest, motion_plan=None)
    refused(m.SubtasksRequest, scenario="elsewhere")


def test_images_of_vqa() -> None:
    assert read(m.VqaRequest).all_images == []
    assert read(m.VqaRequest, image=None, images=None).all_images == []
    assert read(m.VqaRequest, image="a").all_images == ["a"]
    assert read(m.VqaRequest, images=["a"] * 8).all_images == ["a"] * 8
    for bad in (
        {"images": ["a"] * 9},
        {"images": [None]},
        {"images": "a"},
        {"image": "a", "images": ["b"]},
        {"image": ""},
    ):
        refused(m.VqaRequest, **bad)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "null",
        "{",
        '{"image": "a", "subtask": "s", "top_p": 1e999}',
        '{"image": "a", "subtask": "\\ud800"}',
        '{"image": "a", "subtask": "s", "top_p": NaN}',
        b"\xff",
    ],
)
def test_malformed_json_is_a_validation_error(body: str | bytes) -> None:
    with pytest.raises(ValidationError):
        m.CycleRequest.model_validate_json(body)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["image", "subtask", "seed", "x"]), inner, max_size=4)
        ),
        max_leaves=8,
    )
)
def test_any_json_validates_or_raises_validation_error(value: object) -> None:
    try:
        m.CycleRequest.model_validate_json(json.dumps(value))
    except ValidationError as error:
        assert validation_details(error)["problems"]


def test_details_never_repeat_the_received_value() -> None:
    secret = "topsecret" * 300
    with pytest.raises(ValidationError) as caught:
        m.SubtasksRequest.model_validate({"image": [secret], "task": secret, "scenario": secret, "seed": secret})
    details = validation_details(caught.value)
    assert secret[:9] not in json.dumps(details)
    assert {problem["field"] for problem in details["problems"]} == {"image", "task", "scenario", "seed"}


def test_details_of_a_hostile_body_stay_short() -> None:
    with pytest.raises(ValidationError) as caught:
        m.SubtasksRequest.model_validate({f"x{number}" * 100: 1 for number in range(1000)})
    assert len(json.dumps(validation_details(caught.value))) < 10_000


def common() -> dict[str, Any]:
    return {
        "model": "twin",
        "policy": True,
        "prompt_version": "d4",
        "raw_text": "...",
        "attempts": 1,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 0},
        "timing_ms": {"queue": 0, "preprocess": 1.5, "first_token": 2, "generate": 3, "parse": 0.5, "total": 5},
        "request_id": "r",
        "episode_id": None,
        "frame_id": "000001",
    }


def cycle() -> dict[str, Any]:
    return {
        **common(),
        "motion_plan": "Move left.",
        "actions": [[0.01, 0, 0, 1]],
        "stages": {"motion_plan": common(), "actions": common()},
    }


def test_answers_carry_the_common_fields() -> None:
    answer = m.CycleResponse.model_validate_json(json.dumps(cycle()))
    assert json.loads(answer.model_dump_json()) == cycle()
    own: dict[type[m.StageResult], dict[str, Any]] = {
        m.SubtasksResponse: {"subtasks": ["a"]},
        m.MotionPlanResponse: {"motion_plan": "up"},
        m.ActionsResponse: {"actions": [[0.0, 0.0, 0.0, 1.0]]},
        m.VerifyResponse: {"success": False, "confidence": "Low", "reasoning": "no", "probability": None},
        m.VqaResponse: {"answer": ""},
    }
    for kind, fields in own.items():
        assert json.loads(kind.model_validate({**common(), **fields}).model_dump_json()) == {**common(), **fields}


def test_an_older_client_ignores_new_fields_but_not_wrong_ones() -> None:
    m.CycleResponse.model_validate_json(json.dumps({**cycle(), "new": 1}))
    for wrong in ([[0.01, 0, 0]], [[0.01, 0, 0, True]], [["0", 0, 0, 1]], [], [[1e400, 0, 0, 1]]):
        with pytest.raises(ValidationError):
            m.CycleResponse.model_validate({**cycle(), "actions": wrong})


def test_stream_events() -> None:
    plan = m.parse_cycle_event('{"event":"plan","motion_plan":"Move left."}')
    assert isinstance(plan, m.PlanEvent)
    row = m.parse_cycle_event(b'{"event":"row","index":0,"row":[0.01,0,0,1]}')
    assert isinstance(row, m.RowEvent)
    assert json.loads(row.model_dump_json()) == {"event": "row", "index": 0, "row": [0.01, 0, 0, 1]}
    done = m.parse_cycle_event(json.dumps({"event": "done", **cycle()}))
    assert isinstance(done, m.DoneEvent)
    assert json.loads(done.model_dump_json()) == {"event": "done", **cycle()}
    actions = m.parse_actions_event(json.dumps({"event": "done", **common(), "actions": [[0, 0, 0, 1]]}))
    assert isinstance(actions, m.ActionsDoneEvent)
    failed = m.parse_actions_event('{"event":"error","error":{"code":"cancelled","message":"newer","details":{}}}')
    assert isinstance(failed, m.ErrorEvent)
    assert failed.error.code is ErrorCode.CANCELLED
    for line in ("", "{}", '{"event":"other"}', '{"event":"row","index":-1,"row":[0,0,0,1]}'):
        with pytest.raises(ValidationError):
            m.parse_cycle_event(line)


def test_info() -> None:
    card = ModelCard(name="twin", base_model="base", image_size=112, policy=True, stages=["actions"])
    info = m.InfoResponse(
        protocol=m.PROTOCOL,
        model="twin",
        policy=True,
        adapters=[m.AdapterInfo(name="twin", hash="ab", policy=True, proven=True, card=card)],
        prompt_versions={"actions": "d4"},
        limits=m.LimitsInfo(max_row_translation_m=0.1, max_rows=32, max_body_mb=16, max_concurrency=1),
        units=m.UNITS,
        image_size=112,
        engine="transformers",
        versions={"vlm2vla-server": "0.1.0"},
    )
    assert m.InfoResponse.model_validate_json(info.model_dump_json()) == info


def test_error_codes_and_body() -> None:
    statuses = {code.value: code.http_status for code in ErrorCode}
    assert statuses == {
        "invalid_request": 422,
        "invalid_image": 400,
        "payload_too_large": 413,
        "unsupported_media_type": 415,
        "unauthorized": 401,
        "not_found": 404,
        "unknown_model": 404,
        "method_not_allowed": 405,
        "unparseable_output": 502,
        "deadline_exceeded": 504,
        "overloaded": 503,
        "not_ready": 503,
        "engine_failure": 500,
        "cancelled": 499,
    }
    body = ErrorBody(error=ErrorInfo(code=ErrorCode.OVERLOADED, message="busy", request_id="r"))
    assert json.loads(body.model_dump_json()) == {
        "error": {"code": "overloaded", "message": "busy", "details": {}, "request_id": "r"}
    }
    assert issubclass(ParseError, VLM2VLAError)
