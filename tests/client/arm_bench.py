"""A WidowX on the bench that is none: the client's robot, its real child process, and a vendor's double inside it."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from robot_fakes import limits, policy_context

from vlm2vla_client.clock import SystemClock
from vlm2vla_client.errors import RobotError
from vlm2vla_client.executor import ChunkResult, Executor, MotionStart
from vlm2vla_client.robots.arm_lock import ArmLock
from vlm2vla_client.robots.widowx import WidowXRobot, WidowXSettings
from vlm2vla_client.safety_geometry import rotation_of
from vlm2vla_twin import kinematics

FloatArray = NDArray[np.float64]
HERE = Path(__file__).parent
SOURCES = [HERE.parents[1] / name / "src" for name in ("shared_schema", "twin")]
FLAVOURS = ("ros1", "ros2")
REST_S, REST_LIMIT_S = 0.15, 3.0


def python_path(flavour: str) -> str:
    """Where a child finds the flavour's double and the kinematics that it computes with."""
    return os.pathsep.join(str(path) for path in (HERE / "vendor_doubles" / flavour, HERE, *SOURCES))


def start_with_yaw(
    yaw_rad: float, position_m: Sequence[float] = (0.28, 0.0, 0.12), tilt_rad: float = 0.0
) -> list[float]:
    """Joints with the gripper down, ``tilt_rad`` off the vertical, and its wrist turned by ``yaw_rad`` about it."""
    joints: FloatArray | None = np.array([0.0, -0.6, 0.7, 0.0, 1.4, 0.0])
    for part in yaw_rad * np.linspace(0.0, 1.0, 9):  # in steps, so that the search stays near
        turn, tilt = rotation_of(np.array([[0.0, 0.0, part], [0.0, -tilt_rad, 0.0]]))
        assert joints is not None
        joints = kinematics.inverse(np.array(position_m), turn @ kinematics.DOWN @ tilt, joints, 1e-7, 1e-6)
    assert joints is not None
    return [float(v) for v in joints]


class ArmBench:
    """Use as a context manager; ``faults`` are those of ``vendor_doubles.simulated_motors.Faults``."""

    def __init__(self, folder: Path, flavour: str, *, timeout_s: float = 20.0, **faults: Any) -> None:
        self.folder, self.flavour = folder, flavour
        self._faults = dict(faults)
        self.faults_file, self.log_file = folder / "faults.json", folder / "commands.jsonl"
        self.set()
        environment = {
            "PYTHONPATH": python_path(flavour),
            "VENDOR_DOUBLE_FAULTS": str(self.faults_file),
            "VENDOR_DOUBLE_LOG": str(self.log_file),
        }
        self.settings = WidowXSettings(python=sys.executable, start_timeout_s=timeout_s, environment=environment)
        self.clock = SystemClock()
        self.robot = self.another()
        self.events: list[tuple[str, dict[str, Any]]] = []

    def another(self) -> WidowXRobot:
        """A second client of the same arm."""
        return WidowXRobot(self.settings, ArmLock("bench", self.folder))

    def set(self, **faults: Any) -> None:
        """Change what the motors do; whole at once, so that the double never reads half a file."""
        self._faults.update(faults)
        new = self.faults_file.with_suffix(".new")
        new.write_text(json.dumps(self._faults))
        new.replace(self.faults_file)

    def __enter__(self) -> ArmBench:
        self.robot.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.robot.close()

    @property
    def process_id(self) -> int:
        """Of the arm process."""
        process = self.robot._pipe._process
        assert process is not None
        return process.pid

    def signal(self, number: signal.Signals) -> float:
        """Sends it to the arm process; the time it was sent."""
        os.kill(self.process_id, number)
        return time.monotonic()

    def logged(self, kind: str) -> list[dict[str, Any]]:
        """What the motors were told, oldest first."""
        if not self.log_file.exists():
            return []
        lines = [json.loads(line) for line in self.log_file.read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def position(self) -> FloatArray:
        """Where the end effector is measured now."""
        return np.asarray(self.robot.state().ee_position_m)

    def rest(self) -> FloatArray:
        """Where the end effector comes to rest: a chunk ends when the arm is near enough, not when it stands still."""
        ends_s, place = time.monotonic() + REST_LIMIT_S, self.position()
        while time.monotonic() < ends_s:
            time.sleep(REST_S)
            before, place = place, self.position()
            if np.abs(place - before).max() < 1e-6:
                return place
        raise AssertionError(f"the arm was not at rest within {REST_LIMIT_S} s")

    def executor(self) -> Executor:
        """The client's own executor on this arm."""
        return Executor(self.robot, self.clock, limits(), on_event=lambda kind, data: self.events.append((kind, data)))

    def run(self, rows: Sequence[Sequence[float]], executor: Executor | None = None) -> ChunkResult:
        """One chunk, as the loop would run it."""
        begin = MotionStart(self.clock.now_s(), self.position())
        return (executor or self.executor()).run_chunk(rows, policy_context(), begin)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> float:
    """The time at which it became true; AssertionError when it does not in time."""
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        if condition():
            return time.monotonic()
        time.sleep(0.002)
    raise AssertionError(f"did not happen within {timeout_s} s")


def first_error(robot: WidowXRobot, timeout_s: float, words: str = "") -> tuple[float, RobotError]:
    """When ``state`` first fails with these words, and how."""
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        try:
            robot.state()
        except RobotError as error:
            if words in str(error):
                return time.monotonic(), error
        time.sleep(0.002)
    raise AssertionError(f"no such error within {timeout_s} s: {words}")


STARVED = ("has been silent for", "s old (limit", "no heartbeat", "NOT GOOD: stood")


def patiently(test: Callable[..., None]) -> Callable[..., None]:
    """For tests of where the arm goes: once more when this machine was too busy to keep the arm's own deadlines.

    Those deadlines have tests of their own, which do not use this.
    """

    @functools.wraps(test)
    def run(tmp_path: Path, **given: Any) -> None:
        for attempt in range(3):
            folder = tmp_path / str(attempt)
            folder.mkdir()
            try:
                return test(tmp_path=folder, **given)
            except RobotError as error:
                if attempt == 2 or not any(words in str(error) for words in STARVED):
                    raise
        return None

    return run
