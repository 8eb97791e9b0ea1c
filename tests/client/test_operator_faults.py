"""The fault matrix's rows about the operator and the client itself, down to what the motors were told and when."""

from __future__ import annotations

import os
import pty
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from arm_bench import STARVED, ArmBench, patiently, start_with_yaw, wait_until
from client_fakes import ScriptedPolicy, ScriptedVerifier, WallCamera
from operator_terminal import Seat
from robot_fakes import limits
from test_physical_run import Desk

from vlm2vla_client.errors import RobotError
from vlm2vla_client.keys import TerminalKeys
from vlm2vla_client.operator_keys import SpaceHolds
from vlm2vla_client.physical import PhysicalRun, run_on_arm
from vlm2vla_client.progress import SilentProgress
from vlm2vla_client.recorder import read_episode
from vlm2vla_twin.kinematics import forward

SLACK_S = 0.2
FAR_RAD = start_with_yaw(0.0, (0.30, 0.18, 0.15))


@contextmanager
def going_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Desk, Seat]]:
    """A commissioned arm on its long, slow way home, already moving, in front of a terminal."""
    desk = Desk(folder, monkeypatch)
    desk.commission()
    desk.bench.set(start_rad=FAR_RAD)
    arguments = ["home", "--speed", "0.1", "--record", str(folder / "runs")]
    with Seat(arguments, {"XDG_CONFIG_HOME": str(folder)}) as seat:
        wait_until(lambda: len(desk.bench.logged("group")) > 5 or seat.process.poll() is not None, 60.0)
        try:
            yield desk, seat
        except AssertionError:
            if any(words in seat.screen for words in STARVED):  # the client gave up by itself: see patiently
                raise RobotError(seat.screen[-300:]) from None
            raise


def told_after(desk: Desk, moment_s: float) -> list[float]:
    return [line["t_s"] - moment_s for line in desk.bench.logged("group") if line["t_s"] > moment_s]


def assert_standing(desk: Desk) -> None:
    """The last goal is where the arm is: it was told nothing more, and nothing pulls it on."""
    count = len(desk.bench.logged("group"))
    time.sleep(0.4)
    assert len(desk.bench.logged("group")) == count
    last, before = (np.array(line["positions"]) for line in desk.bench.logged("group")[: -3 : -1])
    assert float(np.linalg.norm(forward(last).position_m - forward(before).position_m)) < 0.006
    assert not desk.bench.logged("torque") and not desk.bench.logged("gripper")


@pytest.mark.clock
@patiently
def test_a_key_reaches_the_motors_within_a_substep_and_ends_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with going_home(tmp_path, monkeypatch) as (desk, seat):
        pressed_s = seat.press(" ")
        assert seat.wait(30.0) == 130 and seat.mode == seat.before
        # At most the substep under way (0.1 s) and the hold (0.05 s); one more command may have been on its way.
        assert told_after(desk, pressed_s)[-1] < 0.1 + 0.05 + SLACK_S
        assert_standing(desk)
        (folder,) = (tmp_path / "runs").iterdir()
        hold = read_episode(folder).of("hold")[0]
        assert "operator" in hold["reason"] and hold["t_s"] - pressed_s < 0.15 + SLACK_S


@pytest.mark.clock
@pytest.mark.parametrize("after_s", [0.0, 0.13, 0.6, 1.2, 1.5, 1.9])
@patiently
def test_a_key_at_any_moment_of_a_run_stops_the_motors_until_it_is_let_go_on(tmp_path: Path, after_s: float) -> None:
    """A cycle lasts about 2 s: planning, 1.4 s of motion, settling, verifying; the key falls into each of them."""
    bench = ArmBench(tmp_path, "ros1")
    hand, program = pty.openpty()
    said: list[str] = []
    operator = SpaceHolds(TerminalKeys(program), said.append)
    left, right = [[0.0, 0.05, 0.0, 1.0]] * 2, [[0.0, -0.05, 0.0, 1.0]] * 2
    seen: dict[str, float] = {}
    over = threading.Event()

    def person() -> None:
        wait_until(lambda: over.is_set() or len(bench.logged("group")) >= 2, 30.0)
        if over.wait(after_s):  # the run ended before anybody could press anything
            return
        os.write(hand, b" ")
        seen["pressed_s"] = time.monotonic()
        wait_until(lambda: over.is_set() or bool(said), 10.0)
        time.sleep(1.2)
        seen["resumed_s"] = time.monotonic()
        os.write(hand, b" ")

    thread = threading.Thread(target=person, daemon=True)
    thread.start()
    try:
        result = run_on_arm(
            PhysicalRun("go", speed=0.3, max_cycles=3, operator=operator), bench.robot, WallCamera(),
            ScriptedPolicy(["go"], [left, right, left, right]), ScriptedVerifier([False]), limits(),
            tmp_path / "episode", SilentProgress(),
        )  # fmt: skip
    finally:
        over.set()
        thread.join(10.0)
        os.close(hand)
        os.close(program)
    if any(words in result.message for words in STARVED):
        raise RobotError(result.message)
    assert result.exit_code == 3 and result.cycles == 4, (result, said)
    told = bench.logged("group")
    begin_s, end_s = seen["pressed_s"] + 0.15 + SLACK_S, seen["resumed_s"]
    late = [number for number, line in enumerate(told) if begin_s < line["t_s"] < end_s]
    # An arm that settles stands already: the hold behind it tells it to stay where it was sent.
    ends = [forward(line["positions"]).position_m for line in told]
    assert all(float(np.linalg.norm(ends[number] - ends[number - 1])) < 0.001 for number in late)
    events = read_episode(tmp_path / "episode")
    assert len(events.of("resumed")) == 1 and "operator" in events.of("hold")[0]["reason"]
    assert any(line["t_s"] > seen["resumed_s"] for line in bench.logged("group")), "it went on"


@pytest.mark.clock
@patiently
def test_a_client_killed_with_9_leaves_an_arm_that_holds_and_a_readable_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with going_home(tmp_path, monkeypatch) as (desk, seat):
        killed_s = time.monotonic()  # before it: the arm may hold before this process runs again
        os.kill(seat.process.pid, signal.SIGKILL)
        seat.process.wait(10.0)
        wait_until(lambda: bool(told_after(desk, killed_s)), 5.0)
        time.sleep(0.5)
        assert told_after(desk, killed_s)[-1] < 0.3 + 0.05 + SLACK_S
        assert_standing(desk)
    (folder,) = (tmp_path / "runs").iterdir()
    episode = read_episode(folder)
    assert episode.summary is None and episode.of("substep")


@patiently
def test_a_second_client_is_refused_and_the_first_one_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with going_home(tmp_path, monkeypatch) as (desk, first):
        arguments = ["home", "--record", str(tmp_path / "second")]
        with Seat(arguments, {"XDG_CONFIG_HOME": str(tmp_path)}) as second:
            assert second.wait() == 7
            assert "another client has this arm" in second.screen and str(first.process.pid) in second.screen
        assert not list((tmp_path / "second").iterdir()), "nothing was recorded"
        assert first.wait() == 0, first.screen
        assert forward(desk.bench.logged("group")[-1]["positions"]).position_m == pytest.approx(
            [0.30, 0.0, 0.15], abs=0.006
        )
