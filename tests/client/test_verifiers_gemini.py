"""Gemini against a server that speaks its protocol: what is sent, believed, paid for, and kept quiet."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from client_fakes import make_frame
from gemini_server import (
    GOOD,
    GOOD_TEXT,
    GeminiServer,
    Reply,
    content,
    error,
    gemini_server,
    hang_up,
    response,
    send,
    silence,
    trickle,
)

from vlm2vla_client.errors import ConfigurationError, VerifierError
from vlm2vla_client.verifiers.base import Notes
from vlm2vla_client.verifiers.gemini import RESPONSE_SCHEMA, GeminiVerifier
from vlm2vla_client.verifiers.gemini_settings import GeminiSettings, has_consented, record_consent
from vlm2vla_client.verifiers.outside import open_outside
from vlm2vla_schema.gemini import Price, Tokens, api_key, cost_usd
from vlm2vla_schema.images import encode_jpeg
from vlm2vla_schema.types import Frame, Verdict

KEY = "AIza-secret-of-the-lab"
BEFORE, AFTER = make_frame(1), make_frame(2)
GOLDEN = Path(__file__).parents[1] / "golden" / "d5_verify.txt"
PRICES = {"gemini-2.5-pro": Price(input_usd=1.25, output_usd=10.0)}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_API_KEY", "GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_CLOUD_PROJECT", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)


class Taken:
    """What a verifier recorded."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.notes = Notes(self._record, self._picture, lambda: None)

    def _record(self, kind: str, **fields: Any) -> None:
        self.events.append({"event": kind, **fields})

    def _picture(self, frame: Frame) -> Path:
        return Path(frame.frame_id)


@contextmanager
def asking(
    monkeypatch: pytest.MonkeyPatch, *replies: Reply, settings: GeminiSettings | None = None, wait_s: float = 0.01
) -> Iterator[tuple[GeminiServer, GeminiVerifier, Taken]]:
    """A verifier in front of a server with these replies."""
    with gemini_server(*replies) as server:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        verifier, taken = GeminiVerifier(settings or GeminiSettings(prices=PRICES), first_wait_s=wait_s), Taken()
        verifier.note_in(taken.notes)
        try:
            yield server, verifier, taken
        finally:
            verifier.close()


def ask(verifier: GeminiVerifier, next_subtask: str | None = "Lift", deadline_s: float = 30.0) -> Verdict:
    return verifier.verify(BEFORE, AFTER, "Grasp Carrot", next_subtask, deadline_s)


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_the_prompt_and_both_pictures_arrive_byte_for_byte_in_the_order_of_d5(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch) as (server, verifier, _):
        assert ask(verifier) == Verdict(True, "High", "The gripper holds it.")
    (request,) = server.requests
    assert request.path.split("/", 2)[2] == "models/gemini-2.5-pro:generateContent"
    (turn,) = request.body["contents"]
    assert turn["role"] == "user"
    before, after, words = turn["parts"]
    for part, frame in ((before, BEFORE), (after, AFTER)):
        assert part["inlineData"]["mimeType"] == "image/jpeg"
        assert base64.urlsafe_b64decode(part["inlineData"]["data"]) == encode_jpeg(frame.image)
    golden = GOLDEN.read_text(encoding="utf-8").rstrip("\n")
    golden = golden.replace("{subtask}", "Grasp Carrot").replace("{next_subtask}", "Lift")
    assert words == {"text": golden}


def test_nothing_but_the_schema_and_the_limit_is_asked_of_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch, settings=GeminiSettings(model="gemini-2.5-flash")) as (server, verifier, _):
        ask(verifier)
    (request,) = server.requests
    assert "gemini-2.5-flash:" in request.path
    assert set(request.body) == {"contents", "generationConfig"}, "no system prompt, no tools, no example turns"
    assert request.body["generationConfig"] == {
        "responseMimeType": "application/json",
        "responseSchema": RESPONSE_SCHEMA,
        "maxOutputTokens": 8192,
    }
    assert list(RESPONSE_SCHEMA["properties"]) == ["success", "confidence", "reasoning"]


def test_the_last_subtask_has_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch) as (server, verifier, taken):
        ask(verifier, None)
    assert "It is the last subtask: none follows." in server.requests[0].body["contents"][0]["parts"][2]["text"]
    assert taken.events[0]["prompt_version"] == "d5-last"


def test_google_is_never_told_a_time_limit_that_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch) as (server, verifier, _):
        ask(verifier, deadline_s=4.0)
        ask(verifier, deadline_s=45.0)
    short, long = (float(request.headers["x-server-timeout"]) for request in server.requests)
    assert short == 10.0 and 40.0 <= long <= 45.0


