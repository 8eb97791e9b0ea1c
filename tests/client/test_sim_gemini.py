"""A whole run in the twin with Gemini as its verifier, over a socket: what is sent, recorded, refused."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from gemini_server import GOOD, GeminiServer, Reply, content, error, gemini_server

from vlm2vla_client.cli import main
from vlm2vla_client.recorder import RecordedEpisode, read_episode
from vlm2vla_client.verifiers.gemini_settings import record_consent
from vlm2vla_schema.prompts import verify_prompt

KEY = "AIza-secret-of-the-lab"
NO = content('{"success": false, "confidence": "High", "reasoning": "It is still above it."}', tokens=(600, 20, 100))
RUN = ["run", "--sim", "--policy", "expert", "--task", "pick up the carrot", "--seed", "500003"]
PRICES = '[gemini.prices."gemini-2.5-pro"]\ninput_usd = 1.0\noutput_usd = 10.0\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's config folder, with prices."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("GEMINI_API_KEY", KEY)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "config" / "vlm2vla"
    place.mkdir(parents=True)
    (place / "client.toml").write_text(PRICES)
    return place


def run(monkeypatch: pytest.MonkeyPatch, replies: list[Reply], *flags: str) -> tuple[int, GeminiServer]:
    with gemini_server(*replies) as server:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        return main([*RUN, *flags]), server


def recorded(tmp_path: Path) -> RecordedEpisode:
    (episode,) = (tmp_path / "runs").iterdir()
    return read_episode(episode)


def pictures(body: dict[str, Any]) -> list[bytes]:
    return [base64.urlsafe_b64decode(part["inlineData"]["data"]) for part in body["contents"][0]["parts"][:2]]


def test_without_consent_the_run_refuses_and_nothing_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, server = run(monkeypatch, [GOOD], "--verifier", "gemini")
    assert code == 2 and server.requests == [] and not (tmp_path / "runs").exists()
    assert "to Google" in capsys.readouterr().err


def test_a_run_sends_the_recorded_pictures_and_its_cost_adds_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record_consent(folder)
    code, server = run(monkeypatch, [NO, error(500, "INTERNAL"), GOOD], "--verifier", "gemini")
    printed = capfd.readouterr()
    assert code == 0, printed.err
    assert "to Google" in printed.err
    episode = recorded(tmp_path)
    verdicts, calls = episode.of("verdict"), episode.of("verifier_call")
    assert len(calls) == len(server.requests) == len(verdicts) + 1
    assert [call["outcome"] for call in calls[:3]] == ["verdict", "http_error", "verdict"]
    assert [verdict["success"] for verdict in verdicts] == [False] + [True] * (len(verdicts) - 1)
    answered = [request for request, call in zip(server.requests, calls, strict=True) if call["outcome"] == "verdict"]
    for request, verdict in zip(answered, verdicts, strict=True):
        files = [episode.frame_path(verdict[name]).read_bytes() for name in ("before", "after")]
        assert pictures(request.body) == files, "before first, and exactly what the recording shows"
        words = request.body["contents"][0]["parts"][2]["text"]
        assert words == verify_prompt(verdict["subtask"], verdict["next_subtask"])
    total = calls[-1]["total"]
    assert total["calls"] == len(calls)
    assert total["usd"] == pytest.approx(sum(call["usd"] for call in calls)) and total["usd"] > 0
    assert total["thought_tokens"] == sum(call["thought_tokens"] for call in calls)
    assert f"gemini: {len(calls)} calls" in printed.err and f"{total['usd']:.4f} USD" in printed.err
    for path in episode.folder.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in printed.out + printed.err


def test_a_dead_gemini_and_no_one_to_ask_ends_in_3_never_in_success(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = content("", finish="SAFETY")
    code, _ = run(monkeypatch, [blocked], "--verifier", "gemini,human", "--gemini-consent")  # a test has no terminal
    episode = recorded(tmp_path)
    assert code == 3 and episode.of("verdict") == [] and len(episode.of("hold")) >= 2
    errors = [event["where"] for event in episode.of("error")]
    assert errors[:2] == ["verifier gemini", "verifier human"]
