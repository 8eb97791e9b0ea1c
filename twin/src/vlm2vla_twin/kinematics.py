"""Forward and inverse kinematics of the WidowX 250S, with numpy only.

The safety filter of the robot PC uses this file too, so it imports neither mujoco nor anything else.
Units are metres and radians; the frame is the robot base (+x forward, +y left, +z up). The link lengths and joint
limits are those of the Interbotix description of the wx250s. The rotation is always a matrix: with the gripper
straight down (the usual pose) Euler angles are singular.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Joints = Sequence[float] | FloatArray

JOINT_NAMES: Final = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
JOINT_AXES: Final = ("z", "y", "y", "x", "y", "x")
#: Where each joint sits in the frame of the one before it (metres).
JOINT_OFFSETS_M: Final = (
    (0.0, 0.0, 0.072),
    (0.0, 0.0, 0.03865),
    (0.04975, 0.0, 0.25),
    (0.175, 0.0, 0.0),
    (0.075, 0.0, 0.0),
    (0.065, 0.0, 0.0),
)
#: The end-effector site in the frame of the last joint (metres).
END_EFFECTOR_OFFSET_M: Final = (0.093575, 0.0, 0.0)
#: How far beyond the end-effector site, along the approach axis, the finger tips lie; the site is between them.
FINGER_TIP_OFFSET_M: Final = 0.0
FINGER_MIN_M: Final = 0.015
FINGER_MAX_M: Final = 0.037
MAX_JOINT_SPEED_RAD_S: Final = math.pi


def _constant(values: Sequence[float] | Sequence[Sequence[float]]) -> FloatArray:
    array = np.array(values, dtype=np.float64)
    array.setflags(write=False)
    return array


JOINT_LOWER_RAD: Final = _constant([-3.14158, -1.88496, -2.14675, -3.14158, -1.74533, -3.14158])
JOINT_UPPER_RAD: Final = _constant([3.14158, 1.98968, 1.6057, 3.14158, 2.14675, 3.14158])
#: The gripper straight down: its approach axis (x) points to -z, its lateral axis (y) to the base's +y.
DOWN: Final = _constant([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])

_LOWER: Final = tuple(float(v) for v in JOINT_LOWER_RAD)
_UPPER: Final = tuple(float(v) for v in JOINT_UPPER_RAD)
_MAX_ITERATIONS: Final = 60
_MAX_POSITION_STEP_M: Final = 0.10
_MAX_ROTATION_STEP_RAD: Final = 0.6

_Vector = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Pose:
    """Where the end-effector site is: ``position_m`` [3] and ``rotation`` [3, 3] (columns are its axes in the base)."""

    position_m: FloatArray
    rotation: FloatArray


@dataclass(frozen=True)
class _Chain:
    """Joint origins and axes (base frame) plus the site's position and the three columns of its rotation."""

    origins: list[_Vector]
    axes: list[_Vector]
    position: _Vector
    columns: tuple[_Vector, _Vector, _Vector]


def forward(joints_rad: Joints) -> Pose:
    """Pose of the end-effector site for six joint angles. Raises ValueError when there are not six."""
    chain = _walk(_six(joints_rad))
    return Pose(np.array(chain.position), np.array(chain.columns).T)


def jacobian(joints_rad: Joints) -> FloatArray:
    """Geometric Jacobian [6, 6] of the site in the base frame: rows are vx, vy, vz, wx, wy, wz."""
    return _jacobian(_walk(_six(joints_rad)))


