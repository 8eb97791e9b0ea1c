"""The nouns of the safety filter: what it looks at, the limits it enforces, and what it decides.

Import them from :mod:`vlm2vla_client.safety`; they live here so that the filter's geometry can share them.
Units are metres, seconds and radians; the frame is the robot base (+x forward, +y left, +z up).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from vlm2vla_client.errors import ConfigurationError

Vector3 = tuple[float, float, float]
Box = tuple[Vector3, Vector3]
#: Anything indexable that holds floats: lists, tuples or numpy arrays.
Floats = Sequence[float] | Any

#: An axis of a row above this is refused, not scaled: no chunk of the paper's length contains it.
MAX_SCALED_AXIS_M = 0.10
#: How near the counter or the wall (metres) counts as touching it.
CONTACT_MARGIN_M = 0.003
#: Substeps are at most this long and no shorter than the minimum; joint speeds are judged over that time too.
MAX_SUBSTEP_M = 0.02
MAX_SUBSTEP_S = 0.1
MIN_SUBSTEP_S = 0.02
#: Consecutive rows whose translation was fully zeroed by contact that end a chunk.
MAX_ZEROED_ROWS = 3


class Reason(StrEnum):
    """Why a row was changed or refused. Closed: recordings and reports may rely on this list."""

    WRONG_SHAPE = "wrong_shape"
    NOT_FINITE = "not_finite"
    BAD_GRIPPER = "bad_gripper"
    BAD_CONTEXT = "bad_context"
    BAD_STATE = "bad_state"
    FOREIGN_EPISODE = "foreign_episode"
    STALE_FRAME = "stale_frame"
    STALE_ANSWER = "stale_answer"
    AXIS_OVER_LIMIT = "axis_over_limit"
    AXIS_FAR_OVER_LIMIT = "axis_far_over_limit"
    ROTATION_OVER_LIMIT = "rotation_over_limit"
    ROTATION_FAR_OVER_LIMIT = "rotation_far_over_limit"
    COUNTER_CONTACT = "counter_contact"
    COUNTER_REACHED = "counter_reached"
    WALL_CONTACT = "wall_contact"
    WALL_REACHED = "wall_reached"
    ROTATION_INTO_CONTACT = "rotation_into_contact"
    REPEATED_CONTACT = "repeated_contact"
    BOX = "box"
    FORBIDDEN_BOX = "forbidden_box"
    OUTSIDE_BOX = "outside_box"
    UNREACHABLE = "unreachable"
    JOINT_LIMIT = "joint_limit"
    JOINT_SPEED = "joint_speed"


@dataclass(frozen=True, eq=False)
class RobotState:
    """One measurement of the arm.

    ``ee_position_m`` [3], ``ee_rotation`` [3][3] (columns are the gripper's axes), ``finger_tips_m`` [2][3],
    ``joints_rad`` [6], ``gripper`` 1 open .. 0 closed, ``stamp_s`` on the client's monotonic clock.
    """

    ee_position_m: Floats
    ee_rotation: Floats
    finger_tips_m: Floats
    joints_rad: Floats
    gripper: float
    stamp_s: float


@dataclass(frozen=True)
class SafetyContext:
    """Where a row came from. Ages may be None only for ``source`` "operator" (home, teleop, reset, calibrate)."""

    episode_id: str
    row_episode_id: str
    frame_age_at_send_s: float | None
    answer_age_s: float | None
    contacts: frozenset[str] = frozenset()
    fully_zeroed_rows_before: int = 0
    source: Literal["policy", "operator"] = "policy"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the filter enforces. Heights of the box and of forbidden boxes are relative to ``counter_z_m``.

    ``forbidden_boxes``: pairs of opposite corners ((x, y, z) minimum, (x, y, z) maximum).
    Raises ConfigurationError when a limit is not finite, not positive where it must be, or a box is inside out.
    """

    box_min_m: Vector3 = (0.10, -0.20, 0.00)
    box_max_m: Vector3 = (0.45, 0.25, 0.30)
    counter_z_m: float
    wall_x_m: float
    max_axis_m: float = 0.05
    max_rotation_rad: float = 0.25
    max_rotation_speed_rad_s: float = 1.0
    max_speed_m_s: float = 0.25
    joint_margin_rad: float = 0.05
    max_joint_speed_rad_s: float
    max_frame_age_at_send_s: float = 0.5
    max_answer_age_s: float = 15.0
    forbidden_boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        """Refuse limits that could not protect anything."""
        for name in (
            "max_axis_m",
            "max_rotation_rad",
            "max_rotation_speed_rad_s",
            "max_speed_m_s",
            "max_joint_speed_rad_s",
            "max_frame_age_at_send_s",
            "max_answer_age_s",
        ):
            _require(name, getattr(self, name), lower=0.0)
        _require("joint_margin_rad", self.joint_margin_rad, lower=-1e-12)
        _require("counter_z_m", self.counter_z_m)
        _require("wall_x_m", self.wall_x_m)
        if self.max_axis_m > MAX_SCALED_AXIS_M:
            raise ConfigurationError(f"max_axis_m must be at most {MAX_SCALED_AXIS_M}, got {self.max_axis_m}")
        for low, high in ((self.box_min_m, self.box_max_m), *self.forbidden_boxes):
            _require_box(low, high)


@dataclass(frozen=True)
class Decision:
    """What may be executed: ``row`` as given ("pass"), changed ("clip"), or None ("refuse"), and why.

    ``ends_chunk``: the rows after this one were meant to follow motion that did not happen, so they are dropped.
    """

    row: list[float] | None
    verdict: Literal["pass", "clip", "refuse"]
    reasons: tuple[Reason, ...]
    ends_chunk: bool


def _require(name: str, value: object, lower: float | None = None) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or (lower is not None and isinstance(value, int | float) and value <= lower):
        wanted = "a finite number" if lower is None else f"a finite number above {max(lower, 0.0)}"
        raise ConfigurationError(f"limit {name} must be {wanted}, got {value!r}: correct it in client.toml")


def _require_box(low: Sequence[float], high: Sequence[float]) -> None:
    if len(low) != 3 or len(high) != 3:
        raise ConfigurationError(f"a box is two corners of three numbers, got {low!r} and {high!r}")
    for a, b in zip(low, high, strict=True):
        _require("box corner", a)
        _require("box corner", b)
        if a >= b:
            raise ConfigurationError(f"a box needs its minimum below its maximum, got {low!r} and {high!r}")
