"""`annotate --annotator gemini --batch` against a server that speaks Google's Batch mode: no episode in two jobs, no
result lost, through faults and kill -9 at every place where it hurts.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from annotation_server import FAULTS, REFUSED_FOR_GOOD, Books, annotation_server, read_log
from test_annotate_gemini import KEY, arguments, dataset, lines_of, run_until_killed, summary_of

from vlm2vla_training.cli import main
from vlm2vla_training.jsonio import read_jsonl

BATCH_INPUT_USD, BATCH_OUTPUT_USD = 0.15, 1.25


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_API_KEY", "GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_CLOUD_PROJECT", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GEMINI_API_KEY", KEY)


def batch_arguments(tmp_path: Path, *more: str, max_usd: str = "50") -> list[str]:
    command = arguments(tmp_path, "--batch", "--poll-s", "0.01", *more, max_usd=max_usd)
    with (tmp_path / "prices.toml").open("a") as file:
        file.write(f"batch_input_usd = {BATCH_INPUT_USD}\nbatch_output_usd = {BATCH_OUTPUT_USD}\n")
    return command


def batch_usd(tokens: list[tuple[int, int, int]]) -> float:
    return sum(p * BATCH_INPUT_USD + (o + t) * BATCH_OUTPUT_USD for p, o, t in tokens) / 1e6


def calls_of(tmp_path: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(tmp_path / "out" / "calls.jsonl"))


class Killer:
    """Kills the run at the n-th time that each of `events` has taken effect, one event a run."""

    def __init__(self, books: Books, *events: tuple[str, int]) -> None:
        self._books = books
        self._events = list(events)
        self._seen: Counter[str] = Counter()

    def __call__(self, event: str) -> bool:
        self._seen[event] += 1
        if not self._events or self._books.victim is None:
            return False
        wanted, count = self._events[0]
        if event == wanted and self._seen[event] >= count:
            self._events.pop(0)
            os.kill(self._books.victim, signal.SIGKILL)
            self._books.victim = None
            return True
        return False


def test_faults_in_jobs_and_kills_around_them_lose_and_double_nothing(tmp_path: Path) -> None:
    keys = dataset(tmp_path / "episodes", 60)
    command = batch_arguments(tmp_path, "--batch-episodes", "20")
    kills = [("upload", 2), ("create", 2), ("look", 4), ("download", 2)]
    with annotation_server(FAULTS) as (server, books):
        server.box.happened = Killer(books, *kills)
        codes = [run_until_killed(command, books, server.url) for _ in range(len(kills) + 1)]
        names = [job.display_name for job in server.box.jobs]
    assert codes == [-9] * len(kills) + [0]
    assert len(names) == len(set(names)), "no job was created twice"
    asked = Counter(log.instruction for log in map(read_log, server.requests) if not log.repair)
    for index in range(60):
        failed_once = FAULTS[index % len(FAULTS)] in ("429", "500")
        assert asked[f"pick up carrot {index}"] == (2 if failed_once else 1), (
            "in one job, and in a second if Google failed"
        )

    lines = lines_of(tmp_path)
    assert Counter(line["episode_key"] for line in lines) == Counter(keys), "each annotated once"
    for line in lines:
        fault = FAULTS[int(line["instruction"].split()[-1]) % len(FAULTS)]
        assert bool(line["audit"]["quarantine"]) == (fault in REFUSED_FOR_GOOD), (fault, line)

    calls = calls_of(tmp_path)
    answered = [call for call in calls if call["event"] == "answered"]
    assert len(answered) == len(books.billed) == len({call["prompt_tokens"] for call in answered})
    cost = summary_of(tmp_path)["cost"]
    assert cost["usd"] == pytest.approx(batch_usd(list(books.billed.values())), abs=1e-6), "half the price, every token"
    assert cost["uncounted"] == 0 and summary_of(tmp_path)["open_jobs"] == 0
    assert not list((tmp_path / "out").glob("job-*"))
    assert KEY not in (tmp_path / "out" / "calls.jsonl").read_text()


def test_requests_inside_a_job_are_those_of_the_interactive_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path / "episodes", 1)
    with annotation_server(["words"]) as (server, _):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        assert main(batch_arguments(tmp_path, "--temperature", "0.5")) == 0
        in_jobs = [request.body for request in server.requests]
        assert main([*arguments(tmp_path, "--temperature", "0.5"), "--out", str(tmp_path / "other")]) == 0
        assert in_jobs == [request.body for request in server.requests[2:]] and len(in_jobs) == 2
        assert len(server.box.jobs) == 2, "a repair goes into a job of its own"
        assert set(server.box.files) == {job.results for job in server.box.jobs}, "what went up is deleted"


def test_an_answer_lost_on_the_line_makes_no_second_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path / "episodes", 3)
    swallowed: list[str] = []

    def swallow(event: str) -> bool:
        swallowed.append(event)
        return event in ("create", "download") and swallowed.count(event) == 1

    with annotation_server() as (server, _):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        server.box.happened = swallow
        assert main(batch_arguments(tmp_path)) == 0
        assert len(server.box.jobs) == 1 and len(server.requests) == 3
    assert len(lines_of(tmp_path)) == 3


@pytest.mark.parametrize("state", ["BATCH_STATE_FAILED", "BATCH_STATE_EXPIRED", "BATCH_STATE_CANCELLED"])
def test_a_job_that_ends_without_results_is_counted_at_its_bound_and_asked_again_by_the_next_run(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path / "episodes", 4)
    with annotation_server() as (server, books):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        server.box.end_as = {0: state}
        assert main(batch_arguments(tmp_path, "--batch-episodes", "2")) == 1
        first = summary_of(tmp_path)
        assert first["episodes"] == 2 and first["left"] == 2 and first["cost"]["uncounted"] == 2
        assert all(state.removeprefix("BATCH_STATE_") in failure["error"] for failure in first["failures"])
        assert main(batch_arguments(tmp_path)) == 0
    assert len(lines_of(tmp_path)) == 4 == len(books.billed)


def test_a_missing_result_is_named_and_the_next_run_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path / "episodes", 3)
    with annotation_server(["good", "lost", "good"]) as (server, _):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        assert main(batch_arguments(tmp_path)) == 1
        assert [failure["episode_key"] for failure in summary_of(tmp_path)["failures"]] == ["fake/1"]
        assert main(batch_arguments(tmp_path)) == 0
    assert len(lines_of(tmp_path)) == 3 and summary_of(tmp_path)["cost"]["uncounted"] == 1


def test_the_limit_in_dollars_holds_for_what_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset(tmp_path / "episodes", 12)
    with annotation_server() as (server, books):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        limited = ["--max-output-tokens", "1000"]
        assert main(batch_arguments(tmp_path, *limited, max_usd="0.004")) == 1
        first = summary_of(tmp_path)
        assert 0 < first["episodes"] < 12 and "--max-usd 0.004" in first["stopped"] and not first["failures"]
        assert first["cost"]["usd"] == pytest.approx(batch_usd(list(books.billed.values())), abs=1e-6)
        assert first["cost"]["usd"] <= 0.004 and len(server.box.jobs) > 1, "what a job left over is spent by the next"
        assert main(batch_arguments(tmp_path, *limited, max_usd="1")) == 0
    assert len(lines_of(tmp_path)) == 12 == len(books.billed)


@pytest.mark.parametrize("fault", ["429", "500"])
def test_a_request_that_fails_in_every_job_is_left_for_another_day(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset(tmp_path / "episodes", 2)
    with annotation_server([fault]) as (server, books):
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        assert main(batch_arguments(tmp_path, "--attempts", "1")) == 1
        assert len(server.box.jobs) == 1 and summary_of(tmp_path)["cost"]["refused"] == 2 and not books.billed
        assert main(batch_arguments(tmp_path, "--attempts", "2")) == 0


def test_jobs_under_way_are_not_asked_about_in_the_other_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset(tmp_path / "episodes", 2)
    command = batch_arguments(tmp_path)
    with annotation_server() as (server, books):
        server.box.happened = Killer(books, ("look", 1))
        assert run_until_killed(command, books, server.url) == -9
        monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", server.url)
        assert main(arguments(tmp_path)) == 2 and "give --batch again" in capsys.readouterr().err
        assert main(batch_arguments(tmp_path)) == 0 and len(server.requests) == 2


def test_without_a_price_for_batch_mode_nothing_is_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(tmp_path / "episodes", 1)
    assert main(arguments(tmp_path, "--batch")) == 2
    assert "batch_input_usd" in capsys.readouterr().err and not (tmp_path / "out").exists()
