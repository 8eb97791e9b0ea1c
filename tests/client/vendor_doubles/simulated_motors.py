"""The motors behind the doubles: time-based position profiles, sag under gravity, fingers, currents, registers.

They are not the vendor's code but what it talks to, and they run on the monotonic clock. A test changes them while they
run by writing JSON to the file that ``VENDOR_DOUBLE_FAULTS`` names, and reads what was commanded from the lines of the
file that ``VENDOR_DOUBLE_LOG`` names.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_twin import kinematics

FloatArray = NDArray[np.float64]

ARM_NAMES = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate"]
NAMES = [*ARM_NAMES, "gripper", "left_finger", "right_finger"]
MOTORS = 9  # shoulder and elbow have a shadow motor each
FINGER_SPEED_M_S = 0.08
PRESS_MA_PER_M = 100_000.0
REST_EFFORT_MA = (20.0, 300.0, 250.0, 10.0, 60.0, 5.0)


@dataclass
class Stamp:
    """A ROS time: comparable, nothing else."""

    ticks: int


@dataclass
class Header:
    """Of a message."""

    stamp: Stamp


@dataclass
class JointState:
    """sensor_msgs/JointState as xs_sdk publishes it; effort in mA."""

    header: Header
    name: list[str]
    position: list[float]
    velocity: list[float]
    effort: list[float]


@dataclass
class Faults:
    """What a test can make the motors do; see the fields of the file."""

    sag_rad: float = 0.0
    effort_ma: list[float] | None = None
    frozen: bool = False
    hardware_error: int = 0
    temperature_c: int = 40
    silent_motors: int = 0
    object_m: float = 0.0
    reversed_gripper: bool = False
    counter_z_m: float | None = None
    driver: bool = True
    mode: str = "position"
    start_rad: list[float] = field(default_factory=lambda: [0.0, 0.02180, 0.18424, 0.0, 1.36474, 0.0])


class Motors:
    """One arm's motors."""

    def __init__(self) -> None:
        self._file = os.environ.get("VENDOR_DOUBLE_FAULTS")
        self._log = os.environ.get("VENDOR_DOUBLE_LOG")
        self._read_s = 0.0
        self._faults = Faults()
        self.from_rad = self.goal_rad = np.array(self.faults.start_rad, dtype=np.float64)
        self.began_s = time.monotonic()
        self.profile_s = 2.0
        self.finger_from_m = kinematics.FINGER_MAX_M
        self.finger_began_s, self.finger_effort = time.monotonic(), 0.0
        self._frozen: JointState | None = None

    @property
    def faults(self) -> Faults:
        """As the file says now (read at most every 5 ms)."""
        now_s = time.monotonic()
        if self._file is not None and now_s - self._read_s > 0.005:
            self._read_s = now_s
            with contextlib.suppress(OSError, ValueError):  # not written yet, or in the middle of being written
                self._faults = Faults(**json.loads(Path(self._file).read_text()))
        return self._faults

    def log(self, kind: str, **fields: Any) -> None:
        """One line for the test."""
        if self._log is not None:
            with Path(self._log).open("a") as file:
                file.write(json.dumps({"t_s": time.monotonic(), "kind": kind, **fields}) + "\n")

    def reached_rad(self) -> FloatArray:
        """Where the profile is now."""
        share = min(max((time.monotonic() - self.began_s) / max(self.profile_s, 1e-3), 0.0), 1.0)
        return np.asarray(self.from_rad + share * (self.goal_rad - self.from_rad), dtype=np.float64)

    def measured_rad(self) -> FloatArray:
        """What the encoders say: gravity pulls shoulder and elbow below what they were told; a counter stops them."""
        return self._above_counter(self.reached_rad() + self.faults.sag_rad * np.array([0.0, 1.0, 0.5, 0.0, 0.0, 0.0]))

    def _above_counter(self, joints: FloatArray) -> FloatArray:
        pose, counter_m = kinematics.forward(joints), self.faults.counter_z_m
        if counter_m is None or pose.position_m[2] >= counter_m:
            return joints
        stopped = np.array([*pose.position_m[:2], counter_m])
        found = kinematics.inverse(stopped, pose.rotation, joints, 1e-6, 1e-5)
        assert found is not None, stopped
        return found

    def pressed_m(self) -> float:
        """How far the goal lies below the counter that stops the arm."""
        counter_m, goal_m = self.faults.counter_z_m, float(kinematics.forward(self.reached_rad()).position_m[2])
        return 0.0 if counter_m is None else max(counter_m - goal_m, 0.0)

    def write_group(self, positions: list[float]) -> None:
        """A new goal for all joints."""
        self.from_rad, self.began_s = self.reached_rad(), time.monotonic()
        self.goal_rad = np.array(positions, dtype=np.float64)
        self.log("group", positions=[float(v) for v in positions])

    def write_single(self, name: str, value: float) -> None:
        """Effort of the gripper's motor."""
        assert name == "gripper", name
        self.finger_from_m, self.finger_began_s = self.finger_m(), time.monotonic()
        self.finger_effort = -value if self.faults.reversed_gripper else value
        self.log("gripper", effort=value)

    def finger_m(self) -> float:
        """PWM drives the fingers until something stops them; nothing stops them at an opening that was asked for."""
        speed = math.copysign(FINGER_SPEED_M_S, self.finger_effort) if abs(self.finger_effort) > 50.0 else 0.0
        lowest = max(kinematics.FINGER_MIN_M, self.faults.object_m)
        moved = self.finger_from_m + speed * (time.monotonic() - self.finger_began_s)
        return min(max(moved, lowest), kinematics.FINGER_MAX_M)

    def effort_ma(self) -> list[float]:
        """Currents of the six joints; pressing on the counter takes weight off the shoulder (a guess, not measured)."""
        effort = list(self.faults.effort_ma or REST_EFFORT_MA)
        effort[1] -= PRESS_MA_PER_M * self.pressed_m()
        return effort

    def joint_states(self) -> JointState:
        """The newest message; a driver that died leaves its last one."""
        if self.faults.frozen and self._frozen is not None:
            return self._frozen
        finger_m = self.finger_m()
        position = [*(float(v) for v in self.measured_rad()), 0.0, finger_m, -finger_m]
        effort = [*self.effort_ma(), self.finger_effort, 0.0, 0.0]
        stamp = Stamp(int(time.monotonic() * 1000.0))
        self._frozen = JointState(Header(stamp), list(NAMES), position, [0.0] * len(NAMES), effort)
        return self._frozen

    def registers(self, register: str) -> list[int]:
        """One register of all motors; a motor that lost its cable is missing from the list."""
        value = {"Hardware_Error_Status": 0, "Present_Temperature": self.faults.temperature_c}.get(register, 0)
        values = [value] * MOTORS
        if register == "Hardware_Error_Status":
            values[1] = self.faults.hardware_error
        return values[: MOTORS - self.faults.silent_motors]
