"""Over a million random rows and states: nothing forbidden ever passes.

The judge here is written apart from the filter and more simply: it samples the way of every point and looks.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from robot_fakes import joints_at, limits, policy_context

from vlm2vla_client.safety import Limits, Reason, RobotState, SafetyContext, filter_row
from vlm2vla_client.safety_geometry import Batch, Screened, screen
from vlm2vla_twin import kinematics

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

FORBIDDEN = (
    ((0.30, 0.05, 0.00), (0.36, 0.12, 0.10)),
    ((0.15, -0.15, 0.18), (0.22, 0.10, 0.181)),
)
LIMITS = limits(counter_z_m=0.01, wall_x_m=0.44, forbidden_boxes=FORBIDDEN)
LOW = np.array([0.10, -0.20, 0.01])
HIGH = np.array([0.45, 0.25, 0.31])
PLANE_M = 0.013
WALL_PLANE_M = 0.437


def make_batch(rng: np.random.Generator, count: int, width: int) -> Batch:
    """Rows and states in and around the box, with one in a few of everything that must be refused."""
    rows = np.zeros((count, width))
    rows[:, :3] = rng.choice([0.02, 0.06, 0.12], (count, 1)) * rng.uniform(-1, 1, (count, 3))
    rows[:, :3] *= rng.random((count, 3)) < 0.8
    if width == 7:
        rows[:, 3:6] = rng.choice([0.1, 0.3, 0.6], (count, 1)) * rng.uniform(-1, 1, (count, 3))
    rows[:, -1] = rng.choice([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.5], count)
    broken = rng.random(count) < 0.05
    columns = rng.integers(0, width, count)
    rows[broken, columns[broken]] = rng.choice([np.nan, np.inf, -np.inf], int(broken.sum()))
    ee = rng.uniform(LOW - 0.02, HIGH + 0.02, (count, 3))
    low = rng.random(count) < 0.2
    ee[low, 2] = rng.uniform(0.0, 0.03, int(low.sum()))
    turn = rng.uniform(-math.pi, math.pi, count)
    tilt = rng.normal(0.0, 0.2, count)
    side = np.stack([-np.sin(turn) * np.cos(tilt), np.cos(turn) * np.cos(tilt), np.sin(tilt)], axis=1)
    reach = rng.uniform(0.015, 0.037, (count, 1)) * side
    ages = np.where(rng.random((2, count)) < 0.9, rng.uniform(0.0, 0.45, (2, count)), rng.uniform(-1, 30, (2, count)))
    ages[rng.random((2, count)) < 0.02] = np.nan
    return Batch(
        rows=rows,
        ee_m=ee,
        tips_m=np.stack([ee + reach, ee - reach], axis=1),
        foreign=rng.random(count) < 0.03,
        frame_age_s=ages[0],
        answer_age_s=ages[1],
        operator=rng.random(count) < 0.05,
        counter=rng.random(count) < 0.1,
        wall=rng.random(count) < 0.1,
        zeroed_before=rng.integers(0, 4, count),
    )


def turned(rpy: FloatArray) -> FloatArray:
    """Rz Ry Rx, one elementary rotation at a time."""
    result = np.broadcast_to(np.eye(3), (len(rpy), 3, 3))
    for axis, (a, b) in ((0, (1, 2)), (1, (2, 0)), (2, (0, 1))):
        one = np.zeros((len(rpy), 3, 3))
        one[:, axis, axis] = 1.0
        one[:, a, a] = one[:, b, b] = np.cos(rpy[:, axis])
        one[:, a, b], one[:, b, a] = -np.sin(rpy[:, axis]), np.sin(rpy[:, axis])
        result = one @ result
    return result


def points_at(batch: Batch, result: Screened, share: float) -> FloatArray:
    ee = batch.ee_m + share * result.translation_m
    spin = turned(share * result.rotation_rad)
    tips = ee[:, None, :] + np.einsum("nij,npj->npi", spin, batch.tips_m - batch.ee_m[:, None, :])
    return np.concatenate([ee[:, None, :], tips], axis=1)


def excess(points: FloatArray) -> FloatArray:
    """How far each point is outside the box, [N, P]."""
    return np.asarray(np.maximum(np.maximum(LOW - points, points - HIGH), 0.0).sum(axis=2))


def depth(points: FloatArray) -> FloatArray:
    """How deep each point is inside any forbidden box, [N, P]."""
    lift = np.array([0.0, 0.0, 0.01])
    deepest = np.full(points.shape[:2], -1.0)
    for a, b in FORBIDDEN:
        deepest = np.maximum(
            deepest, np.minimum(points - (np.array(a) + lift), np.array(b) + lift - points).min(axis=2)
        )
    return np.asarray(np.maximum(deepest, 0.0))


@dataclass
class Judgement:
    """Rows that moved although they must not have: one mask for each rule."""

    broken: dict[str, BoolArray]

    def worst(self) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in self.broken.items() if mask.any()}


def judge(batch: Batch, result: Screened, slack_m: float) -> Judgement:
    """Every rule of the contract that needs no inverse kinematics, looked at from outside."""
    rows, moved, spun = batch.rows, result.translation_m, result.rotation_rad
    free = ~result.refused
    moving = free & ((moved != 0.0).any(axis=1) | (spun != 0.0).any(axis=1))
    with np.errstate(invalid="ignore"):
        fresh = (batch.frame_age_s <= 0.5) & (batch.answer_age_s <= 15.0)
        waived = batch.operator & ~(batch.frame_age_s > 0.5) & ~(batch.answer_age_s > 15.0)
        far_over = (np.abs(rows[:, :3]) > 0.100002).any(axis=1)
    broken: dict[str, BoolArray] = {
        "not finite": free & ~np.isfinite(rows).all(axis=1),
        "gripper": free & ~np.isin(rows[:, -1], (0.0, 1.0)),
        "foreign": free & batch.foreign,
        "stale": free & ~fresh & ~waived,
        "far over the limit": free & far_over,
        "axis": free & (np.abs(moved).max(axis=1) > 0.05 + 2e-6),
        "rotation": free & (np.abs(spun).max(axis=1) > 0.25 + 2e-6),
        "refused rows move": result.refused & ((moved != 0.0) | (spun != 0.0)).any(axis=1),
        "refused rows end the chunk": result.refused & ~result.ends,
    }
    begin, end = points_at(batch, result, 0.0), points_at(batch, result, 1.0)
    was_out, was_in = excess(begin), depth(begin)
    names = ("leaves the box", "goes further out", "enters a forbidden box")
    for name in names:
        broken[name] = np.zeros(len(rows), bool)
    for share in np.linspace(0.0, 1.0, 9):
        now = points_at(batch, result, float(share))
        out, inside = excess(now), depth(now)
        broken[names[0]] |= moving & ((was_out <= 1e-6) & (out > slack_m)).any(axis=1)
        broken[names[1]] |= moving & (out > was_out + slack_m).any(axis=1)
        broken[names[2]] |= moving & ((was_in <= 1e-6) & (inside > slack_m)).any(axis=1)
    stuck_out = (was_out.sum(axis=1) > 1e-5) & (excess(end).sum(axis=1) >= was_out.sum(axis=1))
    broken["outside, and no nearer"] = moving & stuck_out
    broken["stays in a forbidden box"] = moving & ((was_in > 1e-5) & (depth(end) >= was_in)).any(axis=1)
    touching = batch.counter | (begin[:, 1:, 2].min(axis=1) <= PLANE_M)
    broken["pushes the counter"] = free & touching & (moved[:, 2] < 0.0)
    floor = np.minimum(begin[:, 1:, 2], PLANE_M)
    broken["through the contact plane"] = moving & (end[:, 1:, 2] < floor - slack_m).any(axis=1)
    at_wall = batch.wall | (begin[:, 1:, 0].max(axis=1) >= WALL_PLANE_M)
    broken["pushes the wall"] = free & at_wall & (moved[:, 0] > 0.0)
    clean = np.where(np.isfinite(rows[:, :3]), rows[:, :3], 0.0)
    invented = (moved * clean < 0.0) | (np.abs(moved) > np.abs(clean) + 1e-12)
    broken["invents motion"] = np.asarray(invented.any(axis=1))
    changed = free & (moved != clean).any(axis=1)
    contact = [Reason.COUNTER_CONTACT, Reason.COUNTER_REACHED, Reason.WALL_CONTACT, Reason.WALL_REACHED]
    excused = np.any([result.reasons.get(reason, np.zeros(len(rows), bool)) for reason in contact], axis=0)
    broken["changed without ending the chunk"] = changed & ~result.ends & ~excused
    return Judgement(broken)


MILLION = [(4, seed) for seed in range(9)] + [(7, seed) for seed in range(100, 104)]
SIZE = {4: 100_000, 7: 30_000}


@pytest.mark.parametrize(("width", "seed"), MILLION)
def test_nothing_forbidden_passes_in_a_million_rows(width: int, seed: int) -> None:
    batch = make_batch(np.random.default_rng(seed), SIZE[width], width)
    result = screen(batch, LIMITS)
    assert judge(batch, result, slack_m=1.1e-6).worst() == {}
    # The draw must exercise the rules, or the line above proves nothing.
    seen = {reason: int(mask.sum()) for reason, mask in result.reasons.items()}
    expected = set(Reason) - {
        Reason.WRONG_SHAPE, Reason.BAD_CONTEXT, Reason.BAD_STATE,
        Reason.UNREACHABLE, Reason.JOINT_LIMIT, Reason.JOINT_SPEED,
    }  # fmt: skip
    if width == 4:
        expected -= {Reason.ROTATION_OVER_LIMIT, Reason.ROTATION_FAR_OVER_LIMIT, Reason.ROTATION_INTO_CONTACT}
    assert {reason for reason in expected if seen.get(reason, 0) < 20} == set()
    untouched = ~result.refused & ~result.ends & (result.translation_m == batch.rows[:, :3]).all(axis=1)
    assert untouched.mean() > 0.05


def test_the_numbers_add_up_to_more_than_a_million() -> None:
    assert sum(SIZE[width] for width, _ in MILLION) > 1_000_000


@pytest.mark.parametrize("width", [4, 7])
def test_the_judge_objects_to_rows_that_no_filter_saw(width: int) -> None:
    """The same rows unfiltered break every rule, so a filter that lets them through cannot pass."""
    batch = make_batch(np.random.default_rng(7), 20_000, width)
    motion = np.where(np.isfinite(batch.rows), batch.rows, 0.0)
    spin = motion[:, 3:6] if width == 7 else np.zeros((len(motion), 3))
    nothing = np.zeros(len(motion), bool)
    unfiltered = Screened(motion[:, :3].copy(), spin.copy(), nothing.copy(), nothing.copy())
    worst = judge(batch, unfiltered, slack_m=1.1e-6).worst()
    assert {
        "not finite", "gripper", "foreign", "stale", "far over the limit", "axis", "leaves the box", "goes further out",
        "enters a forbidden box", "outside, and no nearer", "stays in a forbidden box", "pushes the counter",
        "through the contact plane", "pushes the wall",
    } <= set(worst)  # fmt: skip


@pytest.mark.parametrize(
    ("loosened", "rule"),
    [
        ({"box_max_m": (0.45, 0.26, 0.30)}, "leaves the box"),
        ({"forbidden_boxes": FORBIDDEN[:1]}, "enters a forbidden box"),
        ({"counter_z_m": 0.005}, "pushes the counter"),
        ({"wall_x_m": 0.445}, "pushes the wall"),
        ({"max_axis_m": 0.051}, "axis"),
        ({"max_frame_age_at_send_s": 0.6}, "stale"),
        ({"max_answer_age_s": 16.0}, "stale"),
    ],
)
def test_a_slightly_looser_filter_is_caught(loosened: dict[str, Any], rule: str) -> None:
    batch = make_batch(np.random.default_rng(11), 50_000, 4)
    result = screen(batch, replace(LIMITS, **loosened))
    assert rule in judge(batch, result, slack_m=1.1e-6).worst()


# --- filter_row itself, with the joints ------------------------------------------------------------------------------

positions = st.tuples(st.floats(0.11, 0.44), st.floats(-0.19, 0.24), st.floats(0.0, 0.30))
steps = st.floats(-0.12, 0.12) | st.sampled_from([0.0, 0.05, -0.05, 0.0500009, 0.1])
anything: Any = (
    st.none() | st.booleans() | st.text(max_size=3) | st.integers() | st.floats() | st.just(10**400) | st.just([0.0])
)


def reachable(position: tuple[float, float, float]) -> RobotState | None:
    q = kinematics.inverse(position, kinematics.DOWN, joints_at((0.30, 0.0, 0.15)), 1e-7, 1e-6)
    if q is None:
        return None
    tips = kinematics.finger_tips_m(q, 0.03)
    return RobotState(kinematics.forward(q).position_m, kinematics.DOWN, tips, q, 1.0, 0.0)


@given(positions, st.tuples(steps, steps, steps), st.booleans(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_what_filter_row_lets_through_the_arm_can_do(
    position: tuple[float, float, float], step: tuple[float, float, float], gripper: bool, turning: bool
) -> None:
    state = reachable(position)
    if state is None:
        return
    spin = [2.0 * v for v in step] if turning else []
    row = [*step, *spin, float(gripper)]
    decision = filter_row(row, state, policy_context(), LIMITS)
    if decision.row is None:
        assert decision.verdict == "refuse" and decision.ends_chunk and decision.reasons
        return
    assert len(decision.row) == len(row) and decision.row[-1] == row[-1]
    assert (decision.verdict == "pass") == (decision.row == row and not decision.ends_chunk)
    moved = np.array(decision.row[:3])
    rotation = turned(np.array([decision.row[3:6]]))[0] if turning else np.eye(3)
    if not moved.any() and not np.any(decision.row[3:-1]):
        return
    goal = kinematics.inverse(
        np.asarray(state.ee_position_m) + moved, rotation @ kinematics.DOWN, state.joints_rad, 1e-5, 1e-4
    )
    assert goal is not None
    assert kinematics.within_limits(goal, LIMITS.joint_margin_rad - 1e-3)
    turn = float(np.linalg.norm(decision.row[3:-1])) if turning else 0.0
    seconds = max((float(np.linalg.norm(moved)) + 0.03 * turn) / LIMITS.max_speed_m_s, turn, 0.02)
    assert float(np.abs(goal - np.asarray(state.joints_rad)).max()) / seconds <= LIMITS.max_joint_speed_rad_s + 0.2


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 7]))
@settings(max_examples=40, deadline=None)
def test_one_row_is_judged_as_in_a_batch(seed: int, width: int) -> None:
    batch = make_batch(np.random.default_rng(seed), 1, width)
    state = reachable((float(batch.ee_m[0, 0]), float(batch.ee_m[0, 1]), float(batch.ee_m[0, 2])))
    if state is None:
        return
    batch = replace(batch, ee_m=np.array([state.ee_position_m]), tips_m=np.array([state.finger_tips_m]))
    ages = [None if math.isnan(age[0]) else float(age[0]) for age in (batch.frame_age_s, batch.answer_age_s)]
    touched = {name for name, flag in (("counter", batch.counter), ("wall", batch.wall)) if flag[0]}
    context = SafetyContext(
        "e1", "e0" if batch.foreign[0] else "e1", ages[0], ages[1], frozenset(touched),
        int(batch.zeroed_before[0]), "operator" if batch.operator[0] else "policy",
    )  # fmt: skip
    decision = filter_row(batch.rows[0].tolist(), state, context, LIMITS)
    result = screen(batch, LIMITS)
    if decision.row is not None:
        assert not result.refused[0]
        assert decision.row[:3] == result.translation_m[0].tolist()
        assert decision.ends_chunk == bool(result.ends[0])
    elif not result.refused[0]:
        assert {Reason.UNREACHABLE, Reason.JOINT_LIMIT, Reason.JOINT_SPEED} & set(decision.reasons)


@given(
    row=st.lists(anything, max_size=8) | anything,
    state=st.builds(RobotState, *[anything | st.lists(anything, max_size=6)] * 6),
    context=st.builds(SafetyContext, *[anything] * 7),
)
@example(row=[0.0, 0.0, 0.0, 1.0], state=None, context=None)
@settings(max_examples=300, deadline=None)
def test_rubbish_is_refused_and_never_raises(row: Any, state: Any, context: Any) -> None:
    good_state = reachable((0.30, 0.0, 0.15))
    assert good_state is not None
    for one_state, one_context in ((state, policy_context()), (good_state, context), (state, context)):
        decision = filter_row([0.01, 0.0, 0.0, 1.0], one_state, one_context, LIMITS)
        assert decision.row is None and decision.ends_chunk
    decision = filter_row(row, good_state, policy_context(), LIMITS)
    assert decision.row is None or all(math.isfinite(v) for v in decision.row)


def test_limits_with_ends_of_the_number_range_do_not_raise() -> None:
    state = reachable((0.30, 0.0, 0.15))
    assert state is not None
    wild = Limits(counter_z_m=-1e300, wall_x_m=1e300, max_joint_speed_rad_s=1e-300)
    for row in ([5e-324, 0, 0, 1], [0.05, 5e-324, -5e-324, 1], [0, 0, 0, 5e-324, 0, 0, 1]):
        assert filter_row(row, state, policy_context(), wild).row is None
