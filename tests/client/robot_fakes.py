"""Typed fakes for the robot side: a clock that moves by hand, arms that misbehave, states of the real kinematics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.errors import RobotError
from vlm2vla_client.recorder import Recorder
from vlm2vla_client.robots.replay import ReplayRobot
from vlm2vla_client.safety import Limits, RobotState, SafetyContext
from vlm2vla_twin import kinematics

FloatArray = NDArray[np.float64]
GUESS = (0.0, -0.6, 0.7, 0.0, 1.4, 0.0)


def limits(**changes: object) -> Limits:
    """The limits of the twin: counter at 0, wall at 0.56 m."""
    given: dict[str, object] = {"counter_z_m": 0.0, "wall_x_m": 0.56, "max_joint_speed_rad_s": np.pi, **changes}
    return Limits(**given)  # type: ignore[arg-type]  # fields by name, of any type


def policy_context(**changes: object) -> SafetyContext:
    """A fresh row of the running episode."""
    return replace(SafetyContext("e1", "e1", 0.1, 1.0), **changes)  # type: ignore[arg-type]  # fields by name, of any type


def joints_at(position_m: Sequence[float]) -> FloatArray:
    """Joints with the gripper straight down at a position."""
    joints = kinematics.inverse(np.asarray(position_m), kinematics.DOWN, GUESS, 1e-7, 1e-6)
    assert joints is not None, position_m
    return joints


def state_at(position_m: Sequence[float], finger_m: float = 0.037, stamp_s: float = 0.0) -> RobotState:
    """A consistent state with the gripper straight down."""
    joints = joints_at(position_m)
    pose = kinematics.forward(joints)
    tips = kinematics.tips_of_pose(pose, finger_m)
    return RobotState(np.asarray(position_m, dtype=float), kinematics.DOWN, tips, joints, 1.0, stamp_s)


class ManualClock:
    """Time passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.time_s = 100.0
        self.longest_sleep_s = 0.0

    def now_s(self) -> float:
        return self.time_s

    def sleep_s(self, duration_s: float) -> None:
        self.longest_sleep_s = max(self.longest_sleep_s, duration_s)
        self.time_s += max(duration_s, 0.0)


class ClosingRecorder(Recorder):
    """Closes its file when the test that made it has gone."""

    def __del__(self) -> None:
        self.close()


class ScriptedMonitor:
    """Reports a fault from the n-th poll on."""

    def __init__(self, fault_at_poll: int, text: str = "the server is gone") -> None:
        self.polls, self.fault_at_poll, self.text = 0, fault_at_poll, text

    def fault(self) -> str | None:
        self.polls += 1
        return self.text if self.polls >= self.fault_at_poll else None


class FakeArm(ReplayRobot):
    """An ideal arm that records what it is told and can be made to misbehave."""

    def __init__(self, clock: ManualClock, position_m: Sequence[float] = (0.30, 0.0, 0.15)) -> None:
        super().__init__(clock, joints_at(position_m))
        self.commands: list[tuple[FloatArray, float, float]] = []
        self.tips_aside_m: list[float] = []  # of the finger tips from the end effector, along y, at each command
        self.grips: list[bool] = []
        self.holds: list[tuple[str, float]] = []
        self.fail_at_command: int | None = None
        self.drift_after: tuple[int, Sequence[float]] | None = None
        self.stuck = False
        self.state_delay_s = 0.0
        self.position_error_m = 0.0
        self.touches: frozenset[str] = frozenset()

    def state(self) -> RobotState:
        state = super().state()
        shifted = np.asarray(state.ee_position_m) + np.array([self.position_error_m, 0.0, 0.0])
        return replace(state, stamp_s=state.stamp_s - self.state_delay_s, ee_position_m=shifted)

    def contacts(self) -> frozenset[str]:
        return self.touches

    def command(self, position_m: FloatArray, rotation: FloatArray, duration_s: float) -> None:
        if self.fail_at_command == len(self.commands):
            raise RobotError("no answer from the driver")
        self.commands.append((np.array(position_m), duration_s, self._clock.now_s()))
        state = super().state()
        self.tips_aside_m.append(float(np.abs(np.subtract(state.finger_tips_m, state.ee_position_m))[:, 1].max()))
        if self.drift_after is not None and len(self.commands) == self.drift_after[0]:
            self._from = self._goal = joints_at(self.drift_after[1])
        elif not self.stuck:
            super().command(position_m, rotation, duration_s)

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        self.grips.append(open_)
        super().set_gripper(open_, deadline_s)

    def hold(self, reason: str) -> None:
        self.holds.append((reason, self._clock.now_s()))
        super().hold(reason)