def inverse(
    position_m: Sequence[float] | FloatArray,
    rotation: FloatArray,
    seed_joints_rad: Joints,
    tolerance_m: float = 5e-4,
    tolerance_rad: float = 5e-3,
) -> FloatArray | None:
    """Joint angles [6], within the limits, that put the site at a pose; None when none was found near the seed.

    Damped least squares from ``seed_joints_rad`` (the current joints), the rotation compared as a matrix. The damping
    shrinks with the error, so it is stable at the wrist singularity and still ends quadratically. About 0.2 ms.
    """
    target = np.asarray(position_m, dtype=np.float64)
    target_rotation = np.asarray(rotation, dtype=np.float64)
    if target.shape != (3,) or target_rotation.shape != (3, 3):
        raise ValueError(f"expected position [3] and rotation [3, 3], got {target.shape} and {target_rotation.shape}")
    q = _six(seed_joints_rad)
    if not (np.isfinite(target).all() and np.isfinite(target_rotation).all() and all(map(math.isfinite, q))):
        return None
    q = [min(max(v, lo), hi) for v, lo, hi in zip(q, _LOWER, _UPPER, strict=True)]
    goal: _Vector = (float(target[0]), float(target[1]), float(target[2]))
    goal_columns = [(float(c[0]), float(c[1]), float(c[2])) for c in target_rotation.T]
    for _ in range(_MAX_ITERATIONS):
        chain = _walk(q)
        shift = (goal[0] - chain.position[0], goal[1] - chain.position[1], goal[2] - chain.position[2])
        turn = _rotation_error(chain.columns, goal_columns)
        distance, angle = math.hypot(*shift), math.hypot(*turn)
        if distance <= tolerance_m and angle <= tolerance_rad:
            return np.array(q)
        step = _limited_step(chain, q, shift, turn, distance, angle)
        q = [min(max(v + d, lo), hi) for v, d, lo, hi in zip(q, step, _LOWER, _UPPER, strict=True)]
    return None


def finger_tips_m(joints_rad: Joints, finger_m: float) -> FloatArray:
    """The two finger tips [2, 3] (left, right): ``finger_m`` to either side along the gripper's lateral axis."""
    pose = forward(joints_rad)
    return tips_of_pose(pose, finger_m)


def tips_of_pose(pose: Pose, finger_m: float) -> FloatArray:
    """As :func:`finger_tips_m`, for a pose that is already known."""
    middle = pose.position_m + FINGER_TIP_OFFSET_M * pose.rotation[:, 0]
    side = finger_m * pose.rotation[:, 1]
    return np.stack([middle + side, middle - side])


def within_limits(joints_rad: Joints, margin_rad: float = 0.0) -> bool:
    """Whether every joint is at least ``margin_rad`` inside its limits (False for numbers that are not finite)."""
    q = np.asarray(joints_rad, dtype=np.float64)
    return bool(((q >= JOINT_LOWER_RAD + margin_rad) & (q <= JOINT_UPPER_RAD - margin_rad)).all())


def _six(joints_rad: Joints) -> list[float]:
    q = [float(v) for v in joints_rad]
    if len(q) != len(JOINT_NAMES):
        raise ValueError(f"expected {len(JOINT_NAMES)} joint angles ({', '.join(JOINT_NAMES)}), got {len(q)}")
    return q


def _along(origin: _Vector, columns: tuple[_Vector, _Vector, _Vector], offset: tuple[float, float, float]) -> _Vector:
    (a, b, c), (ox, oy, oz) = columns, offset
    return (
        origin[0] + a[0] * ox + b[0] * oy + c[0] * oz,
        origin[1] + a[1] * ox + b[1] * oy + c[1] * oz,
        origin[2] + a[2] * ox + b[2] * oy + c[2] * oz,
    )


def _mix(p: _Vector, q: _Vector, cosine: float, sine: float) -> tuple[_Vector, _Vector]:
    """Rotate the pair of axes (p, q): p' = c p + s q, q' = c q - s p."""
    return (
        (cosine * p[0] + sine * q[0], cosine * p[1] + sine * q[1], cosine * p[2] + sine * q[2]),
        (cosine * q[0] - sine * p[0], cosine * q[1] - sine * p[1], cosine * q[2] - sine * p[2]),
    )


