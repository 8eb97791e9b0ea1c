"""Episodes in the twin that other people's policies drive, over the wire formats of their own libraries."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import json_numpy
import numpy as np
import pytest
from baseline_servers import Answers, Script, act_server, ecot, molmoact, openpi_server, openvla
from client_fakes import asked, make_frame

from vlm2vla_client.cli import main
from vlm2vla_client.errors import (
    AnswerUnusableError,
    ConfigurationError,
    EngineFailedError,
    PolicyError,
    ProtocolMismatchError,
    RequestRefusedError,
    ServerUnreachableError,
)
from vlm2vla_client.evaluation.options import EvalOptions
from vlm2vla_client.evaluation.trial import run_trial
from vlm2vla_client.evaluation.trials import Trial
from vlm2vla_client.policies.act import read_answer
from vlm2vla_client.policies.base import Answered
from vlm2vla_client.policies.baseline import ROWS_PER_VERDICT, bridge_rows, bridge_state
from vlm2vla_client.policies.baselines import BASELINES, open_baseline
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import RecordedEpisode, read_episode
from vlm2vla_client.replay import replay_in_twin
from vlm2vla_client.safety_types import RobotState
from vlm2vla_client.scenes import choose_scene
from vlm2vla_client.sim import SimRequest, run_in_twin
from vlm2vla_twin.kinematics import DOWN

TASK, SEED = "pick up the carrot", 500_021
PER_ANSWER = {"openvla": 1, "ecot": 1, "molmoact": 8, "openpi": 10}


@pytest.fixture(scope="module")
def expert_rows(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """What picks the carrot up, as Bridge's rows of seven numbers."""
    folder = tmp_path_factory.mktemp("expert") / "episode"
    request = SimRequest(task=TASK, choice=choose_scene(TASK, None, SEED), policy="expert", verifiers=("twin",))
    assert run_in_twin(request, folder, SilentProgress()).success
    return [[*event["action"]] for event in read_episode(folder).of("step")]


@contextlib.contextmanager
def server(name: str, script: Script) -> Iterator[str]:
    """The peer of a policy."""
    if name == "openpi":
        with openpi_server(lambda observation: {"actions": script(observation)}) as url:
            yield url
        return
    forms: dict[str, Callable[[Script], Answers]] = {"openvla": openvla, "ecot": ecot, "molmoact": molmoact}
    with act_server(forms[name](script)) as url:
        yield url


def spread(rows: list[list[float]], per_answer: int) -> list[list[float]]:
    """The rows in answers of which only the first few are executed: the rest must never move the arm."""
    if per_answer == 1:
        return rows
    wrong = [[0.09, 0.09, 0.09, 0.0, 0.0, 0.0, 1.0]] * (per_answer - ROWS_PER_VERDICT)
    rest = [[0.0] * 7] * (-len(rows) % ROWS_PER_VERDICT)
    whole = [*rows, *rest]
    chunks = [whole[at : at + ROWS_PER_VERDICT] for at in range(0, len(whole), ROWS_PER_VERDICT)]
    return [row for chunk in chunks for row in [*chunk, *wrong]]


T = TypeVar("T")
STARVED = ("stale_frame", "stale_answer", "s old (limit", "no sign of life")


