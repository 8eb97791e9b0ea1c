"""``calibrate``: the arithmetic of three points, one key a step, and whole calibrations on the twin and the double."""

from __future__ import annotations

import io
import json
import math
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm_bench import STARVED, patiently
from hypothesis import given
from hypothesis import strategies as st
from operator_terminal import Seat
from robot_fakes import ClosingRecorder, FakeArm, ManualClock, limits
from test_operator_keys import ScriptedKeys

from vlm2vla_client.calibrate import OnlySpaceHolds, Touching, limits_before
from vlm2vla_client.calibration import MAX_TILT_RAD, MIN_APART_M, counter_of, useless
from vlm2vla_client.cli import main
from vlm2vla_client.config import ClientConfig, load_config
from vlm2vla_client.configure import save_measured
from vlm2vla_client.errors import ConfigurationError, NotCompletedError, RobotError
from vlm2vla_client.operator_arm import OperatorArm
from vlm2vla_client.robots.replay import HOME_RAD
from vlm2vla_client.safety import RobotState

# --- three points ----------------------------------------------------------------------------------------------------


def plane(tilt_rad: float, height_m: float = 0.012) -> list[np.ndarray]:
    return [
        np.array([x, y, height_m + math.tan(tilt_rad) * (x - 0.25)])
        for x, y in ((0.25, 0.0), (0.35, 0.10), (0.35, -0.10))
    ]


@given(st.floats(0.0, 0.05), st.floats(-0.1, 0.1))
def test_height_and_tilt_are_those_of_the_plane(tilt_rad: float, height_m: float) -> None:
    counter = counter_of(plane(tilt_rad, height_m))
    assert counter.tilt_rad == pytest.approx(tilt_rad, abs=1e-6)
    assert counter.counter_z_m == pytest.approx(height_m + math.tan(tilt_rad) * 0.2 / 3.0, abs=1e-9)
    assert (counter.problem is None) is (tilt_rad <= MAX_TILT_RAD and counter.spread_m <= 0.003)


def test_a_counter_that_one_height_does_not_describe_is_refused() -> None:
    assert counter_of(plane(0.01)).problem is None
    assert "tilts by 2.3 degrees" in str(counter_of(plane(0.04)).problem)
    far = [np.array([0.15, 0.15, 0.0]), np.array([0.40, 0.15, 0.005]), np.array([0.15, -0.15, 0.005])]
    assert "5 mm" not in str(counter_of(far).problem) and "mm from the mean" in str(counter_of(far).problem)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([(0.3, 0.0), (0.3, 0.05)], "5.0 cm from another"),
        ([(0.3, 0.0), (0.3, 0.2), (0.33, 0.19)], "from another"),
        ([(0.3, -0.1), (0.3, 0.0), (0.3, 0.1)], "off the line"),
        ([(0.3, -0.1), (0.3, 0.1), (0.33, 0.0)], "3.0 cm off the line"),
    ],
)
def test_points_too_near_or_in_a_line_are_useless(points: list[tuple[float, float]], words: str) -> None:
    assert words in str(useless([np.array([x, y, 0.0]) for x, y in points]))


def test_good_points_are_not_useless() -> None:
    points = plane(0.0)
    assert useless(points[:1]) is None and useless(points[:2]) is None and useless(points) is None
    assert float(np.linalg.norm(points[0] - points[1])) > MIN_APART_M


# --- one key a step --------------------------------------------------------------------------------------------------


class ArmOnCounter(FakeArm):
    """An ideal arm that something stiff stops at a height; it feels nothing."""

    floor_m = 0.0

    def state(self) -> RobotState:
        state = super().state()
        lift_m = max(self.floor_m - float(state.ee_position_m[2]), 0.0)
        if not lift_m:
            return state
        up = np.array([0.0, 0.0, lift_m])
        return RobotState(np.asarray(state.ee_position_m) + up, state.ee_rotation, np.asarray(state.finger_tips_m) + up,
                          state.joints_rad, state.gripper, state.stamp_s)  # fmt: skip


class Bench:
    """A calibration with keys from a list."""

    def __init__(self, folder: Path, keys: str, floor_m: float = 0.11, lowest_m: float = -0.02) -> None:
        self.clock = ManualClock()
        self.robot = ArmOnCounter(self.clock)
        self.robot.floor_m = floor_m
        self.keys = ScriptedKeys({}, keys)
        self.said: list[str] = []
        stop = OnlySpaceHolds(self.keys)
        inside = limits_before(ClientConfig(), lowest_m)
        arm = OperatorArm(self.robot, self.clock, inside, ClosingRecorder(folder / "r"), 0.05, stop)
        self.touching = Touching(arm, self.keys, stop, self.said.append)

    def at(self) -> np.ndarray:
        return np.asarray(self.robot.state().ee_position_m)