def _walk(q: list[float]) -> _Chain:
    # Plain floats: for 3-vectors they are several times faster than numpy's small arrays.
    x: _Vector = (1.0, 0.0, 0.0)
    y: _Vector = (0.0, 1.0, 0.0)
    z: _Vector = (0.0, 0.0, 1.0)
    origin: _Vector = (0.0, 0.0, 0.0)
    origins: list[_Vector] = []
    axes: list[_Vector] = []
    for angle, name, offset in zip(q, JOINT_AXES, JOINT_OFFSETS_M, strict=True):
        origin = _along(origin, (x, y, z), offset)
        origins.append(origin)
        cosine, sine = math.cos(angle), math.sin(angle)
        if name == "x":
            axes.append(x)
            y, z = _mix(y, z, cosine, sine)
        elif name == "y":
            axes.append(y)
            z, x = _mix(z, x, cosine, sine)
        else:
            axes.append(z)
            x, y = _mix(x, y, cosine, sine)
    return _Chain(origins, axes, _along(origin, (x, y, z), END_EFFECTOR_OFFSET_M), (x, y, z))


def _jacobian(chain: _Chain) -> FloatArray:
    px, py, pz = chain.position
    columns: list[tuple[float, ...]] = []
    for (ox, oy, oz), (ax, ay, az) in zip(chain.origins, chain.axes, strict=True):
        rx, ry, rz = px - ox, py - oy, pz - oz
        columns.append((ay * rz - az * ry, az * rx - ax * rz, ax * ry - ay * rx, ax, ay, az))
    return np.array(columns).T


def _rotation_error(current: Sequence[_Vector], goal: Sequence[_Vector]) -> _Vector:
    """Rotation vector (base frame) that turns ``current`` into ``goal``; both are given as columns."""
    sx = sy = sz = trace = 0.0
    for (cx, cy, cz), (gx, gy, gz) in zip(current, goal, strict=True):
        sx += cy * gz - cz * gy
        sy += cz * gx - cx * gz
        sz += cx * gy - cy * gx
        trace += cx * gx + cy * gy + cz * gz
    sine, cosine = 0.5 * math.hypot(sx, sy, sz), 0.5 * (trace - 1.0)
    if sine > 1e-9:
        scale = 0.5 * math.atan2(sine, cosine) / sine
        return (sx * scale, sy * scale, sz * scale)
    if cosine > 0.0:
        return (0.0, 0.0, 0.0)
    # A half turn has no unique direction in the formula above: take its axis from the symmetric part.
    symmetric = np.array(goal).T @ np.array(current) + np.eye(3)
    axis = symmetric[:, int(np.argmax(np.linalg.norm(symmetric, axis=0)))]
    axis = math.pi * axis / max(float(np.linalg.norm(axis)), 1e-12)
    return (float(axis[0]), float(axis[1]), float(axis[2]))


def _limited_step(
    chain: _Chain, q: list[float], shift: _Vector, turn: _Vector, distance: float, angle: float
) -> list[float]:
    """One damped step; a joint that would leave its range is frozen and the others are solved again."""
    near = min(1.0, _MAX_POSITION_STEP_M / distance) if distance > 0.0 else 1.0
    slow = min(1.0, _MAX_ROTATION_STEP_RAD / angle) if angle > 0.0 else 1.0
    error = np.array([v * near for v in shift] + [v * slow for v in turn])
    matrix = _jacobian(chain)
    damping = 1e-6 + 0.05 * float(error @ error)
    step = [0.0] * len(q)
    for _ in range(3):
        core = matrix @ matrix.T
        core.flat[:: len(q) + 1] += damping
        step = [float(v) for v in matrix.T @ np.linalg.solve(core, error)]
        stuck = [i for i, (v, d) in enumerate(zip(q, step, strict=True)) if not _LOWER[i] <= v + d <= _UPPER[i]]
        stuck = [i for i in stuck if (q[i] >= _UPPER[i] and step[i] > 0) or (q[i] <= _LOWER[i] and step[i] < 0)]
        if not stuck:
            break
        matrix[:, stuck] = 0.0
    return step
