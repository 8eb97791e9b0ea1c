"""`annotate --annotator gemini` against a server that speaks Google's protocol: nothing lost, nothing doubled, every
token counted, through faults and three kill -9.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from annotation_server import FAULTS, REFUSED_FOR_GOOD, Books, annotation_server
from training_fakes import Segment, episode_of

from vlm2vla_schema.gemini import Price
from vlm2vla_schema.prompts import annotation_prompt
from vlm2vla_training.annotation.gemini_budget import Budget
from vlm2vla_training.annotation.gemini_calls import GeminiCalls, LineSettings, StoppedError
from vlm2vla_training.annotation.gemini_journal import Journal, held
from vlm2vla_training.annotation.gemini_request import RequestSettings, log_text, question_about
from vlm2vla_training.cli import main
from vlm2vla_training.episodes.parquet import EpisodeWriter
from vlm2vla_training.jsonio import read_jsonl

KEY = "AIza-secret-of-the-lab"
SHORT: list[Segment] = [
    (0.09, 0.04, -0.03, 1, 3),
    (0.0, 0.0, -0.04, 1, 2),
    (0.0, 0.0, 0.0, 0, 1),
    (0.0, 0.0, 0.09, 0, 3),
]
STEPS = ["Move to Carrot", "Grasp Carrot", "Lift Carrot"]
INPUT_USD, OUTPUT_USD = 0.3, 2.5


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_API_KEY", "GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_CLOUD_PROJECT", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)


def dataset(folder: Path, episodes: int) -> list[str]:
    with EpisodeWriter(folder, episodes_per_part=50) as writer:
        for index in range(episodes):
            episode = episode_of(SHORT, f"pick up carrot {index}", f"fake/{index}")
            writer.write(replace(episode, first_step=index % 4))
    return [f"fake/{index}" for index in range(episodes)]


def arguments(tmp_path: Path, *more: str, max_usd: str = "50") -> list[str]:
    prices = tmp_path / "prices.toml"
    prices.write_text(f'["gemini-2.5-flash"]\ninput_usd = {INPUT_USD}\noutput_usd = {OUTPUT_USD}\n')
    return [
        "annotate", "--annotator", "gemini", "--episodes", str(tmp_path / "episodes"), "--out", str(tmp_path / "out"),
        "--prices", str(prices), "--max-usd", max_usd, "--first-wait-s", "0.02", "--requests-per-minute", "100000",
        "--tokens-per-minute", "100000000", *more,
    ]  # fmt: skip


def lines_of(tmp_path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(tmp_path / "out" / "annotated.jsonl"))


def summary_of(tmp_path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((tmp_path / "out" / "summary.json").read_text())
    return value


def usd_of(tokens: list[tuple[int, int, int]]) -> float:
    return sum(prompt * INPUT_USD + (output + thought) * OUTPUT_USD for prompt, output, thought in tokens) / 1e6


def run_until_killed(command: list[str], books: Books, url: str) -> int:
    environment = {**os.environ, "GOOGLE_GEMINI_BASE_URL": url, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm2vla_training.cli", *command],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's "&" has all below it ignore Ctrl-C
    )  # fmt: skip
    books.victim = process.pid
    _, said = process.communicate(timeout=120)
    assert KEY.encode() not in said
    return process.returncode


@pytest.mark.parametrize("version", ["b1-ranges", "b1-paper"])
def test_faults_and_three_kills_lose_double_and_miscount_nothing(version: str, tmp_path: Path) -> None:
    keys = dataset(tmp_path / "episodes", 200)
    command = arguments(tmp_path, "--prompt-version", version)
    with annotation_server(FAULTS, kill_at=[60, 130, 200]) as (server, books):
        codes = [run_until_killed(command, books, server.url) for _ in range(4)]
    assert codes == [-9, -9, -9, 0]

    lines = lines_of(tmp_path)
    assert Counter(line["episode_key"] for line in lines) == Counter(keys), "each annotated once"
    for line in lines:
        fault = FAULTS[int(line["instruction"].split()[-1]) % len(FAULTS)]
        assert bool(line["audit"]["quarantine"]) == (fault in REFUSED_FOR_GOOD), (fault, line)
        if fault not in REFUSED_FOR_GOOD:
            assert [step["step_description"] for step in line["steps"]] == STEPS
            assert line["audit"]["covered"] and line["audit"]["actions_match"]
            assert line["audit"]["asked"]["rounds"] == (1 if fault in ("good", "429", "500") else 2)
    reasons = {line["instruction"].split()[-1]: line["audit"]["quarantine"] for line in lines}
    assert "not the JSON" in reasons["4"] and "cut" in reasons["6"] and "refused" in reasons["9"]
    assert "RECITATION" in reasons["11"] and "left_right" in reasons["13"]
    assert ("partition" if version == "b1-ranges" else "copies") in reasons["8"]

    calls = list(read_jsonl(tmp_path / "out" / "calls.jsonl"))
    asked = {call["call"]: call for call in calls if call["event"] == "asked"}
    ended = {call["call"]: call for call in calls if call["event"] != "asked"}
    paid = [call for call in ended.values() if call["event"] == "answered"]
    serials = [call["prompt_tokens"] - 1000 for call in paid]
    billed = [books.billed[serial] for serial in serials]
    assert [(call["prompt_tokens"], call["output_tokens"], call["thought_tokens"]) for call in paid] == billed
    assert len(set(serials)) == len(serials)
    kept = Counter((asked[call["call"]]["content"], asked[call["call"]]["round"]) for call in paid)
    assert set(kept.values()) == {1}, "an answer that is on the disk is not asked for again"

    cost, open_calls = summary_of(tmp_path)["cost"], asked.keys() - ended.keys()
    assert cost["prompt_tokens"] == sum(tokens[0] for tokens in billed)
    assert cost["output_tokens"] == sum(tokens[1] for tokens in billed)
    assert cost["thought_tokens"] == sum(tokens[2] for tokens in billed)
    assert cost["usd"] == pytest.approx(usd_of(billed), abs=1e-6)
    in_flight = [tokens for serial, tokens in books.billed.items() if serial not in serials]
    assert len(in_flight) <= len(open_calls) == cost["uncounted"], "what a kill cut off is counted at its bound"
    assert usd_of(in_flight) <= cost["uncounted_usd"]


def test_an_interrupted_run_keeps_what_was_under_way(tmp_path: Path) -> None:
    keys = dataset(tmp_path / "episodes", 60)
    with annotation_server(kill_at=[12]) as (server, books):
        books.signal = signal.SIGINT
        assert run_until_killed(arguments(tmp_path), books, server.url) == 130
        assert 12 <= len(books.billed) < 60
        assert run_until_killed(arguments(tmp_path), books, server.url) == 0
    assert Counter(line["episode_key"] for line in lines_of(tmp_path)) == Counter(keys)
    assert len(books.billed) == 60 and summary_of(tmp_path)["cost"]["uncounted"] == 0


def test_without_kills_the_cost_is_exactly_what_was_billed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path / "episodes", 20)
    with annotation_server(FAULTS) as (server, books):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        assert main(arguments(tmp_path)) == 0
        asked = len(books.asked)
        assert main(arguments(tmp_path)) == 0 and len(books.asked) == asked, "a finished run asks nothing"
    cost, billed = summary_of(tmp_path)["cost"], list(books.billed.values())
    assert cost["prompt_tokens"] == sum(tokens[0] for tokens in billed) and cost["uncounted"] == 0
    assert cost["usd"] == pytest.approx(usd_of(billed), abs=1e-6)
    assert summary_of(tmp_path)["audit"]["quarantined"] == len(REFUSED_FOR_GOOD) and len(lines_of(tmp_path)) == 20


def test_what_is_in_quarantine_is_shown_to_people_and_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path / "episodes", 20)
    with annotation_server(FAULTS) as (server, _):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        assert main(arguments(tmp_path)) == 0
    read = ["--episodes", str(tmp_path / "episodes"), "--annotated", str(tmp_path / "out")]
    assert main(["audit", *read, "--out", str(tmp_path / "audit")]) == 0
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "RECITATION" in page and "refused the pictures or the words" in page
    assert main(["curate", *read, "--out", str(tmp_path / "examples")]) == 0
    curated = json.loads((tmp_path / "examples" / "summary.json").read_text())
    assert curated["episodes"] == 20 - len(REFUSED_FOR_GOOD) == 20 - sum(curated["left_out"].values())
    assert curated["annotators"] == ["gemini-2.5-flash b1-ranges"] and not curated["dropped"]


def test_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path / "episodes", 1)
    episode = episode_of(SHORT, "pick up carrot 0", "fake/0")
    for version, more in (("b1-ranges", []), ("b1-paper", ["--temperature", "0.5", "--top-p", "0.9"])):
        with annotation_server() as (server, _):
            monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
            assert main(arguments(tmp_path, "--prompt-version", version, "--frames-every", "4", *more)) == 0
        (request,) = server.requests
        (turn,) = request.body["contents"]
        pictures = [part["inlineData"]["data"] for part in turn["parts"] if "inlineData" in part]
        assert [base64.urlsafe_b64decode(data) for data in pictures] == [episode.images[place] for place in (0, 4, 8)]
        words = [part["text"] for part in turn["parts"] if "text" in part]
        labels = ["Observation 0:", "Observation 4:", "Observation 8:"] if version == "b1-ranges" else []
        assert words == [*labels, annotation_prompt(log_text(episode), version)]
        config = request.body["generationConfig"]
        fields = config["responseSchema"]["items"]["required"]
        assert fields[3:] == (["first", "last"] if version == "b1-ranges" else ["actions"])
        sampling = {name: config[name] for name in ("temperature", "topP") if name in config}
        assert sampling == ({} if version == "b1-ranges" else {"temperature": 0.5, "topP": 0.9})
        assert set(request.body) == {"contents", "generationConfig"}


def test_the_second_request_names_the_findings_and_shows_the_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path / "episodes", 1)
    with annotation_server(["words"]) as (server, _):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        assert main(arguments(tmp_path)) == 0
    _, request = server.requests
    first, answer, repair = request.body["contents"]
    assert first == server.requests[0].body["contents"][0] and (answer["role"], repair["role"]) == ("model", "user")
    assert json.loads(answer["parts"][0]["text"])[0]["step_description"] == "Move to Carrot"
    assert "step 1: the words say right; the log moves 4.0 cm left" in repair["parts"][0]["text"]


def test_the_limit_in_dollars_is_kept_and_a_higher_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path / "episodes", 12)
    with annotation_server() as (server, books):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        limited = ["--max-output-tokens", "1000", "--concurrency", "3"]
        assert main(arguments(tmp_path, *limited, max_usd="0.008")) == 1
        first = summary_of(tmp_path)
        assert 0 < first["episodes"] < 12 and first["left"] == 12 - first["episodes"] and not first["failures"]
        assert "--max-usd 0.008" in first["stopped"]
        assert first["cost"]["usd"] == pytest.approx(usd_of(list(books.billed.values())), abs=1e-6)
        assert first["cost"]["usd"] <= 0.008
        assert main(arguments(tmp_path, *limited, max_usd="1")) == 0
    assert len(lines_of(tmp_path)) == 12 == len(books.billed)


@pytest.mark.parametrize(("fault", "requests"), [("key", 1), ("unknown", 1), ("busy", 20), ("tomorrow", 10)])
def test_a_refusal_of_everything_ends_the_run(
    fault: str, requests: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "episodes", 40)
    with annotation_server([fault]) as (server, books):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        assert main(arguments(tmp_path, "--concurrency", "1", "--attempts", "2")) == 1
    summary = summary_of(tmp_path)
    assert summary["left"] == 40 and summary["cost"]["calls"] == 0 and summary["stopped"]
    assert summary["cost"]["refused"] == len(books.asked)
    assert requests <= len(books.asked) <= requests + 4, "what was under way when the run stopped ends"
    assert KEY not in capsys.readouterr().err + (tmp_path / "out" / "calls.jsonl").read_text()


def test_a_call_that_got_lost_is_asked_again_and_counted_at_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path / "episodes", 1)
    with annotation_server(["lost"]) as (server, books):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        assert main(arguments(tmp_path)) == 0
    cost = summary_of(tmp_path)["cost"]
    assert cost["uncounted"] == 1 and cost["uncounted_usd"] > 16384 * OUTPUT_USD / 1e6
    assert cost["usd"] == pytest.approx(usd_of(list(books.billed.values())), abs=1e-6)


def test_no_more_requests_leave_in_a_minute_than_the_account_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, price, stop = RequestSettings(), Price(input_usd=1.0, output_usd=1.0), threading.Event()
    questions = [question_about(episode_of(SHORT, f"pick up carrot {i}", f"fake/{i}"), settings) for i in range(3)]
    ended: list[Exception] = []
    with annotation_server() as (server, books), Journal(tmp_path, price) as journal:
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        speed = LineSettings(requests_per_minute=2)
        calls = GeminiCalls(KEY, settings, speed, price, journal, Budget(1.0, 0.0), stop)
        for question in questions[:2]:
            assert calls.ask(question, [], None).outcome == "text"

        def third() -> None:
            try:
                calls.ask(questions[2], [], None)
            except StoppedError as error:
                ended.append(error)

        thread = threading.Thread(target=third)
        thread.start()
        thread.join(1.0)
        assert thread.is_alive() and len(books.asked) == 2
        stop.set()
        thread.join(30.0)
        calls.close()
    assert len(ended) == 1 and len(books.asked) == 2


def test_changed_data_is_annotated_again_and_the_last_line_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path / "episodes", 2)
    with annotation_server() as (server, books):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        assert main(arguments(tmp_path)) == 0
        (tmp_path / "episodes" / "part-00000.parquet").unlink()
        with EpisodeWriter(tmp_path / "episodes") as writer:
            writer.write(episode_of(SHORT, "pick up carrot 0", "fake/0"))
            writer.write(replace(episode_of(SHORT, "pick up the carrot 1", "fake/1"), first_step=1))
        assert main(arguments(tmp_path)) == 0
    assert len(books.billed) == 3 and summary_of(tmp_path)["episodes"] == 2
    assert [line["episode_key"] for line in lines_of(tmp_path)].count("fake/1") == 2


def test_a_dry_run_sends_nothing_and_says_what_it_would_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "episodes", 40)
    monkeypatch.delenv("GEMINI_API_KEY")
    assert main([*arguments(tmp_path), "--dry-run"]) == 0 and not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "40 episodes" in said and "USD" in said and "assumed" in said


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "episodes", 1)
    command = arguments(tmp_path)
    with held(tmp_path / "out"):
        assert main(command) == 2 and "another annotate is writing" in capsys.readouterr().err
    assert main([*command, "--model", "gemini-9"]) == 2 and "no price for gemini-9" in capsys.readouterr().err
    assert main([*command, "--concurrency", "0"]) == 2 and "--concurrency 0" in capsys.readouterr().err
    monkeypatch.delenv("GEMINI_API_KEY")
    assert main(command) == 2 and "GEMINI_API_KEY" in capsys.readouterr().err
    assert main(command[:7]) == 2 and "--max-usd" in capsys.readouterr().err