# --- what is believed ------------------------------------------------------------------------------------------------

INVALID = [
    "",
    "Yes.",
    "{",
    '{"success": "true", "confidence": "High", "reasoning": "r"}',
    '{"success": 1, "confidence": "High", "reasoning": "r"}',
    '{"success": true, "confidence": "Certain", "reasoning": "r"}',
    '{"success": true, "confidence": "High"}',
    '{"success": true, "confidence": "High", "reasoning": ""}',
    '{"success": true, "confidence": "High", "reasoning": "r", "more": 1}',
    '[{"success": true, "confidence": "High", "reasoning": "r"}]',
    GOOD_TEXT[:-2],
    GOOD_TEXT + GOOD_TEXT,
]


@pytest.mark.parametrize("text", INVALID)
def test_text_that_is_no_verdict_is_asked_for_again(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with asking(monkeypatch, content(text), GOOD) as (server, verifier, taken):
        assert ask(verifier).success
    assert len(server.requests) == 2
    assert [event["outcome"] for event in taken.events] == ["invalid", "verdict"]
    assert [event["raw_text"] for event in taken.events] == [text, GOOD_TEXT]


@pytest.mark.parametrize("text", INVALID)
def test_text_that_is_never_a_verdict_is_never_a_success(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with asking(monkeypatch, content(text)) as (server, verifier, _), pytest.raises(VerifierError, match="no verdict"):
        ask(verifier)
    assert len(server.requests) == 3


def test_a_verdict_in_several_parts_is_joined_and_thoughts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = content(GOOD_TEXT[:20], GOOD_TEXT[20:], thought='{"success": false}')
    with asking(monkeypatch, reply) as (_, verifier, _taken):
        assert ask(verifier) == Verdict(True, "High", "The gripper holds it.")


def test_no_is_a_verdict_and_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"success": false, "confidence": "Low", "reasoning": "It is off to the left."}'
    with asking(monkeypatch, content(text), GOOD) as (server, verifier, _):
        assert ask(verifier) == Verdict(False, "Low", "It is off to the left.")
    assert len(server.requests) == 1


@pytest.mark.parametrize("reason", ["SAFETY", "RECITATION", "PROHIBITED_CONTENT", "SPII", "BLOCKLIST", "IMAGE_SAFETY"])
def test_a_blocked_answer_is_an_error_at_once_even_with_a_verdict_in_it(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    with (
        asking(monkeypatch, content(GOOD_TEXT, finish=reason)) as (server, verifier, taken),
        pytest.raises(VerifierError, match=reason) as caught,
    ):
        ask(verifier)
    assert not caught.value.again and len(server.requests) == 1
    assert (taken.events[0]["outcome"], taken.events[0]["finish_reason"]) == ("blocked", reason)


def test_a_blocked_prompt_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        asking(monkeypatch, response(promptFeedback={"blockReason": "SAFETY"})) as (server, verifier, taken),
        pytest.raises(VerifierError, match="SAFETY") as caught,
    ):
        ask(verifier)
    assert not caught.value.again and len(server.requests) == 1 and taken.events[0]["prompt_tokens"] == 700


@pytest.mark.parametrize("finish", ["MAX_TOKENS", "OTHER", "MALFORMED_RESPONSE", "SOMETHING_NEW", None])
def test_an_answer_that_was_not_finished_is_no_verdict_even_if_it_parses(
    monkeypatch: pytest.MonkeyPatch, finish: str | None
) -> None:
    with (
        asking(monkeypatch, content(GOOD_TEXT, finish=finish)) as (server, verifier, _),
        pytest.raises(VerifierError, match="max_output_tokens" if finish == "MAX_TOKENS" else "did not finish"),
    ):
        ask(verifier)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "reply",
    [
        response(candidates=[]),
        response(candidates=[{"finishReason": "STOP"}]),
        send(200, b"<html>a proxy's page</html>"),
        send(200, b"[1]"),
        send(200, b'{"candidates": 3}'),
    ],
)
def test_a_body_that_is_no_answer_is_an_error(monkeypatch: pytest.MonkeyPatch, reply: Reply) -> None:
    with asking(monkeypatch, reply) as (server, verifier, taken), pytest.raises(VerifierError):
        ask(verifier)
    assert len(server.requests) == 3 and {event["outcome"] for event in taken.events} == {"invalid"}


