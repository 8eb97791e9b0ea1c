"""The last stop before the robot: ``(row, state, context, limits) -> Decision``. Pure.

It runs on every row and again before every substep with fresh state. Whatever a row, a state or a context contains,
the answer is a decision and never an exception; what cannot be checked does not move. docs/safety.md lists the rules in
the order in which they are applied; appendix D.2 of the paper is the origin of the contact rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.safety_geometry import Batch, Screened, motion_seconds, rotation_of, screen
from vlm2vla_client.safety_types import Box, Decision, Limits, Reason, RobotState, SafetyContext
from vlm2vla_twin import kinematics

FloatArray = NDArray[np.float64]

#: Inverse kinematics must be much finer than a substep, or its own slack looks like joint motion.
_IK_TOLERANCE_M = 1e-5
_IK_TOLERANCE_RAD = 1e-4
_CONTACTS = frozenset({"counter", "wall"})
_REASON_ORDER = {reason: place for place, reason in enumerate(Reason)}


def filter_row(row: Sequence[float], state: RobotState, context: SafetyContext, limits: Limits) -> Decision:
    """Decide what of one row may be executed from one measured state.

    Args:
        row: [dx_m, dy_m, dz_m, gripper], or [dx_m, dy_m, dz_m, droll_rad, dpitch_rad, dyaw_rad, gripper] with the
            rotation about the end effector in the base frame.
        state: the measured state, fresh.
        context: where the row came from and what the gripper touches.
        limits: what to enforce.

    Never raises for any content of the first three, does not block. About 1 ms, 2 ms with a rotation.
    """
    numbers = _numbers_of_row(row)
    if isinstance(numbers, Reason):
        return _refused(numbers)
    known_context = _read_context(context)
    if known_context is None:
        return _refused(Reason.BAD_CONTEXT)
    known_state = _read_state(state)
    if known_state is None:
        # A row that would be refused for itself says so, even when the state is unreadable too.
        known_state, reason = _NOWHERE, Reason.BAD_STATE
    else:
        reason = None
    result = screen(_batch_of_one(numbers, known_state, known_context), limits)
    if result.refused[0]:
        return _refused(*_reasons(result))
    if reason is not None:
        return _refused(reason)
    reason = _joints_reason(known_state, result.translation_m[0], result.rotation_rad[0], limits)
    if reason is not None:
        return _refused(*_reasons(result), reason)
    return _decision(numbers, result)


def is_fully_zeroed(row: Sequence[float], decision: Decision) -> bool:
    """Whether a row's non-zero translation was stopped completely by contact (three such rows end a chunk)."""
    if decision.row is None or not any(row[:3]):
        return False
    touched = {Reason.COUNTER_CONTACT, Reason.WALL_CONTACT} & set(decision.reasons)
    return bool(touched) and not any(decision.row[:3])


@dataclass(frozen=True, eq=False)
class _State:
    ee_m: FloatArray
    rotation: FloatArray
    tips_m: FloatArray
    joints_rad: FloatArray


@dataclass(frozen=True)
class _Context:
    foreign: bool
    frame_age_s: float
    answer_age_s: float
    operator: bool
    counter: bool
    wall: bool
    zeroed_before: int


_NOWHERE = _State(np.zeros(3), np.eye(3), np.zeros((2, 3)), np.zeros(6))