DOWN = "d" * 23
#: Three touches, 10 cm apart, from (0.30, 0.0) on; the counter is 4 cm below the start.
THREE = f"{DOWN}\r{'l' * 10}{DOWN}\r{'rrrrr'}{'b' * 10}{DOWN}\r"


def test_three_touches_give_the_height(tmp_path: Path) -> None:
    bench = Bench(tmp_path, THREE + "y")
    assert bench.touching.measure(False, 0.5) == {"counter_z_m": pytest.approx(0.11, abs=1e-4), "wall_x_m": 0.5}
    assert any("touch something" in line for line in bench.said), "the arm that feels nothing is not pushed on"
    lowest_m = min(float(position[2]) for position, *_ in bench.robot.commands)
    assert lowest_m > 0.11 - 0.003 - 0.002 - 1e-6, "at most 5 mm into the counter"
    speeds = [1.0 / duration for _, duration, _ in bench.robot.commands]
    assert min(speeds) > 0.0 and all(duration >= 0.02 for _, duration, _ in bench.robot.commands)
    assert bench.robot.grips == []


def test_every_step_is_small_and_slow(tmp_path: Path) -> None:
    for key, most_m in (("d", 0.002), ("s", 0.0005), ("u", 0.005), ("f", 0.01), ("b", 0.01), ("l", 0.01), ("r", 0.01)):
        bench = Bench(tmp_path / key, key + "q")
        before = bench.at()
        with pytest.raises(KeyboardInterrupt):
            bench.touching.measure(False, None)
        moved_m = float(np.linalg.norm(bench.at() - before))
        assert moved_m == pytest.approx(most_m, abs=1e-5)
        seconds = sum(duration for _, duration, _ in bench.robot.commands)
        assert moved_m / seconds <= 0.25 * 0.05 + 1e-5


def test_no_step_goes_below_the_height_that_the_operator_gave(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "d" * 60 + "q", floor_m=-1.0, lowest_m=0.05)
    with pytest.raises(KeyboardInterrupt):
        bench.touching.measure(False, None)
    assert bench.at()[2] >= 0.05 and any("--lowest-m 0.05" in line for line in bench.said)


def test_useless_points_are_asked_for_again_and_one_may_be_taken_back(tmp_path: Path) -> None:
    again = f"{DOWN}\r" + f"ll{DOWN}\r" + f"{'l' * 8}{DOWN}\r" + "z" + f"{DOWN}\r" + f"rrrrr{'b' * 10}{DOWN}\ry"
    bench = Bench(tmp_path, again)
    assert set(bench.touching.measure(False, None)) == {"counter_z_m"}
    text = "\n".join(bench.said)
    assert "2.0 cm from another point" in text and "taken back" in text


def test_a_tilted_counter_and_a_no_write_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotCompletedError, match="not confirmed"):
        Bench(tmp_path / "a", THREE + "n").touching.measure(False, None)

    class Slope(ArmOnCounter):
        def state(self) -> RobotState:
            self.floor_m = 0.11 + 0.05 * (float(FakeArm.state(self).ee_position_m[1]))
            return super().state()

    bench = Bench(tmp_path / "b", THREE + "y")
    bench.robot.__class__ = Slope
    with pytest.raises(NotCompletedError, match="tilts by"):
        bench.touching.measure(False, None)


def test_a_gripper_that_leans_touches_nothing_until_it_is_turned(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "\r" + "t" * 20 + "q")
    bench.robot._from = bench.robot._goal = np.array([*HOME_RAD[:4], HOME_RAD[4] - 0.5, 0.0])
    with pytest.raises(KeyboardInterrupt):
        bench.touching.measure(False, None)
    assert "does not point straight down" in "\n".join(bench.said)
    assert np.asarray(bench.robot.state().ee_rotation)[2, 0] == pytest.approx(-1.0, abs=1e-3)


def test_space_stops_a_step_and_repeats_of_a_key_do_not(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "lq")
    bench.keys._looks.update({3: "ll", 4: " "})
    with pytest.raises(KeyboardInterrupt):
        bench.touching.measure(False, None)
    assert any("held" in line for line in bench.said) and 0.0 < bench.at()[1] < 0.009


# --- the file --------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_written_and_everything_else_kept(tmp_path: Path) -> None:
    client = tmp_path / "client.toml"
    client.write_text('robot = "bridge"\n[limits]\ncounter_z_m = 0.5\nmax_speed_m_s = 0.1\n[bridge]\nhost = "pc"\n')
    (tmp_path / "limits.toml").write_text("wall_x_m = 0.5\nbox_max_m = [0.4, 0.2, 0.3]\n")
    file = save_measured(client, {"counter_z_m": 0.0123})
    assert tomllib.loads(file.read_text()) == {"wall_x_m": 0.5, "box_max_m": [0.4, 0.2, 0.3], "counter_z_m": 0.0123}
    config = load_config(client)
    assert config.limits["counter_z_m"] == 0.0123 and config.limits["max_speed_m_s"] == 0.1
    assert config.robot == "bridge" and config.bridge == {"host": "pc"}
    assert "counter_z_m = 0.5" in client.with_name("client.toml.old").read_text()
    assert "counter" not in (tmp_path / "limits.toml.old").read_text()
    with pytest.raises(ConfigurationError):
        save_measured(client, {"counter_z_m": math.nan})
    assert load_config(client).limits["counter_z_m"] == 0.0123


