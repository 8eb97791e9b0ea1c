"""``doctor --commission``: what passes, what each no and each wrong measurement stops, when the record is written."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm_bench import STARVED, patiently
from operator_terminal import Seat
from robot_fakes import ClosingRecorder, FakeArm, ManualClock, limits
from test_physical_run import Desk

from vlm2vla_client.cli import main
from vlm2vla_client.commission import MeasuredStop, Walk
from vlm2vla_client.commissioning import STEPS, is_commissioned, record_path
from vlm2vla_client.errors import ClientError, NotCompletedError, RobotError
from vlm2vla_client.operator_arm import OperatorArm, OperatorHeld
from vlm2vla_client.robots.base import RobotCapabilities
from vlm2vla_client.robots.replay import ReplayRobot


class PhysicalFake(FakeArm):
    """An ideal arm that says it is physical; its fingers can meet an object."""

    object_at: float | None = None

    @property
    def capabilities(self) -> RobotCapabilities:
        return RobotCapabilities("fake", physical=True, arrival_tolerance_m=0.010)

    def _opening(self, now_s: float) -> float:
        return max(super()._opening(now_s), self.object_at or 0.0)


class Person:
    """Answers by what is asked: Enter to every 'Enter', ``answers`` to the questions that hold its words, else y.

    Presses SPACE at the n-th look while the arm moves sideways.
    """

    def __init__(self, robot: PhysicalFake, answers: dict[str, str] | None = None, press_at: int | None = 8) -> None:
        self._robot, self._answers, self._press_at = robot, answers or {}, press_at
        self.said: list[str] = []
        self._looks: int | None = None

    def say(self, line: str) -> None:
        self.said.append(line)
        if "on its way" in line:
            self._looks = 0
        if "stand something soft" in line:
            self._robot.object_at = 0.5

    def __enter__(self) -> Person:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def pending(self) -> str:
        if self._looks is not None and self._press_at is not None:
            self._looks += 1
            if self._looks == self._press_at:
                self._looks = None
                return " "
        return ""

    def wait(self, timeout_s: float) -> str | None:
        last = self.said[-1]
        if "Enter" in last:
            return "\r"
        return next((key for words, key in self._answers.items() if words in last), "y")


class Bench:
    """A commissioning of an ideal arm."""

    def __init__(self, folder: Path, robot: type[PhysicalFake] = PhysicalFake, **person: Any) -> None:
        self.clock = ManualClock()
        self.robot = robot(self.clock)
        self.person = Person(self.robot, **person)
        stop = MeasuredStop(self.person, self.person.say)
        self.arm = OperatorArm(self.robot, self.clock, limits(), ClosingRecorder(folder / "r"), 0.1, stop)
        stop.arm = self.arm
        self.walk = Walk(self.arm, self.person, stop, self.person.say)


def test_a_good_arm_and_a_content_person_pass_all_four(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    begin = bench.arm.position()
    measured = bench.walk.all_steps()
    assert tuple(measured) == STEPS
    assert measured["contact_plane"]["above_counter_m"] == pytest.approx(0.01, abs=1e-3)
    assert measured["gripper"] == {"open": 1.0, "closed": 0.0, "on_object": 0.5}
    assert 0.0 <= measured["stop"]["stood_after_s"] <= 0.25 and measured["stop"]["overshoot_m"] < 0.003
    assert bench.arm.position() == pytest.approx(begin, abs=2e-3)
    events = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "confirmed" and event["yes"] for event in events) == 8
    lowest_m = min(float(position[2]) for position, *_ in bench.robot.commands)
    assert lowest_m >= 0.01 - 1e-4


@pytest.mark.parametrize(
    ("words", "step"),
    [("2 cm up", "axis_signs"), ("2 cm forward", "axis_signs"), ("2 cm to the left", "axis_signs"),
     ("stop at once", "stop"), ("about 1 cm", "contact_plane"), ("are they open", "gripper"),
     ("are they closed", "gripper"), ("do they hold", "gripper")],
)  # fmt: skip
def test_any_no_ends_it_there(tmp_path: Path, words: str, step: str) -> None:
    bench = Bench(tmp_path, answers={words: "n"})
    with pytest.raises(NotCompletedError, match=f"{step}: not confirmed"):
        bench.walk.all_steps()
    with pytest.raises(KeyboardInterrupt):
        Bench(tmp_path / "q", answers={words: "q"}).walk.all_steps()


class Mirrored(PhysicalFake):
    """Left is right: a base that was mounted the other way round, or a sign in somebody's driver."""

    def state(self) -> Any:
        state = super().state()
        flip = np.array([1.0, -1.0, 1.0])
        return type(state)(np.asarray(state.ee_position_m) * flip, state.ee_rotation,
                           np.asarray(state.finger_tips_m) * flip, np.asarray(state.joints_rad) * [-1, 1, 1, 1, 1, 1],
                           state.gripper, state.stamp_s)  # fmt: skip