# --- errors, waits, the deadline -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [(429, "RESOURCE_EXHAUSTED"), (500, "INTERNAL"), (502, ""), (503, "UNAVAILABLE"), (504, "DEADLINE_EXCEEDED")],
)
def test_a_passing_error_is_tried_again(monkeypatch: pytest.MonkeyPatch, code: int, status: str) -> None:
    with asking(monkeypatch, error(code, status), error(code, status), GOOD) as (server, verifier, taken):
        assert ask(verifier).success
    assert len(server.requests) == 3 and str(code) in taken.events[0]["message"]
    with (
        asking(monkeypatch, error(code, status)) as (server, verifier, _),
        pytest.raises(VerifierError, match=str(code)) as caught,
    ):
        ask(verifier)
    assert len(server.requests) == 3 and caught.value.again


@pytest.mark.parametrize(
    ("code", "status"),
    [(400, "INVALID_ARGUMENT"), (401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED"), (404, "NOT_FOUND")],
)
def test_a_lasting_error_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, code: int, status: str) -> None:
    with (
        asking(monkeypatch, error(code, status), GOOD) as (server, verifier, _),
        pytest.raises(VerifierError, match=status) as caught,
    ):
        ask(verifier)
    assert len(server.requests) == 1 and not caught.value.again


def test_a_lost_connection_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch, hang_up, GOOD) as (_, verifier, taken):
        assert ask(verifier).success
    assert [event["outcome"] for event in taken.events] == ["network", "verdict"]


@pytest.mark.parametrize(
    "busy", [error(429, "RESOURCE_EXHAUSTED", retry_delay="0.6s"), error(503, "UNAVAILABLE", **{"Retry-After": "0.6"})]
)
def test_the_wait_is_the_one_that_google_asks_for(monkeypatch: pytest.MonkeyPatch, busy: Reply) -> None:
    with asking(monkeypatch, busy, GOOD) as (_, verifier, _taken):
        began_s = time.monotonic()
        assert ask(verifier).success
        assert time.monotonic() - began_s >= 0.6


def test_a_wait_beyond_the_deadline_ends_the_question_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = error(429, "RESOURCE_EXHAUSTED", retry_delay="57s")
    with asking(monkeypatch, busy, GOOD) as (server, verifier, _):
        began_s = time.monotonic()
        with pytest.raises(VerifierError, match="no time for another attempt"):
            ask(verifier, deadline_s=20.0)
        assert time.monotonic() - began_s < 10.0
    assert len(server.requests) == 1


def gone(count: int) -> bool:
    """True once no thread of a question is left."""
    ends_s = time.monotonic() + 10
    while time.monotonic() < ends_s:
        if sum(thread.name == "gemini" for thread in threading.enumerate()) <= count:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("reply", [silence, trickle])
def test_the_deadline_holds_against_silence_and_against_a_trickle_and_leaves_no_thread(
    monkeypatch: pytest.MonkeyPatch, reply: Callable[..., None]
) -> None:
    with asking(monkeypatch, reply) as (_, verifier, taken):
        began_s = time.monotonic()
        with pytest.raises(VerifierError, match=r"no answer|gave no answer"):
            ask(verifier, deadline_s=1.5)
        assert time.monotonic() - began_s < 6.0
        assert taken.events[0]["outcome"] == "timeout" and taken.events[0]["prompt_tokens"] is None
        assert verifier.cost.uncounted == 1
        assert gone(0)


def test_after_a_timeout_the_next_question_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch, silence, GOOD) as (_, verifier, _taken):
        with pytest.raises(VerifierError):
            ask(verifier, deadline_s=1.0)
        assert ask(verifier).success


def test_several_attempts_share_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch, error(500, "INTERNAL"), wait_s=2.0) as (server, verifier, _):
        began_s = time.monotonic()
        with pytest.raises(VerifierError):
            ask(verifier, deadline_s=6.0)
        assert time.monotonic() - began_s < 8.0
    assert len(server.requests) == 2


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_the_cost_adds_up_over_attempts_and_thoughts_count_as_output(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = (content("no", tokens=(1000, 10, 500)), error(500, "INTERNAL"), content(GOOD_TEXT, tokens=(2000, 30, 70)))
    with asking(monkeypatch, *replies) as (_, verifier, taken):
        ask(verifier)
        first, free, second = taken.events
        assert first["usd"] == pytest.approx((1000 * 1.25 + 510 * 10.0) / 1e6)
        assert free["usd"] == 0.0
        assert second["usd"] == pytest.approx((2000 * 1.25 + 100 * 10.0) / 1e6)
        assert (second["prompt_tokens"], second["output_tokens"], second["thought_tokens"]) == (2000, 30, 70)
        cost = verifier.cost
    assert (cost.calls, cost.prompt_tokens, cost.output_tokens, cost.thought_tokens) == (3, 3000, 40, 570)
    assert cost.usd == pytest.approx(first["usd"] + second["usd"]) and cost.uncounted == 0


def test_without_a_price_the_tokens_are_counted_and_the_dollars_stay_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch, settings=GeminiSettings()) as (_, verifier, taken):
        ask(verifier)
        assert taken.events[0]["usd"] is None and verifier.cost.usd is None and verifier.cost.prompt_tokens == 700
    assert cost_usd(Tokens(), PRICES["gemini-2.5-pro"]) is None


