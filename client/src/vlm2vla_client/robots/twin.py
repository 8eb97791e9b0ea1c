"""The physics twin as a robot, and the clock that drives it.

Time in the twin passes only in :meth:`TwinClock.sleep_s`: whoever waits makes the physics run. So the same executor and
loop that serve an arm run here faster than real time, and everything stays a function of the seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.errors import RobotError
from vlm2vla_client.robots.base import RobotCapabilities
from vlm2vla_client.safety_types import RobotState
from vlm2vla_twin import kinematics
from vlm2vla_twin.physics import World

FloatArray = NDArray[np.float64]

_CONTROL_S = 0.02
_IK_TOLERANCE_M = 1e-5
_IK_TOLERANCE_RAD = 1e-4


class TwinClock:
    """Monotonic time that advances a simulated world while it sleeps.

    ``now_s`` counts wall time (so that the age of an answer is real) plus the simulated seconds that were slept,
    which take almost no wall time; with ``realtime`` they take as long as they say. ``simulated`` counts the slept
    seconds alone: then an episode is the same on any computer, however busy, and a wait for an answer takes no time.
    Observers in ``on_advance`` are called after every control step of 0.02 s, for instance by a judge; ``drivers``
    before it, with its length. Not thread-safe: one thread sleeps and reads.
    """

    def __init__(self, world: World, *, realtime: bool = False, simulated: bool = False) -> None:
        self._world = world
        self._realtime = realtime
        self.simulated = simulated
        self._shift_s = 0.0
        self.on_advance: list[Callable[[], None]] = []
        self.drivers: list[Callable[[float], None]] = []

    def now_s(self) -> float:
        """Wall time plus simulated time, or simulated time alone, seconds."""
        return self._world.time_s if self.simulated else time.monotonic() + self._shift_s

    def sleep_s(self, duration_s: float) -> None:
        """Advance the physics by ``duration_s`` (rounded to its 2 ms step, at least one); nothing for zero or less."""
        left_s = duration_s
        while left_s > 1e-9:
            step_s = max(min(_CONTROL_S, left_s), 0.002)
            left_s -= step_s
            began_s = time.monotonic()
            for drive in self.drivers:
                drive(step_s)
            self._world.step(step_s)
            for observe in self.on_advance:
                observe()
            if self._realtime:
                time.sleep(max(step_s - (time.monotonic() - began_s), 0.0))
            # However long the computer took, this step lasted step_s.
            self._shift_s += step_s - (time.monotonic() - began_s)


class TwinRobot:
    """The WidowX 250S of the twin: pose commands become joint targets, reached over the commanded time."""

    def __init__(self, world: World, clock: TwinClock) -> None:
        self._world, self._clock = world, clock
        self._from = self._goal = self._target = np.array(world.joints_rad(), dtype=np.float64)
        self._elapsed_s = self._duration_s = 0.0

    @property
    def capabilities(self) -> RobotCapabilities:
        """Not physical; arrives within 3 mm."""
        return RobotCapabilities("twin", physical=False, arrival_tolerance_m=0.003)

    def connect(self) -> None:
        """Attach to the clock, so that commands are followed while it advances. Does not move."""
        if self._drive not in self._clock.drivers:
            self._clock.drivers.append(self._drive)

    def state(self) -> RobotState:
        """The simulated encoders, now."""
        pose = self._world.ee_pose()
        return RobotState(
            ee_position_m=pose.position_m,
            ee_rotation=pose.rotation,
            finger_tips_m=self._world.finger_tips_m(),
            joints_rad=self._world.joints_rad(),
            gripper=self._world.gripper_fraction(),
            stamp_s=self._clock.now_s(),
        )

    def contacts(self) -> frozenset[str]:
        """What the gripper touches of counter and wall."""
        return self._world.contacts()

    def command(self, position_m: FloatArray, rotation: FloatArray, duration_s: float) -> None:
        """Go to a pose in ``duration_s`` seconds. Raises RobotError when no joint angles reach it."""
        goal = kinematics.inverse(position_m, rotation, self._goal, _IK_TOLERANCE_M, _IK_TOLERANCE_RAD)
        if goal is None:
            raise RobotError(f"no joint angles reach {np.round(position_m, 3).tolist()} m from here")
        if self._drive not in self._clock.drivers:
            raise RobotError("not connected: call connect() first")
        self._from, self._goal = self._target, goal
        self._elapsed_s, self._duration_s = 0.0, max(duration_s, 0.0)

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        """Open, or close with bounded force; the fingers move while the clock advances."""
        self._world.command_gripper(open_)

    def hold(self, reason: str) -> None:
        """Make the measured joints the goal; the grip stays as it is."""
        self._from = self._goal = self._target = np.array(self._world.joints_rad(), dtype=np.float64)
        self._elapsed_s = self._duration_s = 0.0
        self._world.command_joints(self._target)

    def close(self) -> None:
        """Hold and detach from the clock."""
        self.hold("closed")
        if self._drive in self._clock.drivers:
            self._clock.drivers.remove(self._drive)

    def _drive(self, step_s: float) -> None:
        self._elapsed_s = min(self._elapsed_s + step_s, self._duration_s)
        share = 1.0 if self._duration_s <= 0.0 else self._elapsed_s / self._duration_s
        self._target = self._from + share * (self._goal - self._from)
        self._world.command_joints(self._target)
