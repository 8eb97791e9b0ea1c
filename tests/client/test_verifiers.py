"""Verifiers: an error or a timeout is never a success."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from client_fakes import FakeServer, ScriptedVerifier, body_of, error_response, make_frame, stage

from vlm2vla_client.errors import VerifierError
from vlm2vla_client.scenes import choose_scene
from vlm2vla_client.sim import SimBench, SimRequest, make_verifier
from vlm2vla_client.verifiers.chain import ChainVerifier
from vlm2vla_client.verifiers.none import NoVerifier
from vlm2vla_client.verifiers.server import ServerVerifier
from vlm2vla_schema.errors import ErrorCode
from vlm2vla_schema.types import Verdict

BEFORE, AFTER = make_frame(1), make_frame(2)


def verify(server: FakeServer, next_subtask: str | None = "Lift") -> Verdict:
    return ServerVerifier(server.connection()).verify(BEFORE, AFTER, "Grasp", next_subtask, 5.0)


def answering(**body: Any) -> FakeServer:
    return FakeServer(verify=lambda request: httpx.Response(200, json=stage(body_of(request), **body)))


@pytest.mark.parametrize("success", [True, False])
@pytest.mark.parametrize("next_subtask", ["Lift", None])
def test_the_server_is_sent_both_pictures_and_both_subtasks(success: bool, next_subtask: str | None) -> None:
    server = answering(success=success, confidence="Medium", reasoning="because")
    assert verify(server, next_subtask) == Verdict(success, "Medium", "because")
    sent = body_of(server.requests[0])
    assert (sent["subtask"], sent["next_subtask"]) == ("Grasp", next_subtask)
    assert sent["before"] != sent["after"]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"success": "true", "confidence": "High", "reasoning": "r"},
        {"success": 1, "confidence": "High", "reasoning": "r"},
        {"success": True, "confidence": "Certain", "reasoning": "r"},
        {"success": True, "confidence": "High"},
    ],
)
def test_an_answer_that_is_no_verdict_is_an_error(body: dict[str, Any]) -> None:
    with pytest.raises(VerifierError):
        verify(answering(**body))


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_error_of_the_wire_is_an_error_of_the_verifier(code: ErrorCode) -> None:
    with pytest.raises(VerifierError, match=code):
        verify(FakeServer(verify=lambda _: error_response(code)))


def test_a_lost_server_is_an_error_of_the_verifier() -> None:
    def lost(_: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("stalled")

    with pytest.raises(VerifierError):
        verify(FakeServer(verify=lost))


def test_none_moves_on_and_says_so() -> None:
    verdict = NoVerifier().verify(BEFORE, AFTER, "Grasp", None, 1.0)
    assert verdict.success and verdict.confidence == "Low" and "Nothing was verified" in verdict.reasoning
    assert not NoVerifier().checks


def test_the_chain_takes_the_first_verdict_even_when_it_is_no() -> None:
    first, second = ScriptedVerifier([False], "a"), ScriptedVerifier([True], "b")
    assert not ChainVerifier([first, second]).verify(BEFORE, AFTER, "Grasp", None, 1.0).success
    assert second.calls == []


def test_the_chain_retries_then_moves_on_and_reports_every_failure() -> None:
    failed: list[str] = []
    first = ScriptedVerifier([VerifierError("down"), ValueError("bug"), True], "a")
    second = ScriptedVerifier([True], "b")
    chain = ChainVerifier([first, second], on_failure=lambda name, error: failed.append(f"{name}: {error}"))
    assert chain.verify(BEFORE, AFTER, "Grasp", None, 1.0).success
    assert failed == ["a: down", "a: ValueError: bug"]
    assert (len(first.calls), len(second.calls)) == (2, 1)


def test_a_chain_that_is_exhausted_or_out_of_time_is_an_error() -> None:
    broken = ScriptedVerifier([VerifierError("down")])
    with pytest.raises(VerifierError, match="no verifier gave a verdict"):
        ChainVerifier([broken, broken]).verify(BEFORE, AFTER, "Grasp", None, 1.0)
    assert len(broken.calls) == 4

    class Slow(ScriptedVerifier):
        def verify(self, *arguments: Any) -> Verdict:
            time.sleep(0.02)
            return super().verify(*arguments)

    slow = Slow([VerifierError("timeout")])
    with pytest.raises(VerifierError, match="no verdict within"):
        ChainVerifier([slow, slow]).verify(BEFORE, AFTER, "Grasp", None, 0.01)
    assert len(slow.calls) == 1


def test_something_that_is_no_verdict_does_not_pass_the_chain() -> None:
    class Truthy(ScriptedVerifier):
        def verify(self, *arguments: Any) -> Any:
            return "yes"

    with pytest.raises(VerifierError, match="expected a Verdict"):
        ChainVerifier([Truthy([True])]).verify(BEFORE, AFTER, "Grasp", None, 1.0)


def test_a_chain_checks_only_if_every_member_does() -> None:
    assert ChainVerifier([ScriptedVerifier([True], "a"), ScriptedVerifier([True], "b")]).checks
    chain = ChainVerifier([ScriptedVerifier([True], "a"), NoVerifier()])
    assert not chain.checks and chain.name == "a,none"
    with pytest.raises(ValueError, match="at least one"):
        ChainVerifier([])


def test_the_twins_own_verifier_reads_the_instruction_as_the_whole_task() -> None:
    task = "put the carrot on the yellow plate"
    choice = choose_scene(task, None, 500_003)
    bench = SimBench.open(choice, {}, realtime=False, simulated=True)
    try:
        verifier = make_verifier(SimRequest(task=task, choice=choice, verifiers=("twin",)), bench)
        frame = bench.camera.latest(1.0, 5.0)
        said = {text: verifier.verify(frame, frame, text, None, 5.0) for text in (task, "Lower Carrot to Yellow Plate")}
    finally:
        bench.close()
    assert not said[task].success and "released in its place" in said[task].reasoning
    assert said["Lower Carrot to Yellow Plate"].success, "it is low already"