def _number(value: object) -> float | None:
    """A real number as a float (NaN and infinity included, huge integers as infinity); None for anything else."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _numbers_of_row(row: Any) -> FloatArray | Reason:
    if not isinstance(row, list | tuple | np.ndarray) or (isinstance(row, np.ndarray) and row.ndim != 1):
        return Reason.WRONG_SHAPE
    if len(row) not in (4, 7):
        return Reason.WRONG_SHAPE
    numbers = [_number(value) for value in row]
    if any(value is None for value in numbers):
        return Reason.WRONG_SHAPE
    return np.array([numbers], dtype=np.float64)


def _array(values: Any, shape: tuple[int, ...]) -> FloatArray | None:
    """Finite floats of exactly this shape, or None."""
    try:
        raw = np.asarray(values)
        if raw.dtype.kind not in "iuf" or raw.shape != shape:
            return None
        array = raw.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return array if bool(np.isfinite(array).all()) else None


def _read_state(state: Any) -> _State | None:
    try:
        ee = _array(state.ee_position_m, (3,))
        rotation = _array(state.ee_rotation, (3, 3))
        tips = _array(state.finger_tips_m, (2, 3))
        joints = _array(state.joints_rad, (6,))
        scalars = (_number(state.gripper), _number(state.stamp_s))
    except AttributeError:
        return None
    if ee is None or rotation is None or tips is None or joints is None:
        return None
    if any(value is None or not math.isfinite(value) for value in scalars):
        return None
    # Larger numbers are no arm, and their squares could overflow.
    if max(float(np.abs(part).max()) for part in (ee, rotation, tips, joints)) > 1e3:
        return None
    proper = np.abs(rotation.T @ rotation - np.eye(3)).max() <= 1e-3 and float(np.linalg.det(rotation)) > 0.0
    return _State(ee, rotation, tips, joints) if proper else None


def _read_context(context: Any) -> _Context | None:
    try:
        ids = (context.episode_id, context.row_episode_id)
        ages = (context.frame_age_at_send_s, context.answer_age_s)
        contacts, count, source = context.contacts, context.fully_zeroed_rows_before, context.source
    except AttributeError:
        return None
    if not all(isinstance(name, str) for name in (*ids, source)) or source not in ("policy", "operator"):
        return None
    if not isinstance(contacts, set | frozenset | list | tuple):
        return None
    if not all(isinstance(name, str) and name in _CONTACTS for name in contacts):
        return None
    if isinstance(count, bool) or not isinstance(count, Integral):
        return None
    numbers = [math.nan if age is None else _number(age) for age in ages]
    if any(value is None for value in numbers):
        return None
    # NaN stands for "unknown" further on; an age that is NaN itself must not pass as that, not even for an operator.
    frame_age, answer_age = (
        math.inf if age is not None and math.isnan(value) else value
        for age, value in zip(ages, (float(n) for n in numbers if n is not None), strict=True)
    )
    zeroed_before = min(max(int(count), 0), 1000)
    return _Context(
        ids[0] != ids[1],
        frame_age,
        answer_age,
        source == "operator",
        "counter" in contacts,
        "wall" in contacts,
        zeroed_before,
    )


def _batch_of_one(numbers: FloatArray, state: _State, context: _Context) -> Batch:
    return Batch(
        rows=numbers,
        ee_m=state.ee_m[None],
        tips_m=state.tips_m[None],
        foreign=np.array([context.foreign]),
        frame_age_s=np.array([context.frame_age_s]),
        answer_age_s=np.array([context.answer_age_s]),
        operator=np.array([context.operator]),
        counter=np.array([context.counter]),
        wall=np.array([context.wall]),
        zeroed_before=np.array([context.zeroed_before]),
    )


def _joints_reason(state: _State, moved_m: FloatArray, turned_rad: FloatArray, limits: Limits) -> Reason | None:
    """Whether the arm itself can do the motion: reachable, within the joint limits, no joint too fast."""
    if not moved_m.any() and not turned_rad.any():
        return None
    goal = rotation_of(turned_rad[None])[0] @ state.rotation if turned_rad.any() else state.rotation
    tolerances = (_IK_TOLERANCE_M, _IK_TOLERANCE_RAD)
    start = kinematics.inverse(state.ee_m, state.rotation, state.joints_rad, *tolerances)
    if start is None:
        return Reason.UNREACHABLE
    end = kinematics.inverse(state.ee_m + moved_m, goal, start, *tolerances)
    if end is None:
        return Reason.UNREACHABLE
    if not kinematics.within_limits(end, limits.joint_margin_rad):
        return Reason.JOINT_LIMIT
    lever = float(np.linalg.norm(state.tips_m - state.ee_m, axis=1).max())
    seconds = motion_seconds(moved_m, turned_rad, lever, limits)
    if float(np.abs(end - start).max()) > limits.max_joint_speed_rad_s * seconds:
        return Reason.JOINT_SPEED
    return None


def _reasons(result: Screened) -> list[Reason]:
    return sorted((reason for reason, mask in result.reasons.items() if mask[0]), key=_REASON_ORDER.__getitem__)


def _refused(*reasons: Reason) -> Decision:
    return Decision(None, "refuse", reasons, True)


def _decision(numbers: FloatArray, result: Screened) -> Decision:
    given = [float(value) for value in numbers[0]]
    turned = [float(v) for v in result.rotation_rad[0]] if len(given) == 7 else []
    allowed = [*(float(v) for v in result.translation_m[0]), *turned, given[-1]]
    ends = bool(result.ends[0])
    return Decision(allowed, "pass" if allowed == given and not ends else "clip", tuple(_reasons(result)), ends)


__all__ = [
    "Box",
    "Decision",
    "Limits",
    "Reason",
    "RobotState",
    "SafetyContext",
    "filter_row",
    "is_fully_zeroed",
]
