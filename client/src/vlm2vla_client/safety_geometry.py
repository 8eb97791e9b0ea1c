"""The checks of the safety filter that need no inverse kinematics, for N rows and states at once.

``filter_row`` calls :func:`screen` with N = 1; the property tests call it with hundreds of thousands. There is one
implementation, so what the tests cover is what stands before the arm.

Shapes: N rows, P = 3 points of the gripper (end effector, two finger tips), W = 4 or 7 numbers in a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.safety_types import (
    CONTACT_MARGIN_M,
    MAX_SCALED_AXIS_M,
    MAX_ZEROED_ROWS,
    MIN_SUBSTEP_S,
    Limits,
    Reason,
)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

#: Steps over a limit smaller than this are rounding, not intent (contract: 1e-6).
TOLERANCE = 1e-6
#: Floating point noise of a sum of two positions.
_ROUNDING_M = 1e-9
#: A turning finger tip moves on an arc; it is followed on this many chords, each kept this far inside. A turning row
#: is shortened to the beginning of a chord, where its points are known exactly.
_ARC_SEGMENTS = 16
_ARC_MARGIN_M = 1e-5


@dataclass(frozen=True, eq=False)
class Batch:
    """N rows with what is known about each. An age of NaN is unknown, which only an operator's row may be."""

    rows: FloatArray  # [N, W]
    ee_m: FloatArray  # [N, 3]
    tips_m: FloatArray  # [N, 2, 3]
    foreign: BoolArray  # [N]
    frame_age_s: FloatArray  # [N]
    answer_age_s: FloatArray  # [N]
    operator: BoolArray  # [N]
    counter: BoolArray  # [N] contact reported by effort or a sensor
    wall: BoolArray  # [N]
    zeroed_before: NDArray[np.int64]  # [N]


@dataclass(eq=False)
class Screened:
    """What is left of each row: motion, whether it is refused or ends its chunk, and a mask [N] for each reason."""

    translation_m: FloatArray  # [N, 3]
    rotation_rad: FloatArray  # [N, 3]
    refused: BoolArray
    ends: BoolArray
    reasons: dict[Reason, BoolArray] = field(default_factory=dict)

    def refuse(self, mask: BoolArray, reason: Reason) -> None:
        """Refuse the rows in ``mask`` that are not refused yet: no motion at all, end of chunk."""
        if not mask.any():
            return
        self.note(mask, reason)
        self.refused |= mask
        self.ends |= mask
        self.translation_m[mask] = 0.0
        self.rotation_rad[mask] = 0.0

    def note(self, mask: BoolArray, reason: Reason) -> None:
        """Record a reason for the rows in ``mask`` that are not refused yet."""
        new = mask & ~self.refused
        if new.any():
            self.reasons[reason] = self.reasons.get(reason, np.zeros_like(new)) | new


def screen(batch: Batch, limits: Limits) -> Screened:
    """Admission, size, contact and boxes, in the order of the contract. Pure; never raises on any numbers."""
    rows = batch.rows
    count, width = rows.shape
    finite: BoolArray = np.asarray(np.isfinite(rows).all(axis=1))
    clean = np.where(finite[:, None], rows, 0.0)
    turning = clean[:, 3:6].copy() if width == 7 else np.zeros((count, 3))
    result = Screened(clean[:, :3].copy(), turning, np.zeros(count, bool), np.zeros(count, bool))
    result.refuse(~finite, Reason.NOT_FINITE)
    result.refuse((clean[:, -1] != 0.0) & (clean[:, -1] != 1.0), Reason.BAD_GRIPPER)
    _admit(result, batch, limits)
    # Infinite or NaN positions, and absurd ones whose arithmetic would overflow, cannot be checked.
    points = np.concatenate([batch.ee_m[:, None, :], batch.tips_m], axis=1)
    known: BoolArray = np.asarray((np.abs(points) < 1e3).all(axis=(1, 2)))
    result.refuse(~known, Reason.BAD_STATE)
    points = np.where(known[:, None, None], points, 0.0)
    _limit_size(result, limits)
    _stop_at_contact(result, batch, points, limits)
    _stay_inside(result, points, limits)
    return result