def test_before_the_counter_is_known_the_floor_is_the_operators(tmp_path: Path) -> None:
    given_limits = {"counter_z_m": 0.2, "wall_x_m": 0.3, "forbidden_boxes": [[[0.2, 0.1, 0.0], [0.3, 0.2, 0.1]]]}
    found = limits_before(ClientConfig(limits=given_limits), -0.05)
    assert found.counter_z_m == -0.05 and found.wall_x_m == 1.0
    assert found.box_max_m[2] + found.counter_z_m == pytest.approx(limits().box_max_m[2])
    assert found.forbidden_boxes[0][1][2] + found.counter_z_m == pytest.approx(0.1)


def test_without_a_terminal_nothing_is_connected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("dddd\n"))
    assert main(["calibrate", "--sim"]) == 2
    assert "calibrate needs an operator's keys" in capsys.readouterr().err and not (tmp_path / "runs").exists()


# --- on a terminal ---------------------------------------------------------------------------------------------------


def lower_until_touch(seat: Seat, mark: int, words: tuple[str, ...]) -> int:
    """Presses d, looks, presses again, as a person would; the screen's position."""
    for _ in range(200):
        seat.press("d")
        mark = seat.wait_for("\r\n", 20.0, mark)
        time.sleep(0.02)
        if any(word in seat.screen[mark - 200 :] for word in words):
            return len(seat.screen)
        if seat.process.poll() is not None:
            break
    raise AssertionError(f"no touch; the screen is:\n{seat.screen[-2000:]}")


TOUCH = ("feel resistance", "touch something")


def three_touches(seat: Seat) -> None:
    mark = seat.wait_for("point 1 of 3")
    for number, way in ((1, ""), (2, "l" * 10), (3, "rrrrr" + "b" * 10)):
        for key in way:
            seat.press(key)
            mark = seat.wait_for("finger tips", 20.0, mark)
        mark = lower_until_touch(seat, len(seat.screen), TOUCH)
        seat.press("\r")
        mark = seat.wait_for(f"point {number} at", 20.0, mark)
    seat.wait_for("right?", 20.0, mark)


def test_a_whole_calibration_of_the_twin_finds_its_counter_and_writes_nothing(tmp_path: Path) -> None:
    arguments = ["calibrate", "--sim", "--record", str(tmp_path / "runs"), "--wall-x-m", "0.56"]
    with Seat(arguments, {"XDG_CONFIG_HOME": str(tmp_path)}) as seat:
        three_touches(seat)
        seat.press("y")
        assert seat.wait() == 0 and seat.mode == seat.before, seat.screen
        assert "nothing was written" in seat.screen
    assert not (tmp_path / "vlm2vla").exists()
    (summary,) = (tmp_path / "runs").glob("*/summary.json")
    measured = json.loads(summary.read_text())
    assert measured["counter_z_m"] == pytest.approx(0.0, abs=0.003) and measured["wall_x_m"] == 0.56


@patiently
def test_a_whole_calibration_of_the_double_is_written_and_then_the_arm_may_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_physical_run import Desk

    desk = Desk(tmp_path, monkeypatch)
    desk.bench.set(counter_z_m=0.132, sag_rad=0.004)
    home = tmp_path / "vlm2vla"
    client = home / "client.toml"
    client.write_text(client.read_text().replace("counter_z_m = 0.0\n", ""))
    assert main(["home"]) == 2, "not before it is calibrated"
    arguments = ["calibrate", "--record", str(tmp_path / "runs")]
    with Seat(arguments, {"XDG_CONFIG_HOME": str(tmp_path)}) as seat:
        try:
            three_touches(seat)
        except AssertionError:
            if any(words in seat.screen for words in STARVED):
                raise RobotError(seat.screen[-500:]) from None
            raise
        seat.press("y")
        assert seat.wait() == 0 and seat.mode == seat.before, seat.screen
    written: dict[str, Any] = tomllib.loads((home / "limits.toml").read_text())
    assert written == {"counter_z_m": pytest.approx(0.132, abs=0.001)}
    config = load_config(None)
    assert config.limits["counter_z_m"] == written["counter_z_m"] and config.limits["wall_x_m"] == 0.56
    assert not desk.bench.logged("gripper") and not desk.bench.logged("torque")