def patiently(attempt: Callable[[Path], tuple[T, RecordedEpisode]], folder: Path) -> T:
    """The attempt's outcome; made again, twice at most, when a starved computer let pictures or answers grow old: the
    peers here read out a list and cannot see that a step of it was not made."""
    for number in range(3):
        outcome, episode = attempt(folder / str(number))
        if not any(words in (episode.folder / "events.jsonl").read_text() for words in STARVED):
            break
    return outcome


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_picks_the_carrot_up_behind_the_same_loop(
    name: str,
    expert_rows: list[list[float]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def attempt(folder: Path) -> tuple[tuple[int, dict[str, Any], Script, RecordedEpisode], RecordedEpisode]:
        script = Script(spread(expert_rows, PER_ANSWER[name]), PER_ANSWER[name])
        with server(name, script) as url:
            given = ["run", "--sim", "--task", TASK, "--seed", str(SEED), "--verifier", "twin", "--policy", name]
            code = main([*given, "--policy-server", url, "--record", str(folder), "--json"])
        result = json.loads(capsys.readouterr().out)
        episode = read_episode(Path(result["folder"]))
        return (code, result, script, episode), episode

    code, result, script, episode = patiently(attempt, tmp_path)
    assert (code, result["outcome"], result["success"]) == (0, "verified", True), result
    check_what_was_asked(name, script)
    assert all(len(event["row"]) == 7 for event in episode.of("row"))
    words = ["TASK: Pick up the carrot. PLAN: reach, grasp, lift."] if name == "ecot" else []
    assert result["plans"] == words * len(script.asked)
    asked_for = ROWS_PER_VERDICT if PER_ANSWER[name] == 1 else 1
    assert len(script.asked) == len(episode.of("verdict")) * asked_for
    first = episode.of("request")[(len(episode.of("verdict")) - 1) * asked_for]
    assert episode.of("verdict")[-1]["before"] == first["frame"]
    assert "roll rad" in (episode.folder / "view.html").read_text()


def check_what_was_asked(name: str, script: Script) -> None:
    """The peer's own library decoded a picture, the words and, where it asks for one, the pose."""
    one = script.asked[0]
    image = one["observation/image" if name == "openpi" else "image"]
    side = 256 if name == "molmoact" else 224
    assert image.dtype == np.uint8 and image.shape == (side, side, 3) and image.std() > 10
    assert one["prompt" if name == "openpi" else "instruction"] == TASK
    if name in ("openvla", "ecot"):
        assert one["unnorm_key"] == "bridge_orig" and one["prompt"].startswith("In: What action")
    else:
        state = one["observation/state" if name == "openpi" else "state"]
        assert state.dtype == np.float32 and state.shape == (7,)
        assert np.abs(state[3:6]).max() < 0.05 and state[6] > 0.5  # straight down and open


def test_a_replay_keeps_the_pace_of_the_verdicts(expert_rows: list[list[float]], tmp_path: Path) -> None:
    def attempt(folder: Path) -> tuple[RecordedEpisode, RecordedEpisode]:
        with server("openvla", Script(expert_rows)) as url:
            old = run("openvla", url, folder)
        return old, old

    old = patiently(attempt, tmp_path)
    outcome = patiently(
        lambda folder: (new := replay_in_twin(old.folder, folder, SilentProgress()), read_episode(new.folder)),
        tmp_path / "replay",
    )
    assert outcome.result.success and outcome.same_decisions
    assert outcome.largest_gap_m is not None and outcome.largest_gap_m < 0.005


def run(name: str, url: str, folder: Path, **changes: Any) -> RecordedEpisode:
    choice = choose_scene(TASK, None, SEED)
    given = {"verifiers": ("twin",), "animate": False, **changes}
    run_in_twin(SimRequest(task=TASK, choice=choice, policy=name, policy_server=url, **given), folder, SilentProgress())
    return read_episode(folder)


def test_a_turn_is_made_about_the_gripper_in_the_base_frame(tmp_path: Path) -> None:
    rows = [[0.0, 0.0, 0.02, 0.0, 0.0, 0.2, 1.0], [0.02, 0.0, 0.0, 0.0, 0.1, 0.0, 1.0], *[[0.0] * 6 + [1.0]] * 6]
    script = Script(rows, PER_ANSWER["molmoact"])
    with server("molmoact", script) as url:
        episode = run("molmoact", url, tmp_path / "turn", max_cycles=2)
    assert {event["verdict"] for event in episode.of("decision")} == {"pass"}
    before, after = (np.array(payload["state"], dtype=np.float64) for payload in script.asked[:2])
    assert np.abs(after - before - [0.02, 0.0, 0.02, 0.0, 0.1, 0.2, 0.0])[[0, 1, 2, 5]].max() < 0.01
    # Pitch is about the base's y, after the yaw: seen from the turned gripper it is not pitch alone.
    assert after[4] - before[4] == pytest.approx(0.1, abs=0.01) and abs(after[3] - before[3]) < 0.03


def test_without_a_checking_verifier_it_goes_on_to_the_end(tmp_path: Path) -> None:
    script = Script([])
    with server("openvla", script) as url:
        episode = run("openvla", url, tmp_path / "none", verifiers=("none",), max_cycles=2)
    assert episode.summary is not None and episode.summary["outcome"] == "not_completed"
    assert len(script.asked) == 2 * ROWS_PER_VERDICT and not episode.of("verdict")


def test_what_the_filter_refuses_does_not_move(tmp_path: Path) -> None:
    with server("openvla", Script([[0.3, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]] * 9)) as url:
        episode = run("openvla", url, tmp_path / "far")
    assert {reason for event in episode.of("decision") for reason in event["reasons"]} == {"axis_far_over_limit"}
    assert episode.summary is not None and (episode.summary["outcome"], episode.summary["rows_executed"]) == (
        "safety_stop",
        0,
    )


@pytest.mark.parametrize(("name", "planning"), [("openvla", False), ("ecot", True)])
def test_a_trial_of_eval_is_scored_as_its_kind_of_policy(
    name: str, planning: bool, expert_rows: list[list[float]], tmp_path: Path
) -> None:
    def attempt(folder: Path) -> tuple[Trial, RecordedEpisode]:
        with server(name, Script(expert_rows)) as url:
            options = EvalOptions(
                ("pick_carrot",), 1, SEED, folder, name, ("twin",), policy_server=url, record=True
            )
            trial = run_trial(options, "pick_carrot", SEED, None)
        return trial, read_episode(next((folder / "episodes").iterdir()))

    trial = patiently(attempt, tmp_path)
    assert (trial.success, trial.planning, trial.model) == (True, planning, name)


NAN = [0.0, 0.0, math.nan, 0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("status", "body", "error", "code"),
    [
        (200, b'"error"', EngineFailedError, "peer_failed"),
        (200, b'{"error": "inference failed"}', EngineFailedError, "peer_failed"),
        (500, b'{"detail": "Server error"}', EngineFailedError, "http_500"),
        (400, b'{"error": "missing"}', RequestRefusedError, "http_400"),
        (200, b"<html>", ProtocolMismatchError, "bad_json"),
        (200, b'"' + b"[" * 9999 + b'"', ProtocolMismatchError, "bad_json"),
        (200, b"null", ProtocolMismatchError, "bad_answer"),
        (200, b"[1, 2, 3]", ProtocolMismatchError, "bad_shape"),
        (200, b"[[1, 2], [3]]", ProtocolMismatchError, "bad_shape"),
        (200, b'[1, 2, 3, 4, 5, 6, "7"]', ProtocolMismatchError, "bad_shape"),
        (200, b"[1, 2, 3, 4, 5, 6, true]", ProtocolMismatchError, "bad_shape"),
        (200, b"[1, 2, 3, 4, 5, 6, 1" + b"0" * 400 + b"]", ProtocolMismatchError, "bad_answer"),
        (200, json_numpy.dumps(np.zeros(8)).encode(), ProtocolMismatchError, "bad_shape"),
        (200, json_numpy.dumps(np.zeros((0, 7))).encode(), ProtocolMismatchError, "bad_shape"),
        (200, json_numpy.dumps(np.zeros((300, 7))).encode(), ProtocolMismatchError, "bad_answer"),
        (200, json_numpy.dumps(np.array(["a"])).encode(), ProtocolMismatchError, "bad_answer"),
        (200, json_numpy.dumps({"action": np.zeros(7), "reasoning": 3}).encode(), ProtocolMismatchError, "bad_answer"),
        (200, json_numpy.dumps(np.array(NAN)).encode(), AnswerUnusableError, "not_finite"),
        (200, b"[NaN, 0, 0, 0, 0, 0, 1]", AnswerUnusableError, "not_finite"),
        (200, b"x" * (5 << 20), ProtocolMismatchError, "too_large"),
    ],
)
def test_a_bad_answer_of_act_is_a_typed_error(status: int, body: bytes, error: type[PolicyError], code: str) -> None:
    with act_server(lambda _: (status, body)) as url:
        policy = open_baseline("openvla", url)
        with pytest.raises(error) as raised:
            list(policy.cycle(make_frame(), TASK, asked()))
        assert raised.value.code == code
        policy.close()


def test_every_good_form_of_an_answer_is_read() -> None:
    action = np.array([0.01, -0.02, 0.03, 0.1, 0.0, -0.1, 0.996])
    array = json_numpy.dumps(action)
    forms = (array, json.dumps(array), json.dumps(action.tolist()), f'{{"action": {array}}}', f'[{array}, "TASK: x"]')
    for body in forms:
        assert np.array_equal(read_answer(body.encode()).actions, action), body
    assert read_answer(f'{{"action": {array}, "reasoning": "PLAN: lift"}}'.encode()).reasoning == "PLAN: lift"
    assert bridge_rows(action) == [[0.01, -0.02, 0.03, 0.1, 0.0, -0.1, 1.0]]
    assert bridge_rows(np.array([[0, 0, 0, 0, 0, 0, 0.5]]))[0][6] == 0.0


def test_a_pose_is_the_turn_away_from_straight_down() -> None:
    yaw = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    state = RobotState([0.3, 0.1, 0.2], yaw @ DOWN, np.zeros((2, 3)), np.zeros(6), 0.4, 0.0)
    assert bridge_state(state) == pytest.approx([0.3, 0.1, 0.2, 0.0, 0.0, math.pi / 2, 0.4], abs=1e-6)


def test_openpi_failures_are_typed_and_the_next_question_gets_a_new_connection() -> None:
    wrong = [RuntimeError("no such key"), {"state": 1}, {"actions": np.zeros((2, 8))}]
    replies: list[Any] = [*wrong, "late", np.zeros((1, 7))]

    def infer(_: dict[str, Any]) -> dict[str, Any]:
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, str):
            time.sleep(0.6)
            return {"actions": np.ones((1, 7))}
        return reply if isinstance(reply, dict) else {"actions": reply}

    with openpi_server(infer) as url:
        policy = open_baseline("openpi", url)
        assert policy.info().details["metadata"] == "{'model': 'pi05'}" and policy.alive(2.0)
        with pytest.raises(EngineFailedError, match="RuntimeError: no such key"):
            list(policy.cycle(make_frame(), TASK, asked()))
        assert not policy.alive(0.1)
        with pytest.raises(ProtocolMismatchError, match="actions"):
            list(policy.cycle(make_frame(), TASK, asked()))
        with pytest.raises(ProtocolMismatchError, match="shape"):
            list(policy.cycle(make_frame(), TASK, asked()))
        with pytest.raises(ServerUnreachableError, match="no answer within"):
            list(policy.cycle(make_frame(), TASK, asked(deadline_s=0.2)))
        *_, last = policy.cycle(make_frame(), TASK, asked())
        assert isinstance(last, Answered) and last.rows == [[0.0] * 7]  # not the late answer
        policy.close()


def test_nobody_there_and_wrong_addresses() -> None:
    for name, url in (("openvla", "http://127.0.0.1:9"), ("openpi", "ws://127.0.0.1:9")):
        policy = open_baseline(name, url)
        with pytest.raises(ServerUnreachableError, match="nobody answers"):
            policy.info()
        assert not policy.alive(0.5)
    for name, wrong in (("openvla", "ws://x:1"), ("openpi", "http://x:1"), ("ecot", None), ("octo", "http://x:1")):
        with pytest.raises(ConfigurationError):
            open_baseline(name, wrong)
