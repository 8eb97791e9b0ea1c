"""An arm that lets every command through and writes down what no command may be.

It stands where the robot stands and shares no code with the safety filter, only the arm's kinematics.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.robots.base import Robot, RobotCapabilities
from vlm2vla_client.safety import Limits, RobotState
from vlm2vla_twin import kinematics
from vlm2vla_twin.kinematics import Pose

FloatArray = NDArray[np.float64]
EPS_M = 1e-6
FINGER_EPS_M = 0.001
"""Fingers swing a little while the arm moves."""
MAX_SUBSTEP_M = 0.02
TRACKING_M = 0.004
"""How far the simulated arm may be from where it was sent, in motion."""


class SeamMonitor:
    """Wraps a Robot; ``wrong`` lists every command and every measured state that breaks a limit."""

    def __init__(self, robot: Robot, limits: Limits) -> None:
        self._robot, self._limits = robot, limits
        self._last_m: FloatArray | None = None
        self._joints = np.asarray(robot.state().joints_rad, dtype=np.float64)
        self._down = np.asarray(robot.state().ee_rotation, dtype=np.float64)
        self.commands: list[FloatArray] = []
        self.wrong: list[str] = []

    @property
    def capabilities(self) -> RobotCapabilities:
        return self._robot.capabilities

    def connect(self) -> None:
        self._robot.connect()

    def state(self) -> RobotState:
        return self._robot.state()

    def contacts(self) -> frozenset[str]:
        return self._robot.contacts()

    def command(self, position_m: FloatArray, rotation: FloatArray, duration_s: float) -> None:
        position = np.array(position_m, dtype=np.float64)
        self._check_place(position, np.asarray(rotation))
        self._check_speed(position, duration_s)
        self._check_joints(position, np.asarray(rotation), duration_s)
        self.commands.append(position)
        self._last_m = position
        self._robot.command(position_m, rotation, duration_s)

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        self._robot.set_gripper(open_, deadline_s)

    def hold(self, reason: str) -> None:
        self._last_m = None
        self._robot.hold(reason)

    def close(self) -> None:
        self._robot.close()

    def watch(self) -> None:
        """Called after every control step of the physics: where the arm really is."""
        state, limits = self._robot.state(), self._limits
        low, high = (np.asarray(corner) for corner in (limits.box_min_m, limits.box_max_m))
        at = np.asarray(state.ee_position_m) - [0.0, 0.0, limits.counter_z_m]
        if np.any(at < low - TRACKING_M) or np.any(at > high + TRACKING_M):
            self.wrong.append(f"the arm is at {at.round(4).tolist()}, outside its box")
        lowest = float(np.asarray(state.finger_tips_m)[:, 2].min())
        if lowest < limits.counter_z_m - TRACKING_M:
            self.wrong.append(f"a finger tip is at {lowest:.4f} m, in the counter")

    def _check_place(self, position: FloatArray, rotation: FloatArray) -> None:
        limits = self._limits
        if not (np.all(np.isfinite(position)) and np.all(np.isfinite(rotation))):
            self.wrong.append("a command is not finite")
            return
        left, right = np.asarray(self._robot.state().finger_tips_m)
        tips = kinematics.tips_of_pose(Pose(position, rotation), float(np.linalg.norm(left - right)) / 2.0)
        low, high = (np.asarray(corner) for corner in (limits.box_min_m, limits.box_max_m))
        for point, slack_m in ((position, EPS_M), (tips[0], FINGER_EPS_M), (tips[1], FINGER_EPS_M)):
            at = point - [0.0, 0.0, limits.counter_z_m]
            if np.any(at < low - slack_m) or np.any(at > high + slack_m):
                self.wrong.append(f"commanded {at.round(4).tolist()}, outside the box")
            if point[0] > limits.wall_x_m:
                self.wrong.append(f"commanded {point.round(4).tolist()}, behind the wall")
        # Pressed against something, the arm may be tilted already; a command may keep that, not add to it.
        known = (self._down, np.asarray(self._robot.state().ee_rotation))
        if min(float(np.abs(rotation - other).max()) for other in known) > 0.02:
            self.wrong.append("commanded another orientation; no row asked for one")

    def _check_speed(self, position: FloatArray, duration_s: float) -> None:
        """A delta adds to the last command, or to the measured pose when the arm is not where it was sent."""
        measured = np.asarray(self._robot.state().ee_position_m)
        bases = [measured] if self._last_m is None else [measured, self._last_m]
        distance_m = min(float(np.linalg.norm(position - base)) for base in bases)
        if distance_m > MAX_SUBSTEP_M + EPS_M:
            self.wrong.append(f"a substep of {distance_m:.4f} m")
        if distance_m > self._limits.max_speed_m_s * duration_s + EPS_M:
            self.wrong.append(f"{distance_m:.4f} m in {duration_s:.3f} s")

    def _check_joints(self, position: FloatArray, rotation: FloatArray, duration_s: float) -> None:
        joints = kinematics.inverse(position, rotation, self._joints, 1e-5, 1e-4)
        if joints is None:
            self.wrong.append(f"no joint angles for {position.round(4).tolist()}")
            return
        margin = self._limits.joint_margin_rad - 1e-3
        lower, upper = kinematics.JOINT_LOWER_RAD + margin, kinematics.JOINT_UPPER_RAD - margin
        if np.any(joints < lower) or np.any(joints > upper):
            self.wrong.append(f"joints {joints.round(3).tolist()} at their limits")
        if np.any(np.abs(joints - self._joints) > self._limits.max_joint_speed_rad_s * duration_s + 1e-2):
            self.wrong.append(f"joints turn {np.abs(joints - self._joints).max():.3f} rad in {duration_s:.3f} s")
        self._joints = joints
