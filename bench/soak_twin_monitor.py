"""The independent monitor of `soak_twin.py`, between the client and the arm: it believes nothing and nobody.

Its numbers are those of contracts.md ("Safety filter", "Execution"), written down a second time on purpose; it uses
nothing of the client's filter or executor.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
from soak_twin_faults import KINDS, Faults

from vlm2vla_client.robots.base import FloatArray, Robot, RobotCapabilities
from vlm2vla_client.safety import RobotState

BOX_MIN_M = np.array([0.10, -0.20, 0.00])
BOX_MAX_M = np.array([0.45, 0.25, 0.30])
COUNTER_Z_M = 0.0
MAX_STEP_M = 0.02
MAX_STEP_S = 0.1
MAX_SPEED_M_S = 0.25
PLAY_M = 0.001
"""What measuring and rounding may add."""


@dataclass
class Seen:
    """What the monitor saw of one episode.

    times: what, and (wall, bench's clock) of every command and hold, in order.
    late: (wall, seconds after the fault) of every command that came after the arm must have stood.
    """

    commands: int = 0
    times: list[tuple[str, float, float]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    late: list[tuple[float, float]] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether the arm was told to hold after it was last told to move."""
        return not self.times or self.times[-1][0] == "hold"

    def complain(self, text: str) -> None:
        if len(self.complaints) < 20:
            self.complaints.append(text)


class MonitoredRobot:
    """Hands every call on, and writes down what must not be.

    Args:
        robot: the arm, or what stands for it.
        faults: the episode's, with the limits of their kinds.
        speed: the episode's share of the speed limit.
    """

    def __init__(self, robot: Robot, faults: Faults, speed: float = 1.0) -> None:
        self._robot, self._faults, self._speed = robot, faults, speed
        self._goal_m: FloatArray | None = None
        self._owner = threading.get_ident()
        self._busy_until_s = float("-inf")
        self.seen = Seen()

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
        now = self._note("command")
        self.seen.commands += 1
        for problem in self._problems(np.asarray(position_m, dtype=float), np.asarray(rotation, dtype=float),
                                      float(duration_s), now[1]):  # fmt: skip
            self.seen.complain(f"command {self.seen.commands}: {problem}")
        self._late(now)
        self._robot.command(position_m, rotation, duration_s)
        self._goal_m = np.array(position_m, dtype=float)
        self._busy_until_s = now[1] + float(duration_s)

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        self._late(self._note("command"))
        self._robot.set_gripper(open_, deadline_s)

    def hold(self, reason: str) -> None:
        self._note("hold")
        self._goal_m = None
        self._robot.hold(reason)

    def close(self) -> None:
        self._note("hold")
        self._robot.close()

    def _note(self, what: str) -> tuple[float, float]:
        now = self._faults.now()
        self.seen.times.append((what, *now))
        if threading.get_ident() != self._owner:
            self.seen.complain(f"{what} from another thread than the episode's")
        return now

    def _late(self, now: tuple[float, float]) -> None:
        """A command after the time within which a fault must have stopped the arm."""
        kind, from_s = self._faults.kind, self._faults.from_s
        if kind is None or from_s is None:
            return
        about = KINDS[kind]
        late_s = (now[0] - from_s[0]) if about.wall else (now[1] - from_s[1])
        if about.still_after_s is not None and late_s > about.still_after_s:
            self.seen.late.append((now[0], late_s))

    def _problems(self, position_m: FloatArray, rotation: FloatArray, duration_s: float, now_s: float) -> list[str]:
        found = []
        if position_m.shape != (3,) or rotation.shape != (3, 3):
            return [f"shapes {position_m.shape} and {rotation.shape}"]
        if not (np.isfinite(position_m).all() and np.isfinite(rotation).all() and np.isfinite(duration_s)):
            return ["a number that is not finite"]
        if np.abs(rotation @ rotation.T - np.eye(3)).max() > 1e-6 or np.linalg.det(rotation) < 0:
            found.append("not a rotation")
        state = self._robot.state()
        here = np.asarray(state.ee_position_m, dtype=float)
        tips = np.asarray(state.finger_tips_m, dtype=float) - here
        turned = rotation @ np.asarray(state.ee_rotation, dtype=float).T
        places = np.vstack([position_m, position_m + tips @ turned.T])
        found += self._outside(places, np.vstack([here, here + tips]))
        if not 0.0 < duration_s <= MAX_STEP_S + 1e-9:
            found.append(f"{duration_s} s long")
        if now_s < self._busy_until_s - 0.005:
            found.append(f"{self._busy_until_s - now_s:.3f} s before the one before it has ended")
        starts = [here] if self._goal_m is None else [here, self._goal_m]
        step_m = min(float(np.linalg.norm(position_m - start)) for start in starts)
        if step_m > MAX_STEP_M + PLAY_M:
            found.append(f"a step of {1000 * step_m:.1f} mm")
        if step_m > MAX_SPEED_M_S * self._speed * duration_s + PLAY_M:
            found.append(f"{step_m / max(duration_s, 1e-3):.3f} m/s")
        return found

    @staticmethod
    def _outside(places: FloatArray, before: FloatArray) -> list[str]:
        """End effector or finger tips out of the box (or below the counter), further than they were."""
        floor_m = np.array([0.0, 0.0, COUNTER_Z_M])
        low, high = BOX_MIN_M + floor_m, BOX_MAX_M + floor_m
        out = np.maximum(low - places, places - high).max(axis=1)
        was = np.maximum(low - before, before - high).max(axis=1)
        worse = out > np.maximum(was, 0.0) + PLAY_M
        return [f"outside the box by {1000 * float(out.max()):.1f} mm"] if worse.any() else []