def rotation_of(rpy_rad: FloatArray) -> FloatArray:
    """Rotation matrices [..., 3, 3] in the base frame of [..., 3] roll, pitch, yaw: Rz(yaw) Ry(pitch) Rx(roll)."""
    (sr, sp, sy), (cr, cp, cy) = np.moveaxis(np.sin(rpy_rad), -1, 0), np.moveaxis(np.cos(rpy_rad), -1, 0)
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def motion_seconds(translation_m: FloatArray, rotation_rad: FloatArray, lever_m: float, limits: Limits) -> float:
    """Shortest time for a motion: neither a finger tip nor the rotation goes faster than its limit."""
    shift, turn = float(np.linalg.norm(translation_m)), float(np.linalg.norm(rotation_rad))
    along = (shift + lever_m * turn) / limits.max_speed_m_s
    return max(along, turn / limits.max_rotation_speed_rad_s, MIN_SUBSTEP_S)


def _admit(result: Screened, batch: Batch, limits: Limits) -> None:
    result.refuse(batch.foreign, Reason.FOREIGN_EPISODE)
    for ages, most, reason in (
        (batch.frame_age_s, limits.max_frame_age_at_send_s, Reason.STALE_FRAME),
        (batch.answer_age_s, limits.max_answer_age_s, Reason.STALE_ANSWER),
    ):
        # A negative age is a clock that cannot be trusted.
        fresh = (ages >= -TOLERANCE) & (ages <= most)
        result.refuse(~(fresh | (batch.operator & np.isnan(ages))), reason)


def _limit_size(result: Screened, limits: Limits) -> None:
    for values, most, refused_above, over, far_over in (
        (
            result.translation_m,
            limits.max_axis_m,
            MAX_SCALED_AXIS_M,
            Reason.AXIS_OVER_LIMIT,
            Reason.AXIS_FAR_OVER_LIMIT,
        ),
        (
            result.rotation_rad,
            limits.max_rotation_rad,
            2.0 * limits.max_rotation_rad,
            Reason.ROTATION_OVER_LIMIT,
            Reason.ROTATION_FAR_OVER_LIMIT,
        ),
    ):
        largest = np.abs(values).max(axis=1)
        if not (largest > most + TOLERANCE).any():
            continue
        result.refuse(largest > refused_above + TOLERANCE, far_over)
        scale = ~result.refused & (largest > most + TOLERANCE)
        result.note(scale, over)
        result.ends |= scale
        values[scale] *= (most / largest[scale])[:, None]


def _stop_at_contact(result: Screened, batch: Batch, points: FloatArray, limits: Limits) -> None:
    """D.2: no push into the counter or the wall; the other components pass."""
    moved = result.translation_m
    wanted = (moved != 0.0).any(axis=1)
    floor, front = limits.counter_z_m + CONTACT_MARGIN_M, limits.wall_x_m - CONTACT_MARGIN_M
    room_down = points[:, 1:, 2].min(axis=1) - floor
    room_ahead = front - points[:, 1:, 0].max(axis=1)
    for axis, sign, room, flag, touching, reached in (
        (2, -1.0, room_down, batch.counter, Reason.COUNTER_CONTACT, Reason.COUNTER_REACHED),
        (0, 1.0, room_ahead, batch.wall, Reason.WALL_CONTACT, Reason.WALL_REACHED),
    ):
        contact = flag | (room <= TOLERANCE)
        push = sign * moved[:, axis]
        stop = contact & (push > 0.0)
        cut = ~contact & (push > room + _ROUNDING_M)
        if not (stop | cut).any():
            continue
        result.note(stop, touching)
        result.note(cut, reached)
        moved[stop, axis] = 0.0
        moved[cut, axis] = sign * room[cut]
    zeroed = wanted & ~(moved != 0.0).any(axis=1) & ~result.refused
    repeated = zeroed & (batch.zeroed_before + 1 >= MAX_ZEROED_ROWS)
    result.note(repeated, Reason.REPEATED_CONTACT)
    result.ends |= repeated
    _no_turn_into_contact(result, batch, points, floor, front)


