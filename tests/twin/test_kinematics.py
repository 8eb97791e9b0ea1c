"""Kinematics of the wx250s: known poses, derivatives, limits, and inverse against forward."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm2vla_twin import kinematics
from vlm2vla_twin.kinematics import DOWN, JOINT_LOWER_RAD, JOINT_UPPER_RAD, forward, inverse, jacobian

GUESS = (0.0, -0.6, 0.7, 0.0, 1.4, 0.0)

shares = st.lists(st.floats(0.02, 0.98), min_size=6, max_size=6)


def joints_of(values: list[float]) -> np.ndarray:
    return JOINT_LOWER_RAD + np.array(values) * (JOINT_UPPER_RAD - JOINT_LOWER_RAD)


def test_forward_at_zero_is_the_published_pose() -> None:
    pose = forward([0.0] * 6)
    assert pose.position_m == pytest.approx([0.458325, 0.0, 0.36065], abs=1e-12)
    assert pose.rotation == pytest.approx(np.eye(3))


@pytest.mark.parametrize(
    ("joint", "angle", "direction"),
    [
        (0, 0.1, (0.0, 1.0, 0.0)),  # waist to the left
        (1, 0.1, (0.0, 0.0, -1.0)),  # shoulder forward: the hand goes down
        (2, 0.1, (0.0, 0.0, -1.0)),
        (4, 0.1, (0.0, 0.0, -1.0)),
    ],
)
def test_positive_joints_turn_the_way_the_description_says(
    joint: int, angle: float, direction: tuple[float, ...]
) -> None:
    q = [0.0] * 6
    q[joint] = angle
    moved = forward(q).position_m - forward([0.0] * 6).position_m
    assert float(moved @ np.array(direction)) > 0.9 * float(np.linalg.norm(moved)) - 0.02


def test_waist_turns_the_whole_arm() -> None:
    q = np.array([0.0, 0.3, -0.2, 0.4, 0.5, -0.6])
    turned = q + np.array([0.7, 0, 0, 0, 0, 0])
    c, s = math.cos(0.7), math.sin(0.7)
    rz = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    assert forward(turned).position_m == pytest.approx(rz @ forward(q).position_m)
    assert forward(turned).rotation == pytest.approx(rz @ forward(q).rotation)


def test_down_is_a_proper_rotation_pointing_down() -> None:
    assert pytest.approx(np.eye(3)) == DOWN.T @ DOWN
    assert np.linalg.det(DOWN) == pytest.approx(1.0)
    assert DOWN[:, 0] == pytest.approx([0, 0, -1])
    assert DOWN[:, 1] == pytest.approx([0, 1, 0])
    with pytest.raises(ValueError):
        DOWN[0, 0] = 1.0


@given(shares)
@settings(max_examples=60, deadline=None)
def test_jacobian_is_the_derivative_of_forward(values: list[float]) -> None:
    q, step = joints_of(values), 1e-6
    matrix = jacobian(q)
    for joint in range(6):
        shift = np.zeros(6)
        shift[joint] = step
        after, before = forward(q + shift), forward(q - shift)
        assert (after.position_m - before.position_m) / (2 * step) == pytest.approx(matrix[:3, joint], abs=1e-6)
        spin = (after.rotation - before.rotation) / (2 * step) @ forward(q).rotation.T
        assert [spin[2, 1], spin[0, 2], spin[1, 0]] == pytest.approx(matrix[3:, joint], abs=1e-6)


@given(shares, st.lists(st.floats(-0.15, 0.15), min_size=6, max_size=6))
@settings(max_examples=150, deadline=None)
def test_inverse_finds_poses_near_the_seed(values: list[float], offsets: list[float]) -> None:
    goal = forward(joints_of(values))
    seed = np.clip(joints_of(values) + offsets, JOINT_LOWER_RAD, JOINT_UPPER_RAD)
    found = inverse(goal.position_m, goal.rotation, seed)
    assert found is not None
    assert kinematics.within_limits(found)
    reached = forward(found)
    assert np.linalg.norm(reached.position_m - goal.position_m) <= 5e-4
    cosine = 0.5 * (np.trace(reached.rotation.T @ goal.rotation) - 1.0)
    assert math.acos(min(1.0, float(cosine))) <= 5e-3 + 1e-6


def test_inverse_follows_a_path_without_jumping_to_another_branch() -> None:
    q = inverse((0.30, 0.0, 0.15), DOWN, GUESS)
    assert q is not None
    for y in np.linspace(0.0, 0.2, 41):
        after = inverse((0.30, float(y), 0.10), DOWN, q)
        assert after is not None
        assert y == 0.0 or float(np.abs(after - q).max()) < 0.1
        q = after


def test_a_large_turn_of_the_wrist_is_found() -> None:
    q = np.array([0.0, 0.02, 0.18, 0.0, 1.36, -1.0])
    goal = forward(q + np.array([0, 0, 0, 0, 0, 2.8]))
    found = inverse(goal.position_m, goal.rotation, q)
    assert found is not None
    assert forward(found).rotation == pytest.approx(goal.rotation, abs=6e-3)


@pytest.mark.parametrize("position", [(0.9, 0.0, 0.1), (0.45, 0.25, 0.30), (0.0, 0.0, -0.5)])
def test_inverse_says_none_where_the_arm_cannot_go(position: tuple[float, float, float]) -> None:
    assert inverse(position, DOWN, GUESS) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inverse_says_none_for_numbers_that_are_not_finite(bad: float) -> None:
    assert inverse((bad, 0.0, 0.1), DOWN, GUESS) is None
    assert inverse((0.3, 0.0, 0.1), np.full((3, 3), bad), GUESS) is None
    assert inverse((0.3, 0.0, 0.1), DOWN, (bad, 0, 0, 0, 0, 0)) is None


def test_wrong_shapes_raise() -> None:
    with pytest.raises(ValueError, match="6 joint angles"):
        forward([0.0] * 5)
    with pytest.raises(ValueError, match="position"):
        inverse([0.0] * 2, DOWN, GUESS)


def test_finger_tips_lie_on_both_sides_of_the_site() -> None:
    q = inverse((0.30, 0.05, 0.10), DOWN, GUESS, 1e-6, 1e-6)
    assert q is not None
    tips = kinematics.finger_tips_m(q, 0.037)
    assert tips[0] == pytest.approx([0.30, 0.087, 0.10], abs=1e-5)
    assert tips[1] == pytest.approx([0.30, 0.013, 0.10], abs=1e-5)


def test_within_limits_counts_the_margin_and_refuses_nan() -> None:
    assert kinematics.within_limits(JOINT_UPPER_RAD)
    assert not kinematics.within_limits(JOINT_UPPER_RAD, 0.05)
    assert not kinematics.within_limits([math.nan] * 6)
