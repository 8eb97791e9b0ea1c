"""Trials side by side: the same trials, none lost and none twice, whatever ends the evaluation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from client_fakes import info_body

from vlm2vla_client.errors import AnswerUnusableError, ConfigurationError, ServerUnreachableError
from vlm2vla_client.evaluation import run as run_module
from vlm2vla_client.evaluation.options import EvalOptions
from vlm2vla_client.evaluation.run import run_suite
from vlm2vla_client.evaluation.trial import ANSWER_LIMIT_S, ServerFailedError
from vlm2vla_client.evaluation.trials import Trial, read_trials
from vlm2vla_client.http import ServerConnection
from vlm2vla_client.policies.base import (
    Answered,
    Asked,
    CycleEvent,
    PlanArrived,
    PolicyInfo,
    RowArrived,
    Scenario,
    SubtasksAnswer,
)
from vlm2vla_client.sim import SimRequest
from vlm2vla_schema.types import Frame
from vlm2vla_twin.physics import World

SEED = 500_000
TIMES = ("seconds", "cycle_seconds", "verify_seconds", "finished_utc")


def options(out: Path, **changes: Any) -> EvalOptions:
    plain = EvalOptions(("pick_carrot",), 4, SEED, out, policy="random", verifiers=("none",), parallel=3)
    return replace(plain, **changes)


def content(folder: Path) -> list[dict[str, Any]]:
    """The trials by seed, without what the clock on the wall says."""
    found = sorted(read_trials(folder), key=lambda trial: trial.key)
    return [{name: value for name, value in asdict(trial).items() if name not in TIMES} for trial in found]


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("trial-")]


class Waiting:
    """A policy whose answers come only when all the others of its evaluation have asked too."""

    name = "waiting"

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def info(self) -> PolicyInfo:
        return PolicyInfo(name="waiting", trained_to_act=True)

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        self.barrier.wait(60.0)
        raise AnswerUnusableError("gibberish", code="unparseable_output")

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        raise AssertionError("without subtasks nothing is planned")

    def alive(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        """Nothing to free."""


def test_a_trial_is_the_same_alone_and_in_company(tmp_path: Path) -> None:
    told: list[int] = []
    run_suite(options(tmp_path / "many"), told=lambda trial, done, wanted: told.append(done))
    run_suite(options(tmp_path / "one", parallel=1))
    assert told == [1, 2, 3, 4]
    many = content(tmp_path / "many")
    assert [trial["seed"] for trial in many] == list(range(SEED, SEED + 4))
    assert many == content(tmp_path / "one")
    assert any(trial["rows_executed"] for trial in many)


def test_a_frame_never_grows_old_in_a_trial(tmp_path: Path) -> None:
    run_suite(options(tmp_path, policy="expert", verifiers=("twin",), trials=2, parallel=2))
    for trial in read_trials(tmp_path):
        assert trial.success and trial.retries == 0
        assert not {"stale_frame", "stale_answer"} & trial.refusals.keys()
        assert all(seconds >= 0.0 for seconds in trial.cycle_seconds)


def test_as_many_as_asked_for_run_at_once(tmp_path: Path) -> None:
    barrier = threading.Barrier(3)  # passes only when three trials ask at the same time
    run_suite(options(tmp_path, trials=3), maker=lambda request, world: Waiting(barrier))
    assert [trial.failure for trial in read_trials(tmp_path)] == ["unusable_answer"] * 3


def test_ctrl_c_keeps_what_is_done_and_the_rest_comes_later(tmp_path: Path) -> None:
    def interrupt(trial: Trial, done: int, wanted: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(options(tmp_path, trials=8), told=interrupt)
    assert running() == []
    kept = (tmp_path / "trials.jsonl").read_bytes()
    assert kept.endswith(b"\n") and 1 <= len(read_trials(tmp_path)) < 8
    run_suite(options(tmp_path, trials=8))
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(kept)
    assert sorted(trial.seed for trial in read_trials(tmp_path)) == list(range(SEED, SEED + 8))


def test_a_lost_server_ends_all_and_counts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "RESTART_WAIT_S", 0.0)

    class Lost(Waiting):
        def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
            raise ServerUnreachableError("gone", code="connect")

    def maker(request: SimRequest, world: World) -> Lost:
        return Lost(threading.Barrier(1))

    with pytest.raises(ServerFailedError, match="gone"):
        run_suite(options(tmp_path), maker=maker)
    assert read_trials(tmp_path) == [] and running() == []


def test_recordings_of_trials_at_once_do_not_mix(tmp_path: Path) -> None:
    run_suite(options(tmp_path, trials=3, record=True))
    folders = sorted((tmp_path / "episodes").iterdir())
    assert len(folders) == 3 and all((folder / "summary.json").is_file() for folder in folders)


@pytest.mark.parametrize("parallel", [0, 65])
def test_a_number_of_trials_at_once_that_cannot_be(tmp_path: Path, parallel: int) -> None:
    with pytest.raises(ConfigurationError, match="--parallel"):
        run_suite(options(tmp_path / "out", parallel=parallel))
    assert not (tmp_path / "out").exists()


def test_more_at_once_than_the_server_takes_is_refused(tmp_path: Path) -> None:
    limits = {"max_row_translation_m": 0.1, "max_rows": 32, "max_body_mb": 16.0, "max_concurrency": 2}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=info_body(limits=limits)))
    with pytest.raises(ConfigurationError, match="takes 2 requests at once"):
        run_suite(options(tmp_path / "out", policy="server"), ServerConnection("http://server", transport=transport))
    assert not (tmp_path / "out").exists()


def test_an_answer_may_take_longer_than_an_arm_would_wait(tmp_path: Path) -> None:
    deadlines: list[float] = []

    class Slow(Waiting):
        def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
            return SubtasksAnswer(["Lift Carrot"])

        def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
            deadlines.append(asked.deadline_s)
            yield PlanArrived("Move up.")
            yield RowArrived(0, [0.0, 0.0, 0.01, 1.0], asked.episode_id)
            yield Answered([[0.0, 0.0, 0.01, 1.0]], "Move up.", asked.episode_id)

    run_suite(options(tmp_path, trials=1), maker=lambda request, world: Slow(threading.Barrier(1)))
    (trial,) = read_trials(tmp_path)
    assert set(deadlines) == {ANSWER_LIMIT_S} and trial.rows_executed == trial.cycles >= 1
