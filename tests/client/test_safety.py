"""The rules of the safety filter one by one: what each passes, changes and refuses, and at which number."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from robot_fakes import limits, policy_context, state_at

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.safety import Decision, Limits, Reason, RobotState, SafetyContext, filter_row, is_fully_zeroed
from vlm2vla_twin import kinematics

LIMITS = limits()
MIDDLE = state_at((0.30, 0.0, 0.15))
CONTEXT = policy_context()


def decide(row: Any, state: Any = MIDDLE, context: Any = CONTEXT, within: Limits = LIMITS) -> Decision:
    return filter_row(row, state, context, within)


def is_refusal(decision: Decision, reason: Reason) -> bool:
    return decision.row is None and decision.verdict == "refuse" and decision.ends_chunk and reason in decision.reasons


def test_an_ordinary_row_passes_unchanged() -> None:
    assert decide([0.02, -0.01, 0.03, 1.0]) == Decision([0.02, -0.01, 0.03, 1.0], "pass", (), False)
    assert decide([0.0, 0.0, 0.0, 0]) == Decision([0.0, 0.0, 0.0, 0.0], "pass", (), False)


# --- what a row may be -----------------------------------------------------------------------------------------------

NOT_ROWS: list[Any] = [
    None, 5, "0.01", {}, [], [0.01], [0, 0, 0], [0] * 5, [0] * 6, [0] * 8, ["0", 0, 0, 1], [None, 0, 0, 1],
    [True, 0, 0, 1], [0, 0, 0, True], [[0], 0, 0, 1], [0j, 0, 0, 1], np.zeros((1, 4)), np.array(["a"] * 4), b"abcd",
]  # fmt: skip


@pytest.mark.parametrize("row", NOT_ROWS, ids=repr)
def test_what_is_not_a_row_is_refused(row: Any) -> None:
    assert is_refusal(decide(row), Reason.WRONG_SHAPE)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 10**400, -(10**400)], ids=str)
@pytest.mark.parametrize("width", [4, 7])
def test_numbers_that_are_not_finite_are_refused_wherever_they_stand(bad: float, width: int) -> None:
    for place in range(width):
        row = [0.0] * (width - 1) + [1.0]
        row[place] = bad
        assert is_refusal(decide(row), Reason.NOT_FINITE)


@pytest.mark.parametrize("gripper", [0.5, -1, 2, 1e-9, 0.999999])
def test_a_gripper_is_open_or_closed(gripper: float) -> None:
    assert is_refusal(decide([0.01, 0, 0, gripper]), Reason.BAD_GRIPPER)


def test_numpy_rows_and_integers_are_numbers() -> None:
    assert decide(np.array([0.01, 0.0, 0.0, 1.0], dtype=np.float32)).verdict == "pass"
    assert decide((0, 0, 0, 1)).row == [0.0, 0.0, 0.0, 1.0]


# --- where a row came from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"row_episode_id": "e0"}, Reason.FOREIGN_EPISODE),
        ({"frame_age_at_send_s": 0.500001}, Reason.STALE_FRAME),
        ({"frame_age_at_send_s": None}, Reason.STALE_FRAME),
        ({"frame_age_at_send_s": math.nan}, Reason.STALE_FRAME),
        ({"frame_age_at_send_s": -1.0}, Reason.STALE_FRAME),
        ({"answer_age_s": 15.000001}, Reason.STALE_ANSWER),
        ({"answer_age_s": None}, Reason.STALE_ANSWER),
        ({"answer_age_s": math.inf}, Reason.STALE_ANSWER),
        ({"answer_age_s": "1"}, Reason.BAD_CONTEXT),
        ({"episode_id": None, "row_episode_id": None}, Reason.BAD_CONTEXT),
        ({"contacts": {"ceiling"}}, Reason.BAD_CONTEXT),
        ({"contacts": None}, Reason.BAD_CONTEXT),
        ({"contacts": [["counter"]]}, Reason.BAD_CONTEXT),
        ({"source": "teleop"}, Reason.BAD_CONTEXT),
        ({"fully_zeroed_rows_before": 1.5}, Reason.BAD_CONTEXT),
    ],
)
def test_rows_from_elsewhere_or_too_late_are_refused(changes: dict[str, Any], reason: Reason) -> None:
    context = replace(CONTEXT, **changes)
    assert is_refusal(decide([0.01, 0, 0, 1], context=context), reason)
    assert is_refusal(decide([0, 0, 0, 1], context=context), reason), "a gripper move is a move too"


def test_ages_at_their_limit_pass() -> None:
    assert decide([0.01, 0, 0, 1], context=policy_context(frame_age_at_send_s=0.5, answer_age_s=15.0)).verdict == "pass"


def test_an_operator_needs_no_ages_but_nothing_else_is_forgiven() -> None:
    operator = SafetyContext("e1", "e1", None, None, source="operator")
    assert decide([0.01, 0, 0, 1], context=operator).verdict == "pass"
    assert is_refusal(decide([0.01, 0, 0, 1], context=replace(operator, answer_age_s=math.nan)), Reason.STALE_ANSWER)
    assert is_refusal(decide([0.01, 0, 0, 1], context=replace(operator, answer_age_s=16.0)), Reason.STALE_ANSWER)
    assert is_refusal(decide([0.2, 0, 0, 1], context=operator), Reason.AXIS_FAR_OVER_LIMIT)


@pytest.mark.parametrize("context", [None, 3, "context", {}])
def test_no_context_no_motion(context: Any) -> None:
    assert is_refusal(decide([0.01, 0, 0, 1], context=context), Reason.BAD_CONTEXT)


@pytest.mark.parametrize(
    "changes",
    [
        {"ee_position_m": [math.nan, 0, 0]},
        {"ee_position_m": [0.3, 0]},
        {"ee_position_m": None},
        {"ee_position_m": ["0.3", "0", "0"]},
        {"ee_position_m": [10**400, 0, 0]},
        {"ee_position_m": [1e300, 0, 0]},
        {"ee_rotation": np.zeros((3, 3))},
        {"ee_rotation": -np.eye(3)},
        {"ee_rotation": [[math.inf] * 3] * 3},
        {"finger_tips_m": [[0.3, 0.0, 0.1]]},
        {"finger_tips_m": [[0.3, 0.0], [0.1]]},
        {"joints_rad": [0.0] * 5},
        {"joints_rad": [math.nan] * 6},
        {"gripper": None},
        {"gripper": math.nan},
        {"stamp_s": "now"},
    ],
)
def test_a_state_that_cannot_be_read_stops_everything(changes: dict[str, Any]) -> None:
    assert is_refusal(decide([0.01, 0, 0, 1], replace(MIDDLE, **changes)), Reason.BAD_STATE)
    assert is_refusal(decide([0.0, 0, 0, 1], replace(MIDDLE, **changes)), Reason.BAD_STATE)


def test_no_state_no_motion() -> None:
    assert is_refusal(decide([0.01, 0, 0, 1], None), Reason.BAD_STATE)


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_axis_over_the_limit_scales_the_whole_translation(axis: int, sign: int) -> None:
    row = [0.03, 0.03, 0.03, 0.0]
    row[axis] = sign * 0.10
    decision = decide(row)
    assert decision.verdict == "clip" and decision.ends_chunk and decision.reasons == (Reason.AXIS_OVER_LIMIT,)
    assert decision.row == pytest.approx([v * 0.5 for v in row[:3]] + [0.0])


def test_rounding_above_the_limit_is_forgiven_and_no_more() -> None:
    assert decide([0.0500009, 0, 0, 1]).verdict == "pass"
    assert decide([0.0500011, 0, 0, 1]).row == pytest.approx([0.05, 0, 0, 1])
    assert decide([0.1000009, 0, 0, 1]).verdict == "clip"
    assert is_refusal(decide([0.1000011, 0, 0, 1]), Reason.AXIS_FAR_OVER_LIMIT)
    assert is_refusal(decide([0, 0, -1e300, 1]), Reason.AXIS_FAR_OVER_LIMIT)


def test_rotation_has_limits_of_its_own() -> None:
    assert decide([0, 0, 0, 0, 0, 0.25, 1]).verdict == "pass"
    scaled = decide([0.01, 0, 0, 0, 0.1, 0.5, 1])
    assert scaled.verdict == "clip" and scaled.ends_chunk and scaled.reasons == (Reason.ROTATION_OVER_LIMIT,)
    assert scaled.row == pytest.approx([0.01, 0, 0, 0, 0.05, 0.25, 1])
    assert is_refusal(decide([0, 0, 0, 0, 0, 0.51, 1]), Reason.ROTATION_FAR_OVER_LIMIT)


# --- contact (D.2) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height", [0.0, 0.001, 0.003])
def test_in_contact_with_the_counter_only_the_downward_part_is_zeroed(height: float) -> None:
    decision = decide([0.02, -0.01, -0.03, 0], state_at((0.30, 0.0, height)))
    assert decision == Decision([0.02, -0.01, 0.0, 0.0], "clip", (Reason.COUNTER_CONTACT,), False)


def test_upward_and_sideways_are_free_in_contact() -> None:
    assert decide([0.02, 0.01, 0.03, 0], state_at((0.30, 0.0, 0.002))).verdict == "pass"


def test_the_effort_flag_counts_as_contact_at_any_height() -> None:
    decision = decide([0.02, 0.0, -0.03, 0], context=policy_context(contacts=frozenset({"counter"})))
    assert decision == Decision([0.02, 0.0, 0.0, 0.0], "clip", (Reason.COUNTER_CONTACT,), False)


def test_a_downward_row_from_above_is_cut_at_the_contact_plane() -> None:
    decision = decide([0.02, 0.01, -0.05, 0], state_at((0.30, 0.0, 0.023)))
    assert decision.row == pytest.approx([0.02, 0.01, -0.02, 0.0], abs=1e-6)
    assert decision.reasons == (Reason.COUNTER_REACHED,) and not decision.ends_chunk


def test_one_low_finger_tip_is_enough() -> None:
    tips = np.array(MIDDLE.finger_tips_m)
    tips[1, 2] = 0.002
    assert decide([0.02, 0.0, -0.03, 0], replace(MIDDLE, finger_tips_m=tips)).row == [0.02, 0.0, 0.0, 0.0]


def test_the_counter_height_is_where_the_limits_say() -> None:
    decision = decide([0.0, 0.0, -0.05, 0], within=limits(counter_z_m=0.12))
    assert decision.row == pytest.approx([0, 0, -0.027, 0], abs=1e-6)


def test_in_contact_with_the_wall_only_the_forward_part_is_zeroed() -> None:
    flagged = decide([0.02, 0.01, -0.01, 1], context=policy_context(contacts=frozenset({"wall"})))
    assert flagged == Decision([0.0, 0.01, -0.01, 1.0], "clip", (Reason.WALL_CONTACT,), False)
    near = limits(wall_x_m=0.32)
    assert decide([0.05, 0.01, 0.0, 1], within=near).row == pytest.approx([0.017, 0.01, 0, 1], abs=1e-6)
    assert decide([-0.05, 0.01, 0.0, 1], within=limits(wall_x_m=0.30)).verdict == "pass"


def test_three_fully_zeroed_rows_end_the_chunk() -> None:
    low = state_at((0.30, 0.0, 0.002))
    for before, ends in ((0, False), (1, False), (2, True), (7, True)):
        decision = decide([0.0, 0.0, -0.03, 0], low, policy_context(fully_zeroed_rows_before=before))
        assert decision.row == [0.0, 0.0, 0.0, 0.0]
        assert decision.ends_chunk is ends
        assert (Reason.REPEATED_CONTACT in decision.reasons) is ends
        assert is_fully_zeroed([0.0, 0.0, -0.03, 0], decision)


def test_rows_that_did_not_ask_to_move_or_still_move_are_not_zeroed_rows() -> None:
    low, third = state_at((0.30, 0.0, 0.002)), policy_context(fully_zeroed_rows_before=2)
    assert not decide([0.0, 0.0, 0.0, 0], low, third).ends_chunk
    assert not decide([0.01, 0.0, -0.03, 0], low, third).ends_chunk
    assert not is_fully_zeroed([0, 0, 0, 0], decide([0, 0, 0, 0], low))


def test_a_rotation_may_not_push_a_finger_into_the_counter() -> None:
    decision = decide([0, 0, 0, 0.25, 0, 0, 0], state_at((0.30, 0.0, 0.005)))
    assert decision.verdict == "clip" and decision.ends_chunk and Reason.ROTATION_INTO_CONTACT in decision.reasons
    assert decision.row is not None and 0.0 < decision.row[3] < 0.06  # asin(2 mm / 37 mm) = 0.054
    held = decide([0, 0, 0, 0.25, 0, 0, 0], context=policy_context(contacts=frozenset({"counter"})))
    assert held.row is not None and held.row[3] < 1e-3


# --- boxes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "row", "allowed"),
    [
        ((0.42, 0.0, 0.10), [0.05, 0.025, 0, 1], [0.03, 0.015, 0, 1]),
        ((0.13, 0.0, 0.10), [-0.05, 0, 0, 1], [-0.03, 0, 0, 1]),
        ((0.30, 0.20, 0.10), [0, 0.05, 0, 1], [0, 0.013, 0, 1]),  # the left tip is 37 mm further out
        ((0.30, -0.15, 0.10), [0, -0.05, 0, 1], [0, -0.013, 0, 1]),
        ((0.30, 0.0, 0.27), [0, 0.01, 0.05, 1], [0, 0.006, 0.03, 1]),
    ],
)
def test_a_row_that_leaves_the_box_ends_at_its_face(position: Any, row: list[float], allowed: list[float]) -> None:
    decision = decide(row, state_at(position))
    assert decision.row == pytest.approx(allowed, abs=2e-6)
    assert decision.verdict == "clip" and decision.ends_chunk and Reason.BOX in decision.reasons


def test_heights_of_the_box_are_relative_to_the_counter() -> None:
    low_roof = (0.45, 0.25, 0.20)
    state = state_at((0.30, 0.0, 0.17))
    assert decide([0, 0, 0.05, 1], state, within=limits(counter_z_m=0.05, box_max_m=low_roof)).verdict == "pass"
    cut = decide([0, 0, 0.05, 1], state, within=limits(counter_z_m=0.0, box_max_m=low_roof))
    assert cut.row == pytest.approx([0, 0, 0.03, 1], abs=1e-6)


def test_from_outside_only_the_way_back_is_open() -> None:
    high = state_at((0.30, 0.0, 0.16))
    low_roof = limits(box_max_m=(0.45, 0.25, 0.14))
    assert decide([0.01, 0, -0.03, 1], high, within=low_roof).verdict == "pass"
    assert decide([0.01, 0, -0.01, 1], high, within=low_roof).verdict == "pass"
    for row in ([0.01, 0, 0, 1], [0, 0, 0.01, 1], [0.01, 0.01, 0.001, 1]):
        assert is_refusal(decide(row, high, within=low_roof), Reason.OUTSIDE_BOX)
    assert decide([0, 0, 0, 1], high, within=low_roof).verdict == "pass", "letting go does not move the arm"


FORBIDDEN = limits(forbidden_boxes=(((0.34, -0.05, 0.0), (0.40, 0.05, 0.20)),))


def test_a_forbidden_box_stops_a_row_at_its_face() -> None:
    decision = decide([0.05, 0, 0, 1], within=FORBIDDEN)
    assert decision.row == pytest.approx([0.04, 0, 0, 1], abs=1e-6)
    assert decision.ends_chunk and Reason.FORBIDDEN_BOX in decision.reasons
    assert decide([0.05, 0, 0.05, 1], state_at((0.30, 0.0, 0.19)), within=FORBIDDEN).verdict == "pass", "over it"


def test_a_finger_tip_counts_and_a_forbidden_box_cannot_be_jumped() -> None:
    decision = decide([0.05, 0, 0, 1], state_at((0.30, 0.08, 0.15)), within=FORBIDDEN)
    assert decision.row == pytest.approx([0.04, 0, 0, 1], abs=1e-6)
    thin = limits(forbidden_boxes=(((0.32, -0.2, 0.0), (0.321, 0.2, 0.3)),))
    assert decide([0.05, 0, 0, 1], within=thin).row == pytest.approx([0.02, 0, 0, 1], abs=1e-6)


def test_from_inside_a_forbidden_box_only_the_way_out_is_open() -> None:
    inside = state_at((0.35, 0.0, 0.15))
    assert decide([-0.02, 0, 0, 1], inside, within=FORBIDDEN).verdict == "pass"
    assert is_refusal(decide([0.02, 0, 0, 1], inside, within=FORBIDDEN), Reason.FORBIDDEN_BOX)
    assert is_refusal(decide([0, 0, -0.02, 1], inside, within=FORBIDDEN), Reason.FORBIDDEN_BOX)


# --- the arm itself --------------------------------------------------------------------------------------------------


def test_what_the_arm_cannot_reach_is_refused() -> None:
    stretched = state_at((0.40, 0.10, 0.22))
    wide = limits(box_max_m=(0.9, 0.9, 0.9), wall_x_m=2.0)
    reasons = decide([0.05, 0.05, 0.05, 1], stretched, within=wide).reasons
    assert Reason.UNREACHABLE in reasons
    assert decide([-0.02, 0, 0, 1], stretched, within=wide).verdict == "pass"


def test_a_joint_near_its_limit_is_refused() -> None:
    q = np.array([3.0, 0.02, 0.18, 0.0, 1.36, 0.0])
    pose = kinematics.forward(q)
    state = RobotState(pose.position_m, pose.rotation, kinematics.tips_of_pose(pose, 0.03), q, 1.0, 0.0)
    wide = limits(box_min_m=(-0.9, -0.9, -0.9), box_max_m=(0.9, 0.9, 0.9), wall_x_m=2.0)
    turn = np.array([-pose.position_m[1], pose.position_m[0], 0.0])
    turn *= 0.035 / np.abs(turn).max()
    assert is_refusal(decide([*turn, 1], state, within=wide), Reason.JOINT_LIMIT)
    assert decide([*(-turn), 1], state, within=wide).verdict == "pass"


def test_a_joint_that_would_have_to_be_too_fast_is_refused() -> None:
    close = state_at((0.13, 0.0, 0.10))
    assert decide([0.0, 0.05, 0.0, 1], close).verdict == "pass"
    assert is_refusal(decide([0.0, 0.05, 0.0, 1], close, within=limits(max_joint_speed_rad_s=1.0)), Reason.JOINT_SPEED)


def test_a_row_of_only_the_gripper_needs_no_kinematics() -> None:
    odd = replace(MIDDLE, joints_rad=[3.1, 1.9, 1.6, 3.1, 2.1, 3.1])
    assert decide([0, 0, 0, 0], odd).verdict == "pass"


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"max_axis_m": 0.0},
        {"max_axis_m": 0.2},
        {"max_speed_m_s": math.nan},
        {"counter_z_m": math.inf},
        {"max_answer_age_s": -1.0},
        {"box_min_m": (0.5, 0.0, 0.0)},
        {"forbidden_boxes": (((0.0, 0.0, 0.0), (0.1, 0.1, 0.0)),)},
        {"max_joint_speed_rad_s": True},
    ],
)
def test_limits_that_protect_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        limits(**changes)


def test_limits_are_given_by_name_and_the_bench_has_no_default() -> None:
    with pytest.raises(TypeError):
        Limits()  # type: ignore[call-arg]  # that is what must fail
    assert LIMITS.box_min_m == (0.10, -0.20, 0.00) and LIMITS.box_max_m == (0.45, 0.25, 0.30)