def _no_turn_into_contact(result: Screened, batch: Batch, points: FloatArray, floor: float, front: float) -> None:
    """A rotation may not carry a finger tip into what the gripper touches, or through the contact plane."""
    turning = (result.rotation_rad != 0.0).any(axis=1)
    if not turning.any():
        return
    index = np.flatnonzero(turning)
    start = points[index]
    low = np.full_like(start, -np.inf)
    high = np.full_like(start, np.inf)
    low[:, 1:, 2] = np.where(batch.counter[index, None], start[:, 1:, 2], np.minimum(start[:, 1:, 2], floor))
    high[:, 1:, 0] = np.where(batch.wall[index, None], start[:, 1:, 0], np.maximum(start[:, 1:, 0], front))
    low, high = low - TOLERANCE, high + TOLERANCE
    way = _arcs(result, start, index)
    _scale(result, index, way.share(_box_fraction(way, low, high)), Reason.ROTATION_INTO_CONTACT)


def _stay_inside(result: Screened, points: FloatArray, limits: Limits) -> None:
    lift = np.array([0.0, 0.0, limits.counter_z_m])
    low, high = np.asarray(limits.box_min_m) + lift, np.asarray(limits.box_max_m) + lift
    forbidden = [(np.asarray(a) + lift, np.asarray(b) + lift) for a, b in limits.forbidden_boxes]
    turning = (result.rotation_rad != 0.0).any(axis=1)
    straight = (result.translation_m != 0.0).any(axis=1) & ~turning
    for mask, margin in ((straight, 0.0), (turning, _ARC_MARGIN_M)):
        index = np.flatnonzero(mask & ~result.refused)
        if not len(index):
            continue
        start = points[index]
        # From outside, each face may be violated no more than it is now.
        lower, upper = np.minimum(low + margin, start), np.maximum(high - margin, start)
        way = _arcs(result, start, index) if margin else _straight(result, start, index)
        in_box = way.share(_box_fraction(way, lower, upper))
        in_free = np.ones(len(index))
        for a, b in forbidden:
            in_free = np.minimum(in_free, way.share(_free_fraction(way, a - margin, b + margin)))
        _refuse_from_outside(result, start, index, np.minimum(in_box, in_free), (low, high), forbidden)
        _scale(result, index, np.where(in_box <= in_free, in_box, 1.0), Reason.BOX)
        _scale(result, index, np.where(in_free < in_box, in_free, 1.0), Reason.FORBIDDEN_BOX)


@dataclass(frozen=True, eq=False)
class _Way:
    """The points' way through M rows as K straight pieces: begin and delta [K, M, P, 3]."""

    begin: FloatArray
    delta: FloatArray

    def share(self, part: FloatArray) -> FloatArray:
        """Share [M] of each row that may be done, from the share [K, M] of each piece."""
        pieces = len(part)
        if pieces == 1:
            return np.asarray(part[0], dtype=np.float64)
        before = np.arange(pieces)[:, None] / pieces
        return np.asarray(np.where(part < 1.0, before, 1.0).min(axis=0), dtype=np.float64)


def _straight(result: Screened, start: FloatArray, index: NDArray[np.intp]) -> _Way:
    delta = np.broadcast_to(result.translation_m[index][:, None, :], start.shape)
    return _Way(start[None], delta[None])


def _arcs(result: Screened, start: FloatArray, index: NDArray[np.intp]) -> _Way:
    shares = np.linspace(0.0, 1.0, _ARC_SEGMENTS + 1)[:, None]
    nodes = _moved(start, result.translation_m[index], result.rotation_rad[index], shares)
    return _Way(nodes[:-1], np.diff(nodes, axis=0))


def _moved(start: FloatArray, moved: FloatArray, turned: FloatArray, share: FloatArray) -> FloatArray:
    """Points [..., M, P, 3] after a share [..., M] of each row: the gripper turns about the end effector."""
    part = share[..., None]
    centre = start[:, :1]
    arms = np.einsum("...ij,...pj->...pi", rotation_of(turned * part), start - centre)
    return np.asarray(centre + arms + (moved * part)[..., None, :], dtype=np.float64)


