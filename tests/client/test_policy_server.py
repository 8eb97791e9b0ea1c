"""ServerPolicy against a scripted server: what is sent, what is kept, what is refused."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from client_fakes import (
    EPISODE,
    FakeServer,
    asked,
    body_of,
    cycle_lines,
    error_response,
    info_body,
    make_frame,
    ndjson,
    stage,
    stream_response,
)
from hypothesis import given
from hypothesis import strategies as st

from vlm2vla_client import errors
from vlm2vla_client.policies.base import Answered, PlanArrived, RowArrived, RowDropped
from vlm2vla_client.policies.server import ServerPolicy
from vlm2vla_schema.errors import ErrorCode
from vlm2vla_schema.images import decode_image, from_base64

ROWS = [[0.01, 0.0, -0.02, 1.0], [0.0, 0.03, 0.0, 0.0]]


def serve_lines(change: Any = None) -> FakeServer:
    def cycle(request: httpx.Request) -> httpx.Response:
        lines = cycle_lines(body_of(request), ROWS)
        return stream_response([ndjson(change(lines) if change else lines)])

    return FakeServer(cycle=cycle)


def run_cycle(server: FakeServer) -> list[Any]:
    return list(ServerPolicy(server.connection()).cycle(make_frame(3), "Grasp Carrot", asked()))


def test_a_cycle_streams_plan_rows_and_answer_and_sends_the_ids_and_the_deadline() -> None:
    server = serve_lines()
    events = run_cycle(server)
    assert events[0] == PlanArrived("move left")
    assert [event.row for event in events if isinstance(event, RowArrived)] == ROWS
    assert isinstance(events[-1], Answered) and events[-1].rows == ROWS
    sent = body_of(server.requests[-1])
    assert (sent["episode_id"], sent["frame_id"], sent["deadline_ms"], sent["seed"]) == (EPISODE, "f3", 5000, 7)
    assert sent["subtask"] == "Grasp Carrot" and "temperature" not in sent
    assert decode_image(from_base64(sent["image"])).shape == (48, 64, 3)
    assert server.requests[-1].headers["accept"] == "application/x-ndjson"


def test_lines_may_arrive_cut_anywhere() -> None:
    def cycle(request: httpx.Request) -> httpx.Response:
        data = ndjson(cycle_lines(body_of(request), ROWS))
        return stream_response([data[i : i + 7] for i in range(0, len(data), 7)])

    events = run_cycle(FakeServer(cycle=cycle))
    assert isinstance(events[-1], Answered) and events[-1].rows == ROWS


def test_a_repeated_row_is_dropped_and_a_row_of_another_episode_or_frame_too() -> None:
    def change(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        foreign = {"event": "row", "index": 1, "row": [0.05, 0.05, 0.05, 1.0]}
        others = [{**foreign, "episode_id": "another"}, {**foreign, "frame_id": "another"}]
        return [*lines[:2], lines[1], *others, *lines[2:]]

    events = run_cycle(serve_lines(change))
    assert [event.row for event in events if isinstance(event, RowArrived)] == ROWS
    dropped = [event.reason for event in events if isinstance(event, RowDropped)]
    assert dropped == ["row already received", "row of another episode", "row of another frame"]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "bad_order"),
        (lambda lines: [*lines[:-1], {**lines[-1], "episode_id": "another"}], "foreign"),
        (lambda lines: [*lines[:-1], {**lines[-1], "frame_id": "another"}], "foreign"),
        (lambda lines: [*lines[:-1], {**lines[-1], "actions": [ROWS[0]]}], "bad_answer"),
        (lambda lines: [*lines[:-1], {**lines[-1], "actions": [ROWS[1], ROWS[0]]}], "bad_answer"),
        (lambda lines: [lines[0], {**lines[1], "row": [0.0, 0.0, 0.0, True]}], "bad_answer"),
        (lambda lines: [lines[0], {**lines[1], "row": [0.0, 0.0, 1.0]}], "bad_answer"),
        (lambda lines: [lines[0], {**lines[1], "index": "0"}], "bad_answer"),
        (lambda lines: lines[:-1], "stream_cut"),
        (lambda lines: [], "stream_cut"),
    ],
)
def test_a_stream_that_breaks_the_protocol_is_an_error(change: Any, code: str) -> None:
    with pytest.raises(errors.PolicyError) as caught:
        run_cycle(serve_lines(change))
    assert caught.value.code == code
    assert caught.value.exit_code == 4


def test_events_of_a_newer_server_are_ignored() -> None:
    events = run_cycle(serve_lines(lambda lines: [{"event": "thought", "text": "?"}, *lines]))
    assert isinstance(events[-1], Answered)


@pytest.mark.parametrize("junk", [b"{not json}\n", b"[1, 2]\n", b"\xff\xfe\n", b'{"event": NaN\n'])
def test_corrupt_json_in_the_stream_is_an_error(junk: bytes) -> None:
    server = FakeServer(cycle=lambda _: stream_response([junk]))
    with pytest.raises(errors.ProtocolMismatchError):
        run_cycle(server)


def test_a_stream_cut_inside_a_line_is_a_lost_server() -> None:
    server = FakeServer(cycle=lambda _: stream_response([b'{"event": "pl']))
    with pytest.raises(errors.ServerUnreachableError):
        run_cycle(server)


def test_a_stalled_or_broken_connection_is_a_lost_server() -> None:
    for fault, code in ((httpx.ReadTimeout("stalled"), "timeout"), (httpx.ReadError("reset"), "connection_lost")):
        pieces: list[bytes | Exception] = [ndjson([{"event": "plan", "motion_plan": "up"}]), fault]
        with pytest.raises(errors.ServerUnreachableError) as caught:
            run_cycle(FakeServer(cycle=lambda _, pieces=pieces: stream_response(pieces)))  # type: ignore[misc]  # mypy infers no lambda's default
        assert caught.value.code == code


@pytest.mark.clock
def test_a_server_that_trickles_is_given_up_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm2vla_client.http.GRACE_S", 0.05)

    class Trickle(httpx.SyncByteStream):
        def __iter__(self) -> Any:
            while True:
                time.sleep(0.02)
                yield b" "

    response = httpx.Response(200, headers={"content-type": "application/x-ndjson"}, stream=Trickle())
    policy = ServerPolicy(FakeServer(cycle=lambda _: response).connection())
    began_s = time.monotonic()
    with pytest.raises(errors.ServerUnreachableError):
        list(policy.cycle(make_frame(), "Lift", asked(deadline_s=0.1)))
    assert time.monotonic() - began_s < 1.0


def test_an_endless_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm2vla_client.http.MAX_BODY_BYTES", 1000)
    server = FakeServer(cycle=lambda _: stream_response([b"x" * 400] * 10))
    with pytest.raises(errors.ProtocolMismatchError):
        run_cycle(server)


CLASSES = {
    422: errors.RequestRefusedError,
    400: errors.RequestRefusedError,
    401: errors.RequestRefusedError,
    404: errors.RequestRefusedError,
    405: errors.RequestRefusedError,
    413: errors.RequestRefusedError,
    415: errors.RequestRefusedError,
    502: errors.AnswerUnusableError,
    504: errors.AnswerUnusableError,
    503: errors.ServerBusyError,
    500: errors.EngineFailedError,
    499: errors.AnswerCancelledError,
}


@pytest.mark.parametrize("code", list(ErrorCode))
@pytest.mark.parametrize("streamed", [False, True])
def test_every_wire_code_becomes_its_typed_error(code: ErrorCode, streamed: bool) -> None:
    def cycle(_: httpx.Request) -> httpx.Response:
        if streamed:
            line = {"event": "error", "error": {"code": code, "message": "m", "details": {}}}
            return stream_response([ndjson([line])])
        return error_response(code, headers={"Retry-After": "3"})

    with pytest.raises(errors.PolicyError) as caught:
        run_cycle(FakeServer(cycle=cycle))
    assert type(caught.value) is CLASSES[code.http_status]
    assert caught.value.code == code
    if not streamed:
        assert caught.value.retry_after_s == 3.0
        assert caught.value.request_id == "r1"


@given(status=st.integers(400, 599), body=st.binary(max_size=40))
def test_error_pages_that_are_not_ours_are_typed_too(status: int, body: bytes) -> None:
    server = FakeServer(cycle=lambda _: httpx.Response(status, content=body))
    with pytest.raises(errors.PolicyError):
        run_cycle(server)


def test_an_error_inside_http_200_is_not_an_answer() -> None:
    server = FakeServer(subtasks=lambda _: httpx.Response(200, json={"error": {"code": "engine_failure"}}))
    with pytest.raises(errors.ProtocolMismatchError):
        ServerPolicy(server.connection()).subtasks(make_frame(), "t", "in_distribution", asked())


def test_subtasks_sends_task_and_scenario() -> None:
    def subtasks(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=stage(body_of(request), subtasks=["Move to Carrot", "Grasp"]))

    server = FakeServer(subtasks=subtasks)
    answer = ServerPolicy(server.connection()).subtasks(make_frame(), "pick it up", "in_distribution", asked())
    assert answer.subtasks == ["Move to Carrot", "Grasp"]
    sent = body_of(server.requests[0])
    assert (sent["task"], sent["scenario"]) == ("pick it up", "in_distribution")


def test_an_adapter_without_motion_plans_is_asked_for_actions_with_a_null_plan() -> None:
    def actions(request: httpx.Request) -> httpx.Response:
        return stream_response([ndjson(cycle_lines(body_of(request), ROWS, plan=None))])

    server = FakeServer(
        info=lambda _: httpx.Response(200, json=info_body(stages=["actions"])), actions=actions
    )
    events = run_cycle(server)
    assert body_of(server.requests[-1])["motion_plan"] is None
    assert isinstance(events[-1], Answered) and events[-1].motion_plan is None


def test_an_operators_plan_goes_to_actions_and_its_rows_come_back() -> None:
    def actions(request: httpx.Request) -> httpx.Response:
        return stream_response([ndjson(cycle_lines(body_of(request), ROWS, plan=None))])

    server = FakeServer(actions=actions)
    given = replace(asked(), motion_plan="Move up.")
    events = list(ServerPolicy(server.connection()).cycle(make_frame(3), "Grasp Carrot", given))
    assert (server.requests[-1].url.path, body_of(server.requests[-1])["motion_plan"]) == ("/actions", "Move up.")
    assert events[0] == PlanArrived("Move up.")
    assert isinstance(events[-1], Answered) and (events[-1].rows, events[-1].motion_plan) == (ROWS, "Move up.")


@pytest.mark.parametrize("protocol", [2, 0, 10])
def test_another_major_protocol_is_refused(protocol: int) -> None:
    server = FakeServer(info=lambda _: httpx.Response(200, json=info_body(protocol=protocol)))
    with pytest.raises(errors.ProtocolMismatchError, match="protocol"):
        ServerPolicy(server.connection()).info()


def test_a_server_that_is_something_else_is_refused() -> None:
    for body in ({"hello": "world"}, {"protocol": 1}, {"protocol": True}):
        server = FakeServer(info=lambda _, body=body: httpx.Response(200, json=body))  # type: ignore[misc]  # mypy infers no lambda's default
        with pytest.raises(errors.ProtocolMismatchError):
            ServerPolicy(server.connection()).info()


def test_info_says_who_answers_and_whether_it_was_trained_to_act() -> None:
    assert ServerPolicy(FakeServer().connection()).info().trained_to_act
    untrained = FakeServer(info=lambda _: httpx.Response(200, json=info_body(policy=False)))
    assert not ServerPolicy(untrained.connection()).info().trained_to_act
    assert not ServerPolicy(FakeServer().connection(), model="base").info().trained_to_act
    with pytest.raises(errors.ProtocolMismatchError, match="no model"):
        ServerPolicy(FakeServer().connection(), model="nobody").info()


def test_a_sign_of_life_is_read_to_its_end() -> None:
    """Or its connection could not be used again, and every poll while the arm moves would open a new one."""
    ended = []

    def body() -> Iterator[bytes]:
        yield b"{}"
        ended.append(True)

    assert ServerPolicy(FakeServer(healthz=lambda _: httpx.Response(200, content=body())).connection()).alive(0.1)
    assert ended


def test_liveness_never_raises() -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("gone")

    assert ServerPolicy(FakeServer().connection()).alive(0.1)
    assert not ServerPolicy(FakeServer(healthz=broken).connection()).alive(0.1)
    assert not ServerPolicy(FakeServer(healthz=lambda _: httpx.Response(500)).connection()).alive(0.1)
    closed = ServerPolicy(FakeServer().connection())
    closed.close()
    assert not closed.alive(0.1)


def test_the_key_travels_as_a_bearer_token_and_images_may_travel_as_file_parts() -> None:
    def subtasks(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=stage({}, subtasks=["Lift"]))

    server = FakeServer(subtasks=subtasks)
    policy = ServerPolicy(server.connection(api_key="secret", multipart=True))
    with pytest.raises(errors.ProtocolMismatchError):  # this server forgot the echoes: None is not our episode
        policy.subtasks(make_frame(), "t", "in_distribution", asked())
    request = server.requests[0]
    assert request.headers["authorization"] == "Bearer secret"
    assert request.headers["content-type"].startswith("multipart/form-data")
    assert b'filename="image.jpg"' in request.content and b"\xff\xd8" in request.content


def test_text_and_pictures_arrive_as_they_were_given() -> None:
    seen: list[dict[str, Any]] = []

    def verify(request: httpx.Request) -> httpx.Response:
        assert request.headers["content-type"] == "application/json"
        seen.append(json.loads(request.content))
        return httpx.Response(200, json={})

    server = FakeServer(verify=verify)
    text = 'a "quoted" \\ line\nand \u00e4\U0001f916'
    pictures = {"before": bytes(range(256)), "after": b"\xff\xd8"}
    server.connection().post("/verify", {"subtask": text, "next_subtask": None, "seed": 3}, pictures, 1.0)
    encoded = {name: base64.b64encode(data).decode() for name, data in pictures.items()}
    assert seen == [{"subtask": text, "next_subtask": None, "seed": 3, "deadline_ms": 1000, **encoded}]
