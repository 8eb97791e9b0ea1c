"""The arithmetic of one row's motion: how it is divided, what each substep asks of the filter, what is left of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.safety_geometry import motion_seconds, rotation_of
from vlm2vla_client.safety_types import MAX_SUBSTEP_M, MAX_SUBSTEP_S, Decision, Limits, RobotState, SafetyContext
from vlm2vla_twin.kinematics import Pose

FloatArray = NDArray[np.float64]


#: How far the arm may be from where it was expected when it was checked ahead: half of what counts as touching.
AHEAD_TOLERANCE_M: Final = 0.0015
AHEAD_TOLERANCE_RAD: Final = 0.02


@dataclass(frozen=True, eq=False)
class Ahead:
    """A check of a substep that passed shortly before its time, and where the arm was expected then."""

    state: RobotState
    context: SafetyContext
    decision: Decision

    def still_holds(self, state: RobotState, context: SafetyContext) -> bool:
        """Whether the arm touches now what it touched then, and has come where it was expected."""
        return context == self.context and _near(state, self.state)


@dataclass
class Leg:
    """The translation of one row while it runs."""

    goal_m: FloatArray
    base: Pose
    turned_rad: FloatArray
    gripper: float
    width: int
    steps: int
    step_s: float
    done: int = 0
    touched: bool = False
    stop: Decision | None = None
    ahead: Ahead | None = None

    def wanted(self, at_m: FloatArray, step: int) -> Pose:
        """Where a substep leads that begins where the one before it was to end."""
        position_m, rotation = at_m + (self.goal_m - at_m) / (self.steps - step + 1), self.base.rotation
        if self.turned_rad.any():
            rotation = rotation_of(self.turned_rad * (step / self.steps)) @ rotation
        return Pose(position_m, rotation)


@dataclass(frozen=True, eq=False)
class UnderWay:
    """A substep that the arm is doing: of ``leg``, from ``from_m`` [3] to ``target``, until ``ends_s`` of the clock."""

    leg: Leg
    from_m: FloatArray
    target: Pose
    ends_s: float

    def coming(self, state: RobotState, now_s: float) -> RobotState:
        """The state to expect when it has ended, from the one measured at ``now_s``; that one itself when it has.

        The arm is taken to move evenly, and to be as far beside its target then as it is beside its way now.
        """
        if now_s >= self.ends_s:
            return state
        left = min((self.ends_s - now_s) / self.leg.step_s, 1.0)
        here_m = np.asarray(state.ee_position_m)
        there_m = here_m + left * (self.target.position_m - self.from_m)
        to_tips_m, rotation = np.asarray(state.finger_tips_m) - here_m, np.asarray(state.ee_rotation)
        if self.leg.turned_rad.any():
            turn = rotation_of(self.leg.turned_rad * (left / self.leg.steps))
            to_tips_m, rotation = to_tips_m @ turn.T, turn @ rotation
        return replace(state, ee_position_m=there_m, ee_rotation=rotation, finger_tips_m=there_m + to_tips_m)


@dataclass(frozen=True, eq=False)
class Judged:
    """The filter's word on a row, and all that it was asked with. leg: None for a row that was refused."""

    row: Sequence[float]
    state: RobotState
    base: Pose
    context: SafetyContext
    decision: Decision
    leg: Leg | None

    def still_holds(self, row: Sequence[float], state: RobotState, base: Pose, context: SafetyContext) -> bool:
        """Whether the filter would be asked the same now: this row, from the same base, touching the same.

        The states are moved to their base, so what may differ is how the gripper stands about it.
        """
        return row is self.row and base is self.base and context == self.context and _near(state, self.state)


def _near(state: RobotState, other: RobotState) -> bool:
    """Whether end effector and finger tips are in the same place, the gripper points the same way, and both are new."""
    now, then = (state.ee_position_m, *state.finger_tips_m), (other.ee_position_m, *other.finger_tips_m)
    lately = state.stamp_s - other.stamp_s <= MAX_SUBSTEP_S
    turned = sum(row[0] * other_row[0] for row, other_row in zip(state.ee_rotation, other.ee_rotation, strict=True))
    placed = all(math.dist(a, b) <= AHEAD_TOLERANCE_M for a, b in zip(now, then, strict=True))
    return lately and placed and turned >= math.cos(AHEAD_TOLERANCE_RAD)