def _box_fraction(way: _Way, low: FloatArray, high: FloatArray) -> FloatArray:
    """Largest share [K, M] in 0..1 of each piece for which every point stays between ``low`` and ``high``."""
    begin, delta = way.begin, way.delta
    end = begin + delta
    if ((low - _ROUNDING_M <= end) & (end <= high + _ROUNDING_M)).all():
        return np.ones(begin.shape[:2])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        to_high = np.where(end > high + _ROUNDING_M, (high - begin) / delta, 1.0)
        to_low = np.where(end < low - _ROUNDING_M, (low - begin) / delta, 1.0)
    share = np.clip(np.minimum(to_high, to_low), 0.0, 1.0)
    return np.asarray(share.min(axis=(-2, -1)), dtype=np.float64)


def _free_fraction(way: _Way, low: FloatArray, high: FloatArray) -> FloatArray:
    """Largest share [K, M] of each piece before any point enters a forbidden box; from inside, 1 on the way out."""
    begin, delta = way.begin, way.delta
    enter, leave = _slab(begin, delta, low + TOLERANCE, high - TOLERANCE)
    hit = (enter < leave) & (enter < 1.0) & (leave > 0.0)
    surface, _ = _slab(begin, delta, low, high)
    outside = np.where(hit, np.clip(surface, 0.0, 1.0), 1.0)
    depth = _depth(begin, low, high)
    to_faces = np.concatenate([begin - low, high - begin], axis=-1)
    rate = np.where(to_faces <= depth[..., None] + _ROUNDING_M, np.concatenate([delta, -delta], axis=-1), np.inf)
    leaving = rate.min(axis=-1) < 0.0
    fraction = np.where(depth > TOLERANCE, np.where(leaving, 1.0, 0.0), outside)
    return np.asarray(fraction.min(axis=-1), dtype=np.float64)


def _slab(begin: FloatArray, delta: FloatArray, low: FloatArray, high: FloatArray) -> tuple[FloatArray, FloatArray]:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        one, two = (low - begin) / delta, (high - begin) / delta
    still = delta == 0.0
    within = (begin > low) & (begin < high)
    enter = np.where(still, np.where(within, -np.inf, np.inf), np.minimum(one, two))
    leave = np.where(still, np.where(within, np.inf, -np.inf), np.maximum(one, two))
    return enter.max(axis=-1), leave.min(axis=-1)


def _depth(points: FloatArray, low: FloatArray, high: FloatArray) -> FloatArray:
    """How deep [..., P] each point lies in a box; zero or less outside."""
    return np.asarray(np.minimum(points - low, high - points).min(axis=-1), dtype=np.float64)


def _refuse_from_outside(
    result: Screened,
    start: FloatArray,
    index: NDArray[np.intp],
    fraction: FloatArray,
    box: tuple[FloatArray, FloatArray],
    forbidden: list[tuple[FloatArray, FloatArray]],
) -> None:
    """From outside the box, or inside a forbidden one, a row that does not reduce the violation is refused."""
    low, high = box

    def violation(points: FloatArray) -> FloatArray:
        return np.asarray((np.maximum(low - points, 0.0) + np.maximum(points - high, 0.0)).sum(axis=(1, 2)))

    before = violation(start)
    if (before > TOLERANCE).any():
        end = _moved(start, result.translation_m[index], result.rotation_rad[index], fraction)
        outside = np.zeros(len(result.refused), bool)
        outside[index] = (before > TOLERANCE) & (violation(end) >= before - _ROUNDING_M)
        result.refuse(outside, Reason.OUTSIDE_BOX)
    if (fraction <= 0.0).any():
        trapped = np.zeros(len(result.refused), bool)
        for a, b in forbidden:
            trapped[index] |= (_depth(start, a, b) > TOLERANCE).any(axis=1) & (fraction <= 0.0)
        result.refuse(trapped, Reason.FORBIDDEN_BOX)


def _scale(result: Screened, index: NDArray[np.intp], fraction: FloatArray, reason: Reason) -> None:
    """Shorten rows to a share of themselves; a shortened row ends its chunk."""
    if not (fraction < 1.0).any():
        return
    short = np.zeros(len(result.refused), bool)
    short[index] = fraction < 1.0
    short &= ~result.refused
    share = np.ones(len(result.refused))
    share[index] = fraction
    result.note(short, reason)
    result.ends |= short
    result.translation_m[short] *= share[short, None]
    result.rotation_rad[short] *= share[short, None]
