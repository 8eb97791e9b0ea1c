"""``home`` and the arm under a person's commands: ideal arm, twin, and the WidowX's double from its sleep pose."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm_bench import STARVED, patiently, start_with_yaw
from hypothesis import given, settings
from hypothesis import strategies as st
from robot_fakes import ClosingRecorder, FakeArm, ManualClock, ScriptedMonitor, limits
from test_physical_run import Desk

from vlm2vla_client.cli import main
from vlm2vla_client.config import load_config
from vlm2vla_client.errors import ConfigurationError, RobotError, SafetyStop
from vlm2vla_client.executor import NoMonitor
from vlm2vla_client.operator_arm import OperatorArm, is_down, matrix_of, rotation_vector
from vlm2vla_client.recorder import read_episode
from vlm2vla_twin.kinematics import DOWN, forward

SLEEP_RAD = [0.0, -1.80, 1.55, 0.0, 0.8, 0.0]
HOME_M = np.array([0.30, 0.0, 0.15])


def arm_on(folder: Path, at: FakeArm, clock: ManualClock, monitor: Any = None, **changes: object) -> OperatorArm:
    return OperatorArm(at, clock, limits(**changes), ClosingRecorder(folder / "r"), 0.2, monitor or NoMonitor())


@pytest.mark.parametrize("at", [(0.20, 0.15, 0.05), (0.36, -0.15, 0.20), (0.30, 0.0, 0.15), (0.25, 0.0, 0.004)])
def test_it_goes_up_across_and_down_and_leaves_the_grip_alone(tmp_path: Path, at: tuple[float, float, float]) -> None:
    clock = ManualClock()
    robot = FakeArm(clock, at)
    arm = arm_on(tmp_path, robot, clock)
    arm.go(HOME_M, DOWN)
    assert arm.position() == pytest.approx(HOME_M, abs=1e-3) and robot.grips == []
    heights = [float(position[2]) for position, *_ in robot.commands]
    assert not heights or min(heights) >= min(at[2], 0.15) - 1e-3
    speeds = [
        float(np.linalg.norm(b[0] - a[0])) / b[1] for a, b in zip(robot.commands, robot.commands[1:], strict=False)
    ]
    assert all(value <= 0.25 * 0.2 + 1e-6 for value in speeds)


def test_it_finds_home_from_the_sleep_pose_turning_the_gripper_down(tmp_path: Path) -> None:
    clock = ManualClock()
    robot = FakeArm(clock)
    robot._from = robot._goal = np.array(SLEEP_RAD)
    arm = arm_on(tmp_path, robot, clock)
    assert not is_down(arm.state().ee_rotation, 0.5)
    arm.go(HOME_M, DOWN)
    assert arm.position() == pytest.approx(HOME_M, abs=1e-3) and is_down(arm.state().ee_rotation, 0.03)


def test_what_the_filter_stops_is_a_safety_stop_and_the_arm_holds(tmp_path: Path) -> None:
    clock = ManualClock()
    robot = FakeArm(clock)
    arm = arm_on(tmp_path, robot, clock, forbidden_boxes=(((0.20, -0.10, 0.0), (0.35, -0.05, 0.25)),))
    with pytest.raises(SafetyStop, match=r"short of .*forbidden_box|forbidden_box"):
        arm.go(np.array([0.30, -0.15, 0.15]))
    assert robot.holds and float(arm.position()[1]) > -0.05


def test_an_arm_that_does_not_move_is_a_robot_error_and_a_key_an_interruption(tmp_path: Path) -> None:
    clock = ManualClock()
    robot = FakeArm(clock)
    robot.stuck = True
    with pytest.raises(RobotError, match="did not arrive"):
        arm_on(tmp_path / "a", robot, clock).shift([0.0, 0.05, 0.0])
    assert robot.holds
    held = FakeArm(clock)
    with pytest.raises(KeyboardInterrupt):
        arm_on(tmp_path / "b", held, clock, ScriptedMonitor(4, "held by the operator")).shift([0.0, 0.1, 0.0])
    assert held.holds == [("held by the operator", held.holds[0][1])]


def test_the_grip_is_commanded_only_when_asked(tmp_path: Path) -> None:
    clock = ManualClock()
    robot = FakeArm(clock)
    arm = arm_on(tmp_path, robot, clock)
    arm.shift([0.0, 0.0, 0.02])
    arm.grip(False)
    arm.shift([0.0, 0.0, 0.02])
    assert robot.grips == [False]


@given(st.lists(st.floats(-1.8, 1.8), min_size=3, max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_rotation_and_its_vector_are_one(vector: list[float]) -> None:
    wanted = np.array(vector)
    if np.linalg.norm(wanted) < 3.1:
        assert rotation_vector(matrix_of(wanted)) == pytest.approx(wanted, abs=1e-6)


def test_half_a_turn_has_a_vector() -> None:
    half = np.diag([-1.0, 1.0, -1.0])
    assert matrix_of(rotation_vector(half)) == pytest.approx(half, abs=1e-3)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no settings and no terminal."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_twin_goes_home_and_it_is_recorded(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["home", "--sim"]) == 0
    assert "the arm holds" in capsys.readouterr().out
    (folder,) = (bare / "runs").iterdir()
    episode = read_episode(folder)
    assert episode.summary is not None and np.array(episode.summary["position_m"]) == pytest.approx(HOME_M, abs=3e-3)


@pytest.mark.parametrize("measured", ["", "counter_z_m = 0.0\n", "wall_x_m = 0.56\n"])
def test_without_calibration_nothing_is_even_connected(
    bare: Path, measured: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (bare / "vlm2vla").mkdir()
    (bare / "vlm2vla" / "limits.toml").write_text(measured)
    assert main(["home"]) == 2
    assert "calibrate" in capsys.readouterr().err and not (bare / "runs").exists()


def test_the_pose_comes_from_the_settings_and_must_be_one(bare: Path) -> None:
    (bare / "vlm2vla").mkdir()
    file = bare / "vlm2vla" / "client.toml"
    file.write_text("[home]\nposition_m = [0.25, 0.05, 0.2]\n")
    assert load_config(None).home.position_m == (0.25, 0.05, 0.2)
    assert main(["home", "--sim"]) == 0
    for wrong in ("position_m = [0.2, 0.1]", "position_m = [2.0, 0.0, 0.1]", "positon_m = [0.2, 0.0, 0.1]"):
        file.write_text(f"[home]\n{wrong}\n")
        with pytest.raises(ConfigurationError, match="home"):
            load_config(None)
    file.write_text("[home]\nposition_m = [0.25, 0.05, 0.6]\n")
    assert main(["home", "--sim"]) == 5, "above the box"


class HomeDesk(Desk):
    """The WidowX's double in its sleep pose."""

    def home(self, *arguments: str) -> int:
        code = main(["home", "--record", str(self.folder / "runs"), *arguments])
        if code == 7 and any(words in json.dumps(self.events()) for words in STARVED):
            raise RobotError("starved: " + self.events()[-1]["message"] + STARVED[0])
        return code

    def joints(self) -> Any:
        return np.array(self.bench.logged("group")[-1]["positions"])