def plan_leg(state: RobotState, base: Pose, row: list[float], pace: Limits) -> Leg:
    """Divide a filtered row into substeps of at most 0.02 m and 0.1 s at the speeds of ``pace``; none for no motion."""
    moved = np.array(row[:3])
    turned = np.array(row[3:6]) if len(row) == 7 else np.zeros(3)
    goal = base.position_m + moved
    if not moved.any() and not turned.any():
        return Leg(goal, base, turned, row[-1], len(row), 0, 0.0)
    lever = float(np.linalg.norm(np.asarray(state.finger_tips_m) - np.asarray(state.ee_position_m), axis=1).max())
    seconds = motion_seconds(moved, turned, lever, pace)
    travel = float(np.linalg.norm(moved)) + lever * float(np.linalg.norm(turned))
    # A hair less than the quotient, so that rounding does not buy an extra substep.
    steps = max(math.ceil(travel / MAX_SUBSTEP_M - 1e-9), math.ceil(seconds / MAX_SUBSTEP_S - 1e-9), 1)
    return Leg(goal, base, turned, row[-1], len(row), steps, seconds / steps)


def as_if_at(state: RobotState, base: Pose) -> RobotState:
    """The measured state moved to the pose that a row is relative to."""
    shift = base.position_m - np.asarray(state.ee_position_m)
    return replace(
        state,
        ee_position_m=base.position_m,
        ee_rotation=base.rotation,
        finger_tips_m=np.asarray(state.finger_tips_m) + shift,
    )


def row_between(state: RobotState, wanted: Pose, leg: Leg) -> list[float]:
    """The row that leads from the measured pose to the wanted one: what the arm will really do."""
    shift = wanted.position_m - np.asarray(state.ee_position_m)
    row = [float(v) for v in shift]
    if leg.width == 7:
        row += roll_pitch_yaw(wanted.rotation @ np.asarray(state.ee_rotation).T)
    return [*row, leg.gripper]


def roll_pitch_yaw(rotation: FloatArray) -> list[float]:
    """Angles of a small rotation; the inverse of ``rotation_of`` (far from its singularity at 90 degrees of pitch)."""
    return [
        math.atan2(rotation[2, 1], rotation[2, 2]),
        math.asin(min(max(-rotation[2, 0], -1.0), 1.0)),
        math.atan2(rotation[1, 0], rotation[0, 0]),
    ]


def apply_decision(state: RobotState, wanted: Pose, decision: Decision, leg: Leg) -> Pose | None:
    """The pose to command for a filtered substep; contact flattens the rest of the row too."""
    if decision.row is None:
        return None
    if decision.verdict == "pass":
        return wanted
    target = np.asarray(state.ee_position_m) + np.array(decision.row[:3])
    if not decision.ends_chunk:
        leg.touched = True
        changed = np.abs(target - wanted.position_m) > 1e-9
        leg.goal_m = np.where(changed, target, leg.goal_m)
        return Pose(target, wanted.rotation)
    if leg.width == 7:
        turn = rotation_of(np.array([decision.row[3:6]]))[0]
        return Pose(target, turn @ np.asarray(state.ee_rotation, dtype=np.float64))
    return Pose(target, wanted.rotation)


def decision_data(decision: Decision) -> dict[str, Any]:
    """A decision as the recorder writes it."""
    return {
        "allowed": decision.row,
        "verdict": decision.verdict,
        "reasons": [str(reason) for reason in decision.reasons],
        "ends_chunk": decision.ends_chunk,
    }


def row_data(index: int, row: list[float], judged: Judged) -> dict[str, Any]:
    """A row and the filter's word on it as the recorder writes them."""
    contacts = sorted(judged.context.contacts)
    return {"index": index, "row": row, **decision_data(judged.decision), "contacts": contacts}


def substep_data(step: int, leg: Leg, state: RobotState, target: Pose | None, decision: Decision) -> dict[str, Any]:
    """One substep as the recorder writes it; a replay reads the joints back."""
    return {
        "step": step,
        "of": leg.steps,
        "duration_s": leg.step_s,
        "joints_rad": [float(v) for v in state.joints_rad],
        "ee_position_m": [float(v) for v in state.ee_position_m],
        "gripper": float(state.gripper),
        "commanded_m": None if target is None else [float(v) for v in target.position_m],
        **decision_data(decision),
    }
