"""An arm without physics that does exactly what it is told, started where a recording started.

It repeats a recorded episode's motions through the same filter and executor, with no simulator and no hardware: for
looking at a recording again, and for checking that a change of limits would have stopped it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import RobotError
from vlm2vla_client.robots.base import RobotCapabilities
from vlm2vla_client.safety_types import RobotState
from vlm2vla_twin import kinematics

FloatArray = NDArray[np.float64]

_GRIPPER_S = 0.3
#: Arm over the counter, gripper down: where a replay begins when the recording does not say.
HOME_RAD = (0.0, 0.02180, 0.18424, 0.0, 1.36474, 0.0)


def first_joints_rad(event_lines: Iterable[str]) -> FloatArray | None:
    """Joints [6] of the first event of a recording (lines of events.jsonl) that carries any; None without one.

    Raises RobotError for a line, other than an incomplete last one, that is not a JSON object.
    """
    pending: str | None = None
    for line in event_lines:
        if pending is not None:
            raise RobotError(f"not a line of events.jsonl: {pending[:80]!r}")
        try:
            event = json.loads(line)
        except ValueError:
            pending = line
            continue
        joints = _joints_in(event)
        if joints is not None:
            return joints
    return None


def _joints_in(event: object) -> FloatArray | None:
    if not isinstance(event, dict):
        return None
    data = event.get("data")
    for place in (event, data if isinstance(data, dict) else {}):
        joints = place.get("joints_rad")
        if isinstance(joints, list) and len(joints) == 6 and all(isinstance(v, int | float) for v in joints):
            return np.array(joints, dtype=np.float64)
    return None


class ReplayRobot:
    """Ideal kinematics: every commanded pose is reached on time, every grip closes on nothing."""

    def __init__(self, clock: Clock, start_joints_rad: FloatArray | None = None) -> None:
        self._clock = clock
        self._from = self._goal = np.array(HOME_RAD if start_joints_rad is None else start_joints_rad, dtype=np.float64)
        self._began_s, self._duration_s = clock.now_s(), 0.0
        self._grip_from = self._grip_goal = 1.0
        self._grip_began_s = clock.now_s()

    @property
    def capabilities(self) -> RobotCapabilities:
        """Not physical."""
        return RobotCapabilities("replay", physical=False, arrival_tolerance_m=0.003)

    def connect(self) -> None:
        """Check that the start is a pose the arm can have."""
        if not kinematics.within_limits(self._goal):
            raise RobotError("the recording starts outside the joint limits")

    def state(self) -> RobotState:
        """Where an ideal arm would be now."""
        now_s = self._clock.now_s()
        joints, opening = self._joints(now_s), self._opening(now_s)
        pose = kinematics.forward(joints)
        finger_m = kinematics.FINGER_MIN_M + opening * (kinematics.FINGER_MAX_M - kinematics.FINGER_MIN_M)
        tips = kinematics.tips_of_pose(pose, finger_m)
        return RobotState(pose.position_m, pose.rotation, tips, joints, opening, now_s)

    def contacts(self) -> frozenset[str]:
        """Nothing is there to be touched; the filter still infers the counter from heights."""
        return frozenset()

    def command(self, position_m: FloatArray, rotation: FloatArray, duration_s: float) -> None:
        """Go to a pose in ``duration_s`` seconds. Raises RobotError when no joint angles reach it."""
        now_s = self._clock.now_s()
        here = self._joints(now_s)
        goal = kinematics.inverse(position_m, rotation, here, 1e-5, 1e-4)
        if goal is None:
            raise RobotError(f"no joint angles reach {np.round(position_m, 3).tolist()} m from here")
        self._from, self._goal, self._began_s, self._duration_s = here, goal, now_s, max(duration_s, 0.0)

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        """Open or close; takes 0.3 s of the clock."""
        now_s = self._clock.now_s()
        self._grip_from, self._grip_goal, self._grip_began_s = self._opening(now_s), float(open_), now_s

    def hold(self, reason: str) -> None:
        """Stay where the arm is now."""
        self._from = self._goal = self._joints(self._clock.now_s())
        self._duration_s = 0.0

    def close(self) -> None:
        """Nothing to release."""
        self.hold("closed")

    def _joints(self, now_s: float) -> FloatArray:
        if self._duration_s <= 0.0:
            return self._goal
        share = min(max((now_s - self._began_s) / self._duration_s, 0.0), 1.0)
        return self._from + share * (self._goal - self._from)

    def _opening(self, now_s: float) -> float:
        share = min(max((now_s - self._grip_began_s) / _GRIPPER_S, 0.0), 1.0)
        return self._grip_from + share * (self._grip_goal - self._grip_from)