@patiently
def test_a_commissioned_arm_goes_home_from_its_sleep_pose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = HomeDesk(tmp_path, monkeypatch, keys="")
    desk.bench.set(start_rad=SLEEP_RAD, sag_rad=0.004)
    desk.commission()
    assert desk.home("--speed", "0.6") == 0
    pose = forward(desk.joints())
    assert pose.position_m == pytest.approx(HOME_M, abs=0.006) and is_down(pose.rotation, 0.05)
    assert not desk.bench.logged("gripper") and not desk.bench.logged("torque")


@patiently
def test_an_arm_never_commissioned_is_asked_and_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for answer, code in (("n\n", 130), ("y\n", 0)):
        folder = tmp_path / answer.strip()
        folder.mkdir()
        desk = HomeDesk(folder, monkeypatch, keys=answer)
        desk.bench.set(start_rad=start_with_yaw(0.3, (0.30, 0.03, 0.15)))
        assert desk.home() == code
        assert "never commissioned: --confirm --speed 0.1 apply" in capsys.readouterr().err
        assert bool(desk.bench.logged("group")) is (code == 0)
    steps = [event for event in desk.events() if event["event"] == "substep"]
    turned = np.linalg.norm(rotation_vector(DOWN.T @ forward(desk.joints()).rotation))
    assert turned < 0.05 and sum(step["duration_s"] for step in steps) >= 0.03 / (0.25 * 0.1)


@patiently
def test_a_fault_of_the_arm_on_the_way_home_is_exit_7(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = HomeDesk(tmp_path, monkeypatch, keys="")
    desk.commission()
    desk.bench.set(start_rad=start_with_yaw(0.0, (0.30, 0.12, 0.15)), hardware_error=0x20)
    assert desk.home() == 7
    assert "hardware error" in desk.events()[-1]["message"]
