"""Evaluations end to end in the twin: counted once, resumable, honest about what physics saw."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from client_fakes import info_body

from vlm2vla_client.errors import AnswerUnusableError, ConfigurationError, RecordingError, ServerUnreachableError
from vlm2vla_client.evaluation import run as run_module
from vlm2vla_client.evaluation.cli import main
from vlm2vla_client.evaluation.comparison import differences
from vlm2vla_client.evaluation.options import GROUPS, EvalOptions, split_of, suites_of
from vlm2vla_client.evaluation.report import write_report
from vlm2vla_client.evaluation.run import rebuild, run_suite
from vlm2vla_client.evaluation.summary import LANGUAGE_GROUP, summarise
from vlm2vla_client.evaluation.trial import ServerFailedError, cycle_seconds, failure_of
from vlm2vla_client.evaluation.trials import Override, Trial, TrialLog, add_override, read_trials
from vlm2vla_client.machine import current_commit
from vlm2vla_client.policies.base import Asked, CycleEvent, PolicyInfo, Scenario, SubtasksAnswer
from vlm2vla_client.sim import SimRequest
from vlm2vla_schema.types import Frame
from vlm2vla_twin.physics import World
from vlm2vla_twin.tasks import SUITES

SEED = 500_000  # a development seed: nothing here may look at test seeds


def options(out: Path, **changes: Any) -> EvalOptions:
    plain = EvalOptions(("pick_carrot",), 1, SEED, out, policy="expert", verifiers=("twin",))
    return replace(plain, **changes)


def made_up(suite: str = "pick_carrot_es", seed: int = SEED, success: bool = False, **changes: Any) -> Trial:
    trial = Trial(
        suite=suite, task=SUITES[suite].instruction(seed), seed=seed, mode="varied", policy="server", model="twin",
        verifier="server", planning=True, score=2 if success else 0, max_score=2, planning_score=2 if success else 0,
        non_planning_score=2 if success else 1, plan_credit=success, success=success, verified=success,
        failure=None if success else "not_lifted", flags={"contact": True, "lifted": success}, outcome="verified",
        message="", cycles=3, seconds=1.0, subtasks=["Move to Carrot"], plans=["Move down."], subtasks_done=1,
        rows_executed=3, rows_changed=0, rows_refused=0, cycle_seconds=[1.0, 2.0], verify_seconds=[0.1],
        retried_cycles=0, retries=0, commit=None, finished_utc="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return replace(trial, **changes)


class FailingPolicy:
    """A policy whose every question ends in the given error."""

    name = "failing"

    def __init__(self, error: Exception, failures: int = 1000) -> None:
        self.error, self.left, self.asked = error, failures, 0

    def info(self) -> PolicyInfo:
        return PolicyInfo(name="failing", trained_to_act=True)

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        self.asked += 1
        if self.left > 0:
            self.left -= 1
            raise self.error
        return SubtasksAnswer(["Lift Carrot"])

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        yield from ()
        raise AnswerUnusableError("never parses", code="unparseable_output")

    def alive(self, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        """Nothing to free."""


def test_the_expert_is_measured_counted_and_continued(tmp_path: Path) -> None:
    told: list[tuple[int, int, int]] = []
    summary = run_suite(options(tmp_path), told=lambda trial, done, wanted: told.append((trial.seed, done, wanted)))
    assert told == [(SEED, 1, 1)]
    suite = summary.suites["pick_carrot"]
    assert (suite.successes, suite.trials, suite.mean_score, suite.failures) == (1, 1, 2.0, {})
    first = (tmp_path / "trials.jsonl").read_bytes()
    line = json.loads(first)
    wanted = {"task", "seed", "policy", "verifier", "score", "max_score", "success", "cycles", "seconds", "failure"}
    assert wanted <= line.keys()
    assert line["task"] == "pick up the carrot" and line["failure"] is None and line["cycles"] <= 12
    assert line["cycles"] == len(line["cycle_seconds"])

    told.clear()
    summary = run_suite(
        options(tmp_path, trials=2), told=lambda trial, done, wanted: told.append((trial.seed, done, wanted))
    )
    assert told == [(SEED + 1, 2, 2)], "only what was missing is run"
    assert (tmp_path / "trials.jsonl").read_bytes().startswith(first)
    stored = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert stored["suites"]["pick_carrot"]["seeds"] == [SEED, SEED + 1]
    assert stored["splits"] == ["development"] and stored["verifier"] == "twin" and stored["policy"] == "expert"
    assert stored["suites"]["pick_carrot"]["wilson_95"]["high"] == 1.0
    assert not (tmp_path / "episodes").exists()

    with pytest.raises(ConfigurationError, match="another policy"):
        run_suite(options(tmp_path, policy="random"))


def test_the_same_seeds_give_the_same_trials(tmp_path: Path) -> None:
    def measured(name: str) -> list[Trial]:
        run_suite(options(tmp_path / name, policy="random", verifiers=("none",), trials=2))
        return read_trials(tmp_path / name)

    for one, two in zip(measured("one"), measured("two"), strict=True):
        assert (one.seed, one.task, one.start, one.plans) == (two.seed, two.task, two.start, two.plans)
        if not {**one.refusals, **two.refusals}:  # a starved computer lets frames grow old: said in the trial's line
            assert (one.score, one.flags, one.rows_executed) == (two.score, two.flags, two.rows_executed)


def test_chance_fails_within_twelve_cycles(tmp_path: Path) -> None:
    run_suite(options(tmp_path, policy="random"))
    (trial,) = read_trials(tmp_path)
    assert not trial.success and trial.failure in ("no_contact", "not_lifted", "safety_stop", "robot")
    assert 1 <= trial.cycles <= 12
    assert not trial.verified


def test_success_is_physics_whatever_the_verifier_says(tmp_path: Path) -> None:
    run_suite(options(tmp_path, verifiers=("none",)))
    (trial,) = read_trials(tmp_path)
    assert trial.outcome == "executed" and not trial.verified
    assert trial.success == all(trial.flags.values())


def test_a_torn_line_is_cut_and_its_trial_run_again(tmp_path: Path) -> None:
    run_suite(options(tmp_path))
    path = tmp_path / "trials.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert len(read_trials(tmp_path)) == 1
    run_suite(options(tmp_path, trials=2))
    assert [trial.seed for trial in read_trials(tmp_path)] == [SEED, SEED + 1]
    path.write_bytes(b"{not json}\n" + whole)
    with pytest.raises(RecordingError, match="line 1"):
        read_trials(tmp_path)


def test_two_evaluations_never_share_a_folder(tmp_path: Path) -> None:
    with TrialLog(tmp_path), pytest.raises(ConfigurationError, match="another evaluation"):
        run_suite(options(tmp_path))


def test_a_lost_server_is_not_a_failed_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "RESTART_WAIT_S", 0.0)
    policy = FailingPolicy(ServerUnreachableError("gone", code="connect"))
    with pytest.raises(ServerFailedError, match="gone") as caught:
        run_suite(options(tmp_path), maker=lambda request, world: policy)
    assert caught.value.exit_code == 4 and policy.asked == 3
    assert read_trials(tmp_path) == []


def test_a_server_that_comes_back_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "RESTART_WAIT_S", 0.0)
    policy = FailingPolicy(ServerUnreachableError("gone", code="connect"), failures=1)
    run_suite(options(tmp_path), maker=lambda request, world: policy)
    (trial,) = read_trials(tmp_path)
    assert trial.retries == 1
    assert trial.cycles == 12 and trial.retried_cycles == 12, "every answer of this policy is unusable"
    assert trial.failure == "no_contact"


def test_an_answer_that_never_parses_is_the_policys_failure(tmp_path: Path) -> None:
    policy = FailingPolicy(AnswerUnusableError("gibberish", code="unparseable_output"))
    run_suite(options(tmp_path), maker=lambda request, world: policy)
    (trial,) = read_trials(tmp_path)
    assert (trial.failure, trial.score, trial.outcome) == ("unusable_answer", 0, "server")


def test_a_policy_of_ones_own_sees_the_world_only_through_its_maker(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    def maker(request: SimRequest, world: World) -> FailingPolicy:
        seen.append((request.task, world.spec.seed))
        return FailingPolicy(AnswerUnusableError("x", code="unparseable_output"))

    run_suite(options(tmp_path, suites=("pick_above_picture",)), maker=maker)
    assert seen == [(SUITES["pick_above_picture"].instruction(SEED), SEED)]


def test_recordings_are_kept_when_asked_for(tmp_path: Path) -> None:
    run_suite(options(tmp_path, record=True))
    (episode,) = (tmp_path / "episodes").iterdir()
    assert (episode / "events.jsonl").is_file() and (episode / "summary.json").is_file()
    assert list((episode / "frames").glob("*.jpg"))
    (trial,) = read_trials(tmp_path)
    assert len(trial.cycle_seconds) == trial.cycles


# --- figures ----------------------------------------------------------------------------------------------------------


def test_languages_are_averaged_and_failures_counted() -> None:
    trials = [made_up(f"pick_carrot_{code}", SEED + n, n % 3 == 0) for code in ("es", "zh", "hi") for n in range(30)]
    summary = summarise(trials, {})
    together = summary.suites[LANGUAGE_GROUP]
    assert (together.trials, together.successes) == (90, 30)
    assert together.failures == {"not_lifted": 60}
    assert together.plans_judged == 90 and together.plans_right == 30
    assert list(summary.suites) == ["pick_carrot_es", "pick_carrot_zh", "pick_carrot_hi", LANGUAGE_GROUP]
    assert summary.cycle_s is not None and summary.cycle_s.n == 180 and summary.cycle_s.median == 1.5


def test_a_persons_verdict_replaces_the_keywords_and_is_kept_apart(tmp_path: Path) -> None:
    with TrialLog(tmp_path) as log:
        log.append(made_up())
    before = (tmp_path / "trials.jsonl").read_bytes()
    assert rebuild(tmp_path)[0].suites["pick_carrot_es"].mean_score == 0.0
    add_override(tmp_path, Override("pick_carrot_es", SEED, True, "a reader", "said 'the orange one' in Spanish"))
    summary, trials = rebuild(tmp_path)
    assert summary.suites["pick_carrot_es"].mean_score == 1.0 and summary.overrides == 1
    assert trials[0].plan_credit is True and not trials[0].success
    assert (tmp_path / "trials.jsonl").read_bytes() == before
    with pytest.raises(ConfigurationError, match="no trial"):
        add_override(tmp_path, Override("pick_carrot_es", SEED + 1, True, "a reader", "typo"))


def test_the_report_is_one_file_and_obeys_nobody(tmp_path: Path) -> None:
    hostile = "</td><script>alert(1)</script>\x1b[2J"
    trials = [made_up(subtasks=[hostile], message=hostile, task=hostile), made_up(seed=SEED + 1, success=True)]
    page = write_report(tmp_path, summarise(trials, {"engine": hostile}), trials).read_text(encoding="utf-8")
    assert "<script" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert page.count("data:image/svg+xml;base64,") == 3


def test_differences_pair_the_same_trials_only() -> None:
    first = [made_up(seed=SEED + n, success=False) for n in range(20)]
    other = [made_up(seed=SEED + n, success=True) for n in range(10, 40)]
    found = differences(first, other)["pick_carrot_es"]
    assert (found.n, found.difference) == (10, 1.0)
    assert differences(first, [replace(trial, mode="paper") for trial in other]) == {}


@pytest.mark.parametrize(
    ("flags", "outcome", "expected"),
    [
        ({"contact": False, "lifted": False}, "not_completed", "no_contact"),
        ({"contact": True, "lifted": False}, "verified", "not_lifted"),
        ({"contact_carrot": True, "grasped_carrot": False, "placed_carrot": False}, "verified", "not_grasped_carrot"),
        ({"contact": True, "lifted": False}, "safety_stop", "safety_stop"),
        ({"contact": True, "lifted": False}, "server", "unusable_answer"),
        ({"placed_eggplant": True, "toward_fish": False}, "not_completed", "not_toward_fish"),
    ],
)
def test_a_failure_is_named_by_the_first_missing_stage(flags: dict[str, bool], outcome: str, expected: str) -> None:
    assert failure_of(False, flags, outcome) == expected
    assert failure_of(True, flags, outcome) is None


def test_cycles_are_timed_with_their_failures_and_retries() -> None:
    answered = {"event": "answer", "t_s": 3.0, "seconds": 0.0}  # a trial's own clock stands still meanwhile
    events = [
        {"event": "request", "stage": "subtasks", "t_s": 0.0},
        {"event": "request", "stage": "cycle", "t_s": 1.0},
        {**answered, "answer": {"attempts": 2, "stages": {"motion_plan": {"attempts": 1}, "actions": {"attempts": 1}}}},
        {"event": "request", "stage": "cycle", "t_s": 4.0},
        {"event": "error", "where": "cycle", "t_s": 4.5},
        {"event": "request", "stage": "cycle", "t_s": 5.0},
        {**answered, "t_s": 7.0, "answer": {"stages": {"motion_plan": {"attempts": 1}, "actions": {"attempts": 3}}}},
    ]
    assert cycle_seconds(events) == ([2.0, 0.5, 2.0], 2)


# --- command line -----------------------------------------------------------------------------------------------------


def test_eval_and_compare_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--suite", "pick_carrot", "--trials", "1", "--seed", str(SEED), "--sim"]
    for policy in ("expert", "random"):
        out = str(tmp_path / policy)
        assert main([*common, "--policy", policy, "--verifier", "twin", "--out", out]) == 0
    printed = capsys.readouterr()
    assert "pick_carrot: 1/1 = 100.0 %" in printed.out and f"1/1 pick_carrot {SEED}: 2/2 success" in printed.err
    page = tmp_path / "compare.html"
    assert main(["compare", str(tmp_path / "expert"), str(tmp_path / "random"), "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "expert" in text and "-100.0 points" in text
    assert "p at any time" not in text
    folders = [str(tmp_path / policy) for policy in ("expert", "random")]
    assert main(["compare", *folders, "--out", str(page), "--sequential"]) == 0
    assert "p at any time" in page.read_text(encoding="utf-8")
    with pytest.raises(ConfigurationError, match="distinct"):
        main(["compare", str(tmp_path / "expert"), str(tmp_path / "expert"), "--out", str(page)])
    assert main(["report", str(tmp_path / "expert")]) == 0
    with pytest.raises(ConfigurationError, match="no trials"):
        main(["report", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--suite", "nonsense"],
        ["--suite", "pick_carrot", "--trials", "0"],
        ["--suite", "pick_carrot", "--seed", "-1"],
        ["--suite", "pick_carrot", "--verifier", "gemini"],
        ["--suite", "pick_carrot", "--policy", "expert", "--verifier", "twin", "--trials", "-3"],
    ],
)
def test_wrong_usage_is_refused_before_anything_is_written(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(ConfigurationError):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_without_a_server_nothing_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="--server"):
        run_suite(options(tmp_path / "out", policy="server"))
    out = tmp_path / "out"
    with pytest.raises(ServerUnreachableError):
        main(["--suite", "pick_carrot", "--server", "http://127.0.0.1:9", "--out", str(out)])
    assert not out.exists()


def test_suites_by_name_group_and_list() -> None:
    assert suites_of("all") == tuple(SUITES)
    assert suites_of("pick_carrot, languages,pick_carrot_es") == ("pick_carrot", *GROUPS["languages"])
    assert suites_of("in_distribution") == ("pick_carrot", "carrot_on_plate")
    assert [split_of(seed) for seed in (0, 499_999, 500_000, 999_999, 1_000_000)] == [
        "training", "training", "development", "development", "test",
    ]  # fmt: skip


def test_the_commit_is_named_where_there_is_one() -> None:
    commit = current_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}\+?", commit)


def test_the_models_hash_is_written_and_guards_the_folder(tmp_path: Path) -> None:
    import httpx

    from vlm2vla_client.evaluation.run import server_facts
    from vlm2vla_client.http import ServerConnection

    def connection(**changes: Any) -> ServerConnection:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, json=info_body(**changes)))
        return ServerConnection("http://server", transport=transport)

    facts = server_facts(connection(), None)
    assert (facts["model"], facts["hash"], facts["stages"]) == ("twin", "abc", ["subtasks", "motion_plan", "actions"])
    policy = FailingPolicy(AnswerUnusableError("x", code="unparseable_output"))
    served = options(tmp_path, policy="server")
    summary = run_suite(served, connection(), maker=lambda request, world: policy)
    assert summary.server["hash"] == "abc"
    other = info_body()
    other["adapters"][0]["hash"] = "def"
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=other))
    with pytest.raises(ConfigurationError, match="another hash"):
        run_suite(served, ServerConnection("http://server", transport=transport))
