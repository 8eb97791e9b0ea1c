"""An arm that a person moves through the client: home, calibrate, commission, teleop. Same filter, same executor,
source "operator"; a key holds; everything is recorded.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import RobotError, SafetyStop
from vlm2vla_client.executor import ChunkResult, EventSink, Executor, Monitor, Outcome
from vlm2vla_client.motion import roll_pitch_yaw
from vlm2vla_client.recorder import Recorder
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.safety import Limits, RobotState, SafetyContext

FloatArray = NDArray[np.float64]

#: Rows that a person's command is divided into; half of what the filter lets pass.
ROW_M: Final = 0.025
ROW_RAD: Final = 0.12
TURN_TOLERANCE_RAD: Final = 0.03
#: A pose is searched for from where the arm came to rest, this often.
ATTEMPTS: Final = 3
_PROGRESS_M: Final = 0.001


class OperatorHeld(KeyboardInterrupt):
    """The operator's key held the arm; where nobody goes on from there, it ends the command as Ctrl-C does."""


@dataclass
class OperatorArm:
    """One connected arm under one person's commands.

    Attributes:
        limits: what the filter enforces now.
        speed: share of the speed limits.
        sink: takes the executor's events in the recorder's place.
        commanded_m: where the last command sent the end effector; None after a hold.
    """

    robot: Robot
    clock: Clock
    limits: Limits
    recorder: Recorder
    speed: float
    monitor: Monitor
    sink: EventSink | None = None
    commanded_m: FloatArray | None = None

    def __post_init__(self) -> None:
        """Leaves the grip alone until a row asks for the other one."""
        self._id = uuid.uuid4().hex
        self._gripper = 1.0 if self.robot.state().gripper >= 0.5 else 0.0
        self._executor = self._make()
        self.recorder.limits(self.limits)

    def _make(self) -> Executor:
        return Executor(self.robot, self.clock, self.limits, self.monitor, speed=self.speed,
                        on_event=self._on_event, gripper=self._gripper)  # fmt: skip

    def _on_event(self, kind: str, data: dict[str, Any]) -> None:
        if kind == "substep" and data["commanded_m"] is not None:
            self.commanded_m = np.array(data["commanded_m"])
        elif kind == "hold":
            self.commanded_m = None
        if self.sink is not None:
            self.sink(kind, data)
        else:
            self.recorder.event(kind, **data)

    # --- what is measured -----------------------------------------------------------------------------------------

    def state(self) -> RobotState:
        """The newest measurement."""
        return self.robot.state()

    def position(self) -> FloatArray:
        """The end effector [3]."""
        return np.asarray(self.state().ee_position_m, dtype=np.float64)

    def tips(self) -> FloatArray:
        """Both finger tips [2, 3]."""
        return np.asarray(self.state().finger_tips_m, dtype=np.float64)

    # --- motion ---------------------------------------------------------------------------------------------------

    def rows(self, rows: Sequence[Sequence[float]]) -> ChunkResult:
        """Runs rows as one chunk.

        Raises:
            SafetyStop: the filter refused one; the arm holds.
            RobotError: it did not arrive, or the driver failed; the arm holds.
            OperatorHeld: a key held it.
        """
        context = SafetyContext(self._id, self._id, None, None, source="operator")
        result = self._executor.run_chunk(rows, context)
        self.recorder.event("chunk", outcome=result.outcome, reason=result.reason, rows=len(result.rows))
        if result.outcome is Outcome.FAULT:
            raise OperatorHeld(result.reason)
        if result.outcome is Outcome.REFUSED:
            raise SafetyStop(f"the safety filter {result.reason}; the arm holds, see docs/safety.md")
        if result.outcome is Outcome.NOT_ARRIVED:
            raise RobotError(f"{result.reason}; the arm holds: is something in its way?")
        return result

    def shift(self, shift_m: Sequence[float]) -> ChunkResult:
        """Translates by [3] metres, in rows of at most 2.5 cm an axis. Raises as ``rows`` does."""
        return self.rows(self._divided(np.asarray(shift_m, dtype=np.float64), np.zeros(3)))

    @property
    def grip_open(self) -> bool:
        """What the gripper was last told."""
        return self._gripper >= 0.5

    def turn(self, yaw_rad: float) -> ChunkResult:
        """Turns the gripper about the vertical, at most ``ROW_RAD`` a row. Raises as ``rows`` does."""
        return self.rows(self._divided(np.zeros(3), np.array([0.0, 0.0, yaw_rad])))

    def grip(self, open_: bool) -> ChunkResult:
        """Opens or closes, and waits until the fingers rest. Raises as ``rows`` does."""
        self._gripper = float(open_)
        return self.rows([[0.0, 0.0, 0.0, self._gripper]])

    def go(self, goal_m: FloatArray, rotation: FloatArray | None = None) -> None:
        """To a position [3], and a rotation [3, 3] when given: first up to its height, then across, then down.

        Raises:
            SafetyStop, RobotError, OperatorHeld: as ``rows``; a SafetyStop too when the filter stops it short.
        """
        goal = np.asarray(goal_m, dtype=np.float64)
        tolerance_m = self.robot.capabilities.arrival_tolerance_m
        for _ in range(ATTEMPTS):
            before_m, result = self.position(), None
            for shift, turn in self._way(goal, rotation):
                result = self.rows(self._divided(shift, turn))
                if result.outcome is not Outcome.COMPLETED:
                    break
            gap_m = float(np.linalg.norm(self.position() - goal))
            if gap_m <= tolerance_m and self._turn_left(rotation) <= TURN_TOLERANCE_RAD:
                return
            if result is None or float(np.linalg.norm(self.position() - before_m)) < _PROGRESS_M:
                break
        why = f" ({result.reason})" if result is not None and result.reason else ""
        self.hold("stopped short")
        raise SafetyStop(f"stopped {1000 * gap_m:.0f} mm short of {np.round(goal, 3).tolist()} m{why}; the arm holds")

    def hold(self, reason: str) -> None:
        """Stop here and now."""
        self._executor.hold(reason)

    def _way(self, goal: FloatArray, rotation: FloatArray | None) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Legs of (translation [3], rotation vector [3]); the next one is planned where the last one ended."""
        inside = self._nearest_inside()
        if inside is not None:  # from outside the box only the way in is open
            yield inside - self.base(), np.zeros(3)
        rise = max(float(goal[2] - self.base()[2]), 0.0)
        yield np.array([0.0, 0.0, rise]), np.zeros(3)
        across = (goal - self.base()) * np.array([1.0, 1.0, 0.0])
        turn = np.zeros(3) if rotation is None else rotation_vector(rotation @ self._rotation().T)
        yield across, turn
        yield goal - self.base(), np.zeros(3)

    def base(self) -> FloatArray:
        """What the next row is relative to: the executor's own rule."""
        here = self.position()
        if self.commanded_m is not None and float(np.linalg.norm(here - self.commanded_m)) <= 0.010:
            return self.commanded_m
        return here

    def _rotation(self) -> FloatArray:
        return np.asarray(self.state().ee_rotation, dtype=np.float64)

    def _turn_left(self, rotation: FloatArray | None) -> float:
        if rotation is None:
            return 0.0
        return float(np.linalg.norm(rotation_vector(rotation @ self._rotation().T)))

    def _nearest_inside(self) -> FloatArray | None:
        """Where the end effector must go so that it and both tips are in the box; None when they are."""
        lift = np.array([0.0, 0.0, self.limits.counter_z_m])
        low, high = np.asarray(self.limits.box_min_m) + lift, np.asarray(self.limits.box_max_m) + lift
        here = self.position()
        points = np.vstack([here, self.tips()])
        need = np.maximum(low - points, 0.0).max(axis=0) - np.maximum(points - high, 0.0).max(axis=0)
        return here + need + 0.001 * np.sign(need) if bool((np.abs(need) > 1e-6).any()) else None

    def _divided(self, shift: FloatArray, turn: FloatArray) -> list[list[float]]:
        """Equal rows that add up to a translation and a rotation vector; none for no motion."""
        angle = float(np.linalg.norm(turn))
        count = max(math.ceil(float(np.abs(shift).max()) / ROW_M - 1e-9), math.ceil(angle / ROW_RAD - 1e-9))
        if count == 0 or (angle < 1e-3 and float(np.abs(shift).max()) < 1e-5):
            return []
        part = [float(v) for v in shift / count]
        if angle < 1e-3:
            return [[*part, self._gripper]] * count
        return [[*part, *roll_pitch_yaw(matrix_of(turn / count)), self._gripper]] * count


def rotation_vector(rotation: FloatArray) -> FloatArray:
    """Axis times angle [3] of a rotation [3, 3]; of a half turn, one of its two axes."""
    angle = math.acos(min(max(0.5 * (float(np.trace(rotation)) - 1.0), -1.0), 1.0))
    skew = 0.5 * np.array(
        [rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]]
    )
    if angle < 1e-6:
        return np.zeros(3)
    if angle > math.pi - 1e-4:
        square = 0.5 * (rotation + np.eye(3))
        column = square[:, int(np.argmax(np.diag(square)))]
        return np.asarray(angle * column / np.linalg.norm(column), dtype=np.float64)
    return np.asarray(angle * skew / math.sin(angle), dtype=np.float64)


def matrix_of(vector: FloatArray) -> FloatArray:
    """The rotation [3, 3] of a rotation vector (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    hat = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.asarray(np.eye(3) + math.sin(angle) * hat + (1.0 - math.cos(angle)) * (hat @ hat), dtype=np.float64)


def is_down(rotation: Any, tolerance_rad: float) -> bool:
    """Whether the gripper points straight down, whatever its yaw."""
    return float(-np.asarray(rotation)[2, 0]) >= math.cos(tolerance_rad)