# --- the key, the account, the consent -------------------------------------------------------------------------------


def test_the_key_travels_in_a_header_and_is_in_no_log_no_message_and_no_record(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    echo = error(400, "INVALID_ARGUMENT", f"API key {KEY} is not valid")
    with (
        asking(monkeypatch, error(500, "INTERNAL"), echo) as (server, verifier, taken),
        pytest.raises(VerifierError) as caught,
    ):
        ask(verifier)
    assert [request.headers["x-goog-api-key"] for request in server.requests] == [KEY, KEY]
    assert all(KEY not in request.path and KEY not in json.dumps(request.body) for request in server.requests)
    printed = capfd.readouterr()
    assert caplog.records, "there was something to look through"
    for text in (caplog.text, str(caught.value), repr(caught.value), repr(taken.events), printed.out, printed.err):
        assert KEY not in text
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_the_key_comes_from_the_environment_or_the_verifier_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert api_key({"GEMINI_API_KEY": " a "}) == "a"
    assert api_key({"GEMINI_API_KEY": "a", "GOOGLE_API_KEY": "b"}) == "b", "Google's own order"
    assert api_key({"GEMINI_API_KEY": " "}) is None
    monkeypatch.delenv("GEMINI_API_KEY")
    with pytest.raises(ConfigurationError, match="GEMINI_API_KEY"):
        GeminiVerifier(GeminiSettings())


def test_vertex_uses_the_machines_own_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    private = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    monkeypatch.delenv("GEMINI_API_KEY")
    with gemini_server(GOOD) as server:
        account = {
            "type": "service_account",
            "project_id": "lab",
            "private_key_id": "1",
            "private_key": private.decode(),
            "client_email": "robot@lab.example",
            "token_uri": f"{server.url}/token",
        }
        (tmp_path / "account.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
        monkeypatch.setenv("GOOGLE_VERTEX_BASE_URL", server.url)
        verifier = GeminiVerifier(GeminiSettings(project="lab", location="us-central1"))
        assert ask(verifier).success
        verifier.close()
    (request,) = server.requests
    assert "/projects/lab/locations/us-central1/publishers/google/models/gemini-2.5-pro:generateContent" in request.path
    assert request.headers["authorization"] == "Bearer short-lived" and server.token_requests == 1
    picture = request.body["contents"][0]["parts"][1]["inlineData"]["data"]
    assert base64.urlsafe_b64decode(picture) == encode_jpeg(AFTER.image)


def test_vertex_without_credentials_is_refused_before_anything_moves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    with pytest.raises(ConfigurationError, match=r"Vertex AI, project lab.*missing\.json"):
        GeminiVerifier(GeminiSettings(project="lab", location="us-central1"))


def test_without_consent_nothing_is_made_and_with_it_the_words_come_first(tmp_path: Path) -> None:
    said: list[str] = []
    settings = GeminiSettings()
    with pytest.raises(ConfigurationError, match="--gemini-consent") as caught:
        open_outside(("gemini", "human"), settings, tmp_path, consent=False, say=said.append)
    assert "to Google" in str(caught.value) and caught.value.exit_code == 2 and said == []
    made = open_outside(("gemini",), settings, tmp_path, consent=True, say=said.append)
    assert list(made) == ["gemini"] and "pictures of the bench" in said[0] and "Gemini API" in said[0]
    assert not has_consented(tmp_path), "a flag is for one run"
    record_consent(tmp_path / "new")
    assert has_consented(tmp_path / "new")
    assert list(open_outside(("gemini",), settings, tmp_path / "new", consent=False, say=said.append)) == ["gemini"]


@pytest.mark.parametrize("record", ["", "{", "[]", '{"consented": "yes"}', '{"consented": false}'])
def test_a_damaged_record_is_no_consent(tmp_path: Path, record: str) -> None:
    (tmp_path / "gemini_consent.json").write_text(record)
    assert not has_consented(tmp_path)


def test_without_google_genai_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['google.genai'] = None\n"
        "from vlm2vla_client.verifiers.gemini import GeminiVerifier\n"
        "from vlm2vla_client.verifiers.gemini_settings import GeminiSettings\n"
        "try:\n GeminiVerifier(GeminiSettings())\n"
        "except Exception as error:\n print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("ConfigurationError") and "vlm2vla-client[gemini]" in done.stdout