class Sluggish(PhysicalFake):
    """Goes on for 3 cm after a hold."""

    def hold(self, reason: str) -> None:
        here = np.asarray(self.state().ee_position_m)
        super().hold(reason)
        if "operator" in reason:
            ReplayRobot.command(self, here + np.array([0.0, 0.03, 0.0]), np.asarray(self.state().ee_rotation), 0.5)


class Weak(PhysicalFake):
    """Fingers that do not close."""

    object_at = 0.4


@pytest.mark.parametrize(
    ("robot", "step"),
    [
        (Mirrored, "did not arrive|axis_signs: measured"),
        (Sluggish, "stop: stood"),
        (Weak, "gripper: the fingers are 0.40 open"),
    ],
)
def test_what_is_measured_wrong_fails_whatever_the_person_says(
    tmp_path: Path, robot: type[PhysicalFake], step: str
) -> None:
    with pytest.raises(ClientError, match=step):
        Bench(tmp_path, robot).walk.all_steps()


def test_fingers_that_close_on_nothing_where_something_should_be_fail(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.person._robot = PhysicalFake(bench.clock)  # the object goes elsewhere
    with pytest.raises(NotCompletedError, match="closed on nothing"):
        bench.walk.all_steps()


def test_a_stop_that_nobody_tried_is_no_stop(tmp_path: Path) -> None:
    with pytest.raises(NotCompletedError, match="no key stopped the arm"):
        Bench(tmp_path, press_at=None).walk.all_steps()


def test_a_key_in_any_other_motion_ends_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.person._looks = 0
    with pytest.raises(OperatorHeld):
        bench.walk.all_steps()
    assert "operator" in bench.robot.holds[0][0]


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_calibration_a_terminal_or_with_json_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ny\n" * 20))
    for arguments, words in (([], "calibrate"), (["--sim"], "needs an operator's keys"), (["--json"], "--json")):
        assert main(["doctor", "--commission", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() and not record_path().exists()


def sit(folder: Path, *arguments: str) -> Seat:
    """In front of a commissioning."""
    command = ["doctor", "--commission", "--record", str(folder / "runs"), *arguments]
    return Seat(command, {"XDG_CONFIG_HOME": str(folder)})


def walk_through(seat: Seat, no_to: str = "", object_: Callable[[], None] = lambda: None) -> None:
    """Enter and yes to everything, SPACE once the arm has begun its way; n to the question that holds ``no_to``."""
    mark = 0
    while seat.process.poll() is None:
        try:
            end = min(
                place for word in ("q: end", "[n]o") if (place := seat.screen.find(word, mark)) >= 0
            )
        except ValueError:
            continue
        asked, mark = seat.screen[mark:end], end + 4
        if "stand something" in asked:
            object_()
        if seat.screen[end:].startswith("q: end"):
            seat.press("\r")
            if "on its way" in asked:
                time.sleep(1.5)
                seat.press(" ")
        else:
            seat.press("n" if no_to and no_to in asked else "y")


@patiently
def test_the_double_is_commissioned_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch)
    desk.bench.set(sag_rad=0.003)
    arm, here = f"test-{tmp_path.name}", limits()
    with sit(tmp_path) as seat:
        walk_through(seat, object_=lambda: desk.bench.set(object_m=0.028))
        code = seat.wait()
        if code in (3, 7) and any(words in seat.screen for words in STARVED):
            raise RobotError(seat.screen[-400:])
        assert code == 0 and seat.mode == seat.before, seat.screen
    assert is_commissioned("widowx", arm, here)
    record = json.loads(record_path().read_text())
    assert record["measured"]["stop"]["stood_after_s"] <= 0.25 and record["measured"]["gripper"]["on_object"] > 0.3
    assert not desk.bench.logged("torque")


@patiently
def test_a_no_on_the_terminal_writes_nothing_and_the_arm_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch)
    with sit(tmp_path) as seat:
        walk_through(seat, no_to="2 cm forward")
        code = seat.wait()
        if code in (3, 7) and any(words in seat.screen for words in STARVED):
            raise RobotError(seat.screen[-400:])
        assert code == 3 and seat.mode == seat.before and "stays uncommissioned" in seat.screen
    assert not record_path().exists()
    events = desk.events()
    assert [event["event"] for event in events][-2:] == ["hold", "end"]


def test_a_rehearsal_on_the_twin_passes_and_writes_nothing(tmp_path: Path) -> None:
    with sit(tmp_path, "--sim") as seat:
        walk_through(seat)
        assert seat.wait() == 0 and "rehearsed on the twin" in seat.screen, seat.screen
    assert not (tmp_path / "vlm2vla").exists()
