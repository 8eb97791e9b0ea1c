"""``teleop``: one key one row, through the filter; what holds; and whole sessions on the twin and the arm's double."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from arm_bench import STARVED, patiently
from client_fakes import WallCamera
from operator_terminal import Seat
from robot_fakes import ClosingRecorder, FakeArm, ManualClock, limits
from test_operator_keys import ScriptedKeys
from test_physical_run import Desk

from vlm2vla_client import teleop
from vlm2vla_client.cli import main
from vlm2vla_client.errors import RobotError, SafetyStop
from vlm2vla_client.keys import Keys
from vlm2vla_client.operator_arm import OperatorArm
from vlm2vla_client.recorder import read_episode
from vlm2vla_client.teleop import Driving, OneKey
from vlm2vla_client.view import render


class Session:
    """An ideal arm, scripted keys, and what was said."""

    def __init__(self, folder: Path, waits: str, looks: dict[int, str] | None = None, turns: bool = True,
                 at: tuple[float, float, float] = (0.30, 0.0, 0.15)) -> None:  # fmt: skip
        clock = ManualClock()
        self.robot, self.said = FakeArm(clock, at), list[str]()
        self.keys = ScriptedKeys(looks or {}, waits)
        stop = OneKey(self.keys)
        self.arm = OperatorArm(self.robot, clock, limits(), ClosingRecorder(folder / "r"), 0.2, stop)
        self.driving = Driving(self.arm, self.keys, stop, self.said.append, 0.01, turns)


def test_each_key_is_one_row_and_the_verdict_is_the_persons(tmp_path: Path) -> None:
    session = Session(tmp_path, "ffblu,gqy")
    assert session.driving.follow() is True
    assert session.arm.position() == pytest.approx([0.31, 0.01, 0.16], abs=1e-3)
    assert session.robot.grips == [False] and not session.robot.holds
    assert Session(tmp_path / "2", "qn").driving.follow() is False


def test_a_key_that_means_nothing_explains_and_moves_nothing(tmp_path: Path) -> None:
    session = Session(tmp_path, "x Qqn")
    session.driving.follow()
    assert session.said.count(teleop.HELP) == 3 and not session.robot.commands


@pytest.mark.parametrize(("pressed", "held"), [("ffff", False), (" ", True), ("x", True), ("fq", True)])
def test_repeats_of_the_moving_key_are_its_own_and_every_other_key_holds(
    tmp_path: Path, pressed: str, held: bool
) -> None:
    session = Session(tmp_path, "fqn", {3: pressed})
    session.driving.follow()
    assert bool(session.robot.holds) is held and ("  held" in session.said) is held
    assert session.keys.entered == 0


def test_a_held_key_stops_within_one_step_of_its_release(tmp_path: Path) -> None:
    """Repeats that came while a step ran are dropped: nothing is left to move the arm once the hand is off."""
    session = Session(tmp_path, "fqn", {2: "f", 3: "fff", 4: "ffffff"})
    session.driving.follow()
    assert session.arm.position() == pytest.approx([0.31, 0.0, 0.15], abs=1e-3)


def test_what_the_filter_refuses_or_cuts_is_said_and_the_session_goes_on(tmp_path: Path) -> None:
    session = Session(tmp_path, "dddu" + "qy", at=(0.30, 0.0, 0.012))
    assert session.driving.follow() is True
    assert session.arm.position()[2] == pytest.approx(0.013, abs=1e-3), "cut 3 mm above the counter, then 1 cm up"
    told = [line for line in session.said if line.startswith("  d  at (+0.300, +0.000, +0.003) m, open  (counter_")]
    assert len(told) == 3
    outside = Session(tmp_path / "2", "fqn", at=(0.449, 0.0, 0.05))
    outside.driving.follow()
    assert outside.arm.position()[0] == pytest.approx(0.45, abs=1e-3)


def test_a_backend_that_cannot_turn_says_so_and_an_arm_that_is_stuck_ends_it(tmp_path: Path) -> None:
    session = Session(tmp_path, ",.qn", turns=False)
    session.driving.follow()
    assert session.said.count("  this arm's backend does not turn") == 2 and not session.robot.commands
    stuck = Session(tmp_path / "2", "ffqn")
    stuck.robot.stuck = True
    with pytest.raises(RobotError, match="did not arrive"):
        stuck.driving.follow()
    assert stuck.robot.holds
    with pytest.raises(SafetyStop, match="no key for 600 s"):
        Session(tmp_path / "3", "-").driving.follow()


def test_a_session_at_a_terminal_is_an_episode_of_the_twin(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    arguments = ["teleop", "--sim", "--task", "pick up the carrot", "--seed", "17", "--record", str(runs)]
    with Seat(arguments, {"XDG_CONFIG_HOME": str(tmp_path)}) as seat:
        seat.wait_for("q ends")
        seat.press("f")
        end = seat.wait_for("  f  at (")
        seat.press("d")
        end = seat.wait_for("  d  at (", after=end)
        seat.press("q")
        seat.wait_for("did it succeed?", after=end)
        seat.press("y")
        assert seat.wait() == 0 and seat.mode == seat.before, seat.screen
        assert "2 rows, success; the arm holds" in seat.screen
    (folder,) = runs.iterdir()
    episode = read_episode(folder)
    assert episode.task == "pick up the carrot" and episode.summary is not None and episode.summary["success"] is True
    assert episode.header["config"]["seed"] == 17 and episode.header["config"]["policy"] == "teleop"
    steps = episode.of("step")
    assert [step["action"] for step in steps] == [[0.01, 0, 0, 0, 0, 0, 1], [0, 0, -0.01, 0, 0, 0, 1]]
    assert all(episode.frame_path(step["frame"]).is_file() for step in steps)
    assert episode.events[-1]["event"] == "end" and "pick up the carrot" in render(episode)


def test_ctrl_c_holds_and_the_recording_has_an_end(tmp_path: Path) -> None:
    arguments = ["teleop", "--sim", "--task", "t", "--scene", "kitchen", "--record", str(tmp_path / "runs")]
    with Seat(arguments, {"XDG_CONFIG_HOME": str(tmp_path)}) as seat:
        seat.wait_for("q ends")
        seat.press("\x03")
        assert seat.wait() == 130 and seat.mode == seat.before
    (folder,) = (tmp_path / "runs").iterdir()
    assert [event["event"] for event in read_episode(folder).events[-2:]] == ["hold", "end"]


def drive(desk: Desk, keys: Keys, *arguments: str) -> int:
    desk.monkeypatch.setattr(teleop, "require_terminal", lambda what: keys)
    desk.monkeypatch.setattr(teleop, "open_camera", lambda *_: WallCamera())
    code = main(["teleop", "--task", "open the pot", "--record", str(desk.folder / "runs"), *arguments])
    if code == 7 and any(words in desk.events()[-1]["message"] for words in STARVED):
        raise RobotError(desk.events()[-1]["message"])
    return code


@patiently
def test_the_arms_double_follows_the_keys_and_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch)
    desk.commission()
    assert drive(desk, ScriptedKeys({}, "fuqy"), "--speed", "0.5", "--step-m", "0.02") == 0
    steps = [event for event in desk.events() if event["event"] == "step"]
    assert [step["action"][:3] for step in steps] == [[0.02, 0, 0], [0, 0, 0.02]]
    assert steps[1]["state"][0] - steps[0]["state"][0] == pytest.approx(0.02, abs=0.006)
    assert not desk.bench.logged("torque") and not desk.bench.logged("gripper"), "the grip is left alone"


@patiently
def test_an_arm_that_was_never_commissioned_takes_small_slow_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(tmp_path, monkeypatch)
    assert drive(desk, ScriptedKeys({}, "fqn"), "--speed", "1", "--step-m", "0.05") == 0
    assert "never commissioned: --speed 0.1 --step-m 0.01 apply" in capsys.readouterr().err
    (step,) = [event for event in desk.events() if event["event"] == "step"]
    durations = [event["duration_s"] for event in desk.events() if event["event"] == "substep"]
    assert step["action"][0] == 0.01 and sum(durations) >= 0.01 / (0.25 * 0.1) - 1e-6


def test_what_cannot_be_is_refused_before_anything_is_connected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    desk = Desk(tmp_path, monkeypatch)
    refused: list[tuple[list[str], str]] = [
        (["--camera", "images", "--camera-file", str(tmp_path)], "needs a camera that sees its bench now"),
        (["--camera", "twin"], "needs a camera that sees its bench now"),
        (["--task", "  "], "--task must be"),
    ]
    for arguments, words in refused:
        assert drive(desk, ScriptedKeys({}), *arguments) == 2
        assert words in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["teleop", "--sim", "--task", "t"]) == 2
    assert "needs an operator's keys" in capsys.readouterr().err
    assert not desk.bench.log_file.exists() and not (tmp_path / "runs").exists()


def test_it_may_be_watched_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class View:
        def event(self, line: dict[str, Any]) -> None:
            told.append(line["event"])

        def picture(self, jpeg: bytes, t_s: float) -> None:
            told.append("picture")

        def close(self) -> None:
            told.append("closed")

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(teleop, "require_terminal", lambda what: ScriptedKeys({}, "fqn"))
    monkeypatch.setattr(teleop, "open_live", lambda where: View())
    assert main(["teleop", "--sim", "--task", "t", "--scene", "kitchen", "--record", str(tmp_path), "--rerun"]) == 0
    assert told[0] == "episode" and told[-1] == "closed" and {"step", "picture", "decision"} <= set(told)
    (summary,) = tmp_path.glob("*/summary.json")
    assert json.loads(summary.read_text())["success"] is False
