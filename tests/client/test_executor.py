"""The executor on an ideal arm: substeps, second filtering, arrival, base of a delta, start rule, faults, holds."""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from robot_fakes import FakeArm, ManualClock, ScriptedMonitor, limits, policy_context

from vlm2vla_client.errors import ConfigurationError, RobotError
from vlm2vla_client.executor import ChunkResult, Executor, MotionStart, Outcome
from vlm2vla_client.physical import CHECK_AHEAD_S
from vlm2vla_client.safety import Reason, RobotState, SafetyContext

OPERATOR = SafetyContext("e1", "e1", None, None, source="operator")


class Bench:
    """An executor on a fake arm, with everything it did."""

    def __init__(self, position: tuple[float, float, float] = (0.30, 0.0, 0.15), **options: Any) -> None:
        self.clock = ManualClock()
        self.arm = FakeArm(self.clock, position)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.limits = options.pop("within", limits())
        self.executor = Executor(
            self.arm, self.clock, self.limits, on_event=lambda kind, data: self.events.append((kind, data)), **options
        )

    def start(self) -> MotionStart:
        return MotionStart(self.clock.now_s(), np.array(self.arm.state().ee_position_m))

    def run(self, rows: Any, context: SafetyContext | None = None) -> ChunkResult:
        return self.executor.run_chunk(rows, context or policy_context(), self.start())

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for name, data in self.events if name == kind]

    @property
    def at(self) -> np.ndarray:
        return np.array(self.arm.state().ee_position_m)


def test_a_chunk_ends_where_its_rows_add_up() -> None:
    bench = Bench()
    result = bench.run([[0.03, 0.0, -0.05, 1], [0.0, 0.04, 0.01, 1], [0.0, 0.0, 0.0, 0]])
    assert result.outcome is Outcome.COMPLETED and result.moved and len(result.rows) == 3
    assert bench.at == pytest.approx([0.33, 0.04, 0.11], abs=1e-4)
    assert bench.arm.grips == [True, False]
    assert bench.arm.holds == []
    json.dumps(bench.events)


@pytest.mark.parametrize("speed", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("row", [[0.05, -0.05, 0.05, 1], [0.001, 0, 0, 1], [0, 0, 0.02, 0.2, 0.1, 0.25, 1]])
def test_substeps_are_short_and_slow(row: list[float], speed: float) -> None:
    bench = Bench(speed=speed)
    before, began_s = bench.at, bench.clock.now_s()
    assert bench.run([row]).outcome is Outcome.COMPLETED
    assert bench.arm.commands
    for position, duration_s, _ in bench.arm.commands:
        step_m = float(np.linalg.norm(position - before))
        assert step_m <= 0.02 + 1e-9 and duration_s <= 0.1 + 1e-9
        assert step_m / duration_s <= 0.25 * speed + 1e-9
        before = position
    if len(row) == 7:
        assert bench.clock.now_s() - began_s >= 0.25 / speed
    assert bench.clock.longest_sleep_s <= 0.1 + 1e-9


def test_the_gripper_moves_after_the_translation() -> None:
    bench = Bench()
    bench.run([[0.05, 0, 0, 0]])
    kinds = [kind for kind, _ in bench.events]
    assert kinds.index("gripper") > max(i for i, kind in enumerate(kinds) if kind in ("substep", "arrival"))


def test_a_changed_row_ends_the_chunk_and_is_executed_as_allowed() -> None:
    bench = Bench()
    result = bench.run([[0.08, 0.0, 0.0, 1], [0.0, 0.05, 0.0, 1]])
    assert result.outcome is Outcome.ENDED_EARLY and result.reasons == (Reason.AXIS_OVER_LIMIT,)
    assert bench.at == pytest.approx([0.35, 0.0, 0.15], abs=1e-4)
    assert len(result.rows) == 1


def test_a_refused_row_holds_and_moves_nothing() -> None:
    bench = Bench()
    result = bench.run([[0.2, 0.0, 0.0, 1], [0.0, 0.05, 0.0, 1]])
    assert result.outcome is Outcome.REFUSED and result.reasons == (Reason.AXIS_FAR_OVER_LIMIT,)
    assert not result.moved and not bench.arm.commands and not bench.arm.grips
    assert len(bench.arm.holds) == 1


@pytest.mark.parametrize(
    "changes", [{"row_episode_id": "e0"}, {"frame_age_at_send_s": 0.6}, {"answer_age_s": 15.1}, {"answer_age_s": None}]
)
def test_rows_of_a_foreign_or_stale_answer_never_reach_the_arm(changes: dict[str, Any]) -> None:
    bench = Bench()
    assert bench.run([[0.01, 0, 0, 1]], policy_context(**changes)).outcome is Outcome.REFUSED
    assert not bench.arm.commands and not bench.arm.grips


def test_contact_lets_the_chunk_go_on_sideways() -> None:
    bench = Bench((0.30, 0.0, 0.02))
    result = bench.run([[0.02, 0.0, -0.05, 1], [0.02, 0.0, -0.05, 0]])
    assert result.outcome is Outcome.COMPLETED
    assert bench.at == pytest.approx([0.34, 0.0, 0.003], abs=1e-4)


def test_three_rows_that_only_push_end_the_chunk() -> None:
    bench = Bench((0.30, 0.0, 0.002))
    result = bench.run([[0, 0, -0.05, 1]] * 6)
    assert result.outcome is Outcome.ENDED_EARLY and Reason.REPEATED_CONTACT in result.reasons
    assert len(result.rows) == 3 and not bench.arm.commands


def test_contact_that_appears_during_a_row_stops_the_push_only() -> None:
    bench = Bench()

    class Appearing(FakeArm):
        def contacts(self) -> frozenset[str]:
            return frozenset({"counter"}) if len(self.commands) >= 2 else frozenset()

    bench.arm = Appearing(bench.clock)
    bench.executor = Executor(bench.arm, bench.clock, bench.limits)
    result = bench.run([[0.05, 0.0, -0.05, 1]])
    assert result.outcome is Outcome.COMPLETED
    assert bench.at[0] == pytest.approx(0.35, abs=1e-4)
    assert bench.at[2] > 0.15 - 0.05 + 0.01


# --- substeps are checked again --------------------------------------------------------------------------------------


def test_an_arm_pushed_against_a_forbidden_box_does_not_go_through_it() -> None:
    pole = limits(forbidden_boxes=(((0.33, 0.038, 0.0), (0.335, 0.15, 0.3)),))
    bench = Bench(within=pole)
    bench.arm.drift_after = (1, (0.315, 0.04, 0.15))  # now a finger tip has the pole in its way
    result = bench.run([[0.05, 0.0, 0.0, 1]])
    assert result.rows[0].decision.verdict == "pass", "the row itself was fine"
    assert result.outcome is Outcome.ENDED_EARLY and result.reasons == (Reason.FORBIDDEN_BOX,)
    assert bench.at[0] <= 0.33 + 1e-4


def test_a_jump_larger_than_any_row_is_not_chased() -> None:
    bench = Bench()
    bench.arm.drift_after = (1, (0.20, -0.10, 0.05))
    result = bench.run([[0.05, 0.0, 0.0, 1]])
    assert result.outcome is Outcome.REFUSED and len(bench.arm.commands) == 1
    assert result.reasons == (Reason.AXIS_FAR_OVER_LIMIT,)
    assert bench.arm.holds


def test_every_command_follows_a_decision_of_its_own() -> None:
    bench = Bench()
    bench.run([[0.05, 0.05, 0.0, 1], [0.0, -0.05, 0.05, 0]])
    assert len(bench.of("substep")) == len(bench.arm.commands) >= 6
    assert all(event["verdict"] == "pass" for event in bench.of("substep"))


row_values = st.floats(-0.12, 0.12) | st.sampled_from([0.05, -0.05, 0.0, math.nan, math.inf])


@given(
    st.lists(
        st.tuples(row_values, row_values, row_values, st.sampled_from([0.0, 1.0, 1.0, 0.5])), min_size=1, max_size=6
    ),
    st.tuples(st.floats(0.15, 0.40), st.floats(-0.10, 0.15), st.floats(0.01, 0.15)),
    st.integers(1, 8),
    st.tuples(st.floats(-0.03, 0.03), st.floats(-0.03, 0.03), st.floats(-0.02, 0.03)),
)
@example([(0.0, 0.046875, 0.0, 0.0), (0.0, 0.0625, 0.0, 0.0)], (0.25, 0.125, 0.125), 1, (0.0, 0.0, 0.0))
@settings(max_examples=150, deadline=None)
def test_nothing_commanded_leaves_the_box_even_when_the_arm_is_pushed(
    rows: list[tuple[float, ...]], begin: tuple[float, ...], when: int, push: tuple[float, ...]
) -> None:
    bench = Bench((0.30, 0.0, 0.15))
    try:
        bench = Bench((begin[0], begin[1], begin[2]))
    except AssertionError:
        return  # not reachable with the gripper down
    pushed = tuple(float(a + b) for a, b in zip(begin, push, strict=True))
    bench.arm.drift_after = (when, pushed)
    try:
        result = bench.run([list(row) for row in rows])
    except AssertionError:
        return  # the push itself is not reachable
    low, high = np.array(bench.limits.box_min_m), np.array(bench.limits.box_max_m)
    was = np.array(begin)
    aside = zip(bench.arm.commands, bench.arm.tips_aside_m, strict=True)
    for number, ((position, _, _), tips_m) in enumerate(aside, start=1):
        half = np.array([0.0, tips_m, 0.0])  # less than 37 mm when the gripper is closed
        worst = np.maximum(np.maximum(low - (position - half), position + half - high), 0.0)
        allowed = np.maximum(np.maximum(low - (was - half), was + half - high), 0.0)
        assert (worst <= allowed + 1e-4).all()
        was = np.array(pushed) if number == when else position
    refused = [row for row in result.rows if row.decision.row is None]
    assert not refused or result.outcome is Outcome.REFUSED
    assert all(np.isfinite(row.row).all() for row in result.rows if row.substeps)


# --- base of a delta, arrival, start rule ----------------------------------------------------------------------------


def test_a_small_sag_does_not_add_up() -> None:
    bench = Bench()
    bench.run([[0.02, 0, 0, 1]])
    bench.arm._goal = bench.arm._from = _shifted(bench, [0, 0, -0.002])
    bench.run([[0.02, 0, 0, 1]])
    assert bench.at == pytest.approx([0.34, 0.0, 0.15], abs=1e-4)
    assert bench.of("base") == []


def test_an_arm_that_was_moved_is_believed_and_noted() -> None:
    bench = Bench()
    bench.run([[0.02, 0, 0, 1]])
    bench.arm._goal = bench.arm._from = _shifted(bench, [0, 0, -0.012])
    bench.run([[0.02, 0, 0, 1]])
    assert bench.at == pytest.approx([0.34, 0.0, 0.138], abs=1e-4)
    assert bench.of("base")[0]["gap_m"] == pytest.approx(0.012, abs=1e-4)


def _shifted(bench: Bench, by: list[float]) -> Any:
    from vlm2vla_twin import kinematics

    state = bench.arm.state()
    joints = kinematics.inverse(bench.at + np.array(by), np.asarray(state.ee_rotation), state.joints_rad, 1e-6, 1e-5)
    assert joints is not None
    return joints


def test_an_arm_that_does_not_arrive_ends_the_chunk_within_two_seconds_and_holds() -> None:
    bench = Bench()
    bench.arm.stuck = True
    began_s = bench.clock.now_s()
    result = bench.run([[0.015, 0, 0, 0], [0.01, 0, 0, 1]])
    assert result.outcome is Outcome.NOT_ARRIVED and len(result.rows) == 1
    assert bench.clock.now_s() - began_s <= 2.0 + 0.2
    assert bench.arm.holds and bench.arm.grips == []


def test_motion_starts_only_from_a_fresh_frame() -> None:
    bench = Bench()
    for age_s, outcome in ((0.49, Outcome.COMPLETED), (0.51, Outcome.NOT_STARTED), (math.nan, Outcome.NOT_STARTED)):
        start = MotionStart(bench.clock.now_s() - age_s, bench.at)
        assert bench.executor.run_chunk([[0.001, 0, 0, 1]], policy_context(), start).outcome is outcome


def test_motion_starts_only_where_the_picture_was_taken() -> None:
    bench = Bench()
    for shift_m, outcome in ((0.0049, Outcome.COMPLETED), (0.0051, Outcome.NOT_STARTED)):
        start = MotionStart(bench.clock.now_s(), bench.at + np.array([shift_m, 0.0, 0.0]))
        assert bench.executor.run_chunk([[0, 0, 0.01, 1]], policy_context(), start).outcome is outcome
    assert bench.executor.run_chunk([[0, 0, 0.01, 1]], policy_context(), None).outcome is Outcome.NOT_STARTED
    assert bench.executor.run_chunk([[0, 0, 0.01, 1]], OPERATOR, None).outcome is Outcome.COMPLETED


def test_streamed_rows_are_started_with_the_facts_of_that_moment() -> None:
    bench = Bench()

    def slowly() -> Iterator[list[float]]:
        for _ in range(3):
            bench.clock.sleep_s(3.0)
            yield [0.01, 0, 0, 1]

    result = bench.executor.run_chunk(slowly(), policy_context(), bench.start)
    assert result.outcome is Outcome.COMPLETED and len(result.rows) == 3


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poll", [1, 2, 5, 9])
def test_a_fault_holds_within_a_quarter_of_a_second(poll: int) -> None:
    monitor = ScriptedMonitor(poll)
    bench = Bench(monitor=monitor)
    result = bench.run([[0.05, 0, 0, 0], [0, 0.05, 0, 1]])
    assert result.outcome is Outcome.FAULT and result.reason == "the server is gone"
    assert [reason for reason, _ in bench.arm.holds] == ["the server is gone"]
    last_s = max([time_s for _, _, time_s in bench.arm.commands], default=bench.arm.holds[0][1])
    assert bench.arm.holds[0][1] - last_s <= 0.25
    assert bench.clock.longest_sleep_s <= 0.1 + 1e-9
    assert monitor.polls == poll


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_failing_driver_is_held_and_reported(at: int) -> None:
    bench = Bench()
    bench.arm.fail_at_command = at
    with pytest.raises(RobotError, match="no answer"):
        bench.run([[0.05, 0, 0, 1], [0, 0.05, 0, 1]])
    assert len(bench.arm.holds) == 1 and len(bench.arm.commands) == at


@pytest.mark.parametrize("error", [ValueError("bad stream"), KeyboardInterrupt()])
def test_whatever_the_row_source_raises_ends_in_hold(error: BaseException) -> None:
    bench = Bench()

    def broken() -> Iterator[list[float]]:
        yield [0.01, 0, 0, 1]
        raise error

    with pytest.raises(type(error)):
        bench.run(broken())
    assert len(bench.arm.holds) == 1


def test_a_recorder_that_fails_does_not_keep_the_arm_from_holding() -> None:
    bench = Bench()

    def full_disk(kind: str, data: dict[str, Any]) -> None:
        raise OSError("no space left")

    bench.executor = Executor(bench.arm, bench.clock, bench.limits, on_event=full_disk)
    with pytest.raises(OSError):
        bench.run([[0.01, 0, 0, 1]])
    assert len(bench.arm.holds) == 1 and not bench.arm.commands


class Looked(FakeArm):
    """Remembers when it was last looked at."""

    looked_s = 0.0

    def state(self) -> RobotState:
        self.looked_s = self._clock.now_s()
        return super().state()

    def command(self, position_m: Any, rotation: Any, duration_s: float) -> None:
        assert self._clock.now_s() - self.looked_s <= CHECK_AHEAD_S / 2 + 1e-9, "moved by an old look"
        super().command(position_m, rotation, duration_s)


@pytest.mark.parametrize("ahead_s", [0.0, CHECK_AHEAD_S])
def test_a_disk_that_takes_a_second_does_not_come_between_a_check_and_its_motion(ahead_s: float) -> None:
    bench = Bench()
    bench.arm = Looked(bench.clock)
    executor = Executor(
        bench.arm, bench.clock, bench.limits, on_event=lambda *_: bench.clock.sleep_s(1.0), ahead_s=ahead_s
    )
    assert executor.run_chunk([[0.05, 0.0, 0.0, 1], [0.0, 0.05, 0.0, 1]], OPERATOR).outcome is Outcome.COMPLETED
    assert len(bench.arm.commands) >= 6


def test_a_stop_that_comes_while_the_disk_is_slow_keeps_the_gripper_still() -> None:
    monitor = ScriptedMonitor(1_000_000)
    bench = Bench(monitor=monitor)

    def slow(kind: str, data: dict[str, Any]) -> None:
        if kind == "arrival":
            monitor.fault_at_poll = 0  # pressed while the arrival is written down

    bench.executor = Executor(bench.arm, bench.clock, bench.limits, monitor, on_event=slow)
    assert bench.run([[0.02, 0.0, 0.0, 0]]).outcome is Outcome.FAULT
    assert bench.arm.grips == [] and bench.arm.holds


def test_the_next_substep_is_checked_ahead_and_follows_without_a_pause() -> None:
    bench = Bench()
    slow = {"substep": 0.003}
    executor = Executor(
        bench.arm,
        bench.clock,
        bench.limits,
        ahead_s=CHECK_AHEAD_S,
        on_event=lambda kind, _: bench.clock.sleep_s(slow.get(kind, 0)),
    )
    executor.run_chunk([[0.05, 0.0, 0.0, 1]], OPERATOR)
    (_, first_s, at_s), *rest = bench.arm.commands
    for number, (_, duration_s, time_s) in enumerate(rest, start=1):
        assert duration_s == first_s and time_s == pytest.approx(at_s + number * first_s, abs=1e-9)
    assert bench.at == pytest.approx([0.35, 0.0, 0.15], abs=1e-4)


def test_old_or_contradictory_states_stop_the_arm() -> None:
    bench = Bench()
    bench.arm.state_delay_s = 0.3
    with pytest.raises(RobotError, match="old"):
        bench.executor.run_chunk([[0.01, 0, 0, 1]], OPERATOR)
    bench.arm.state_delay_s, bench.arm.position_error_m = 0.0, 0.03
    with pytest.raises(RobotError, match="disagree"):
        bench.executor.run_chunk([[0.01, 0, 0, 1]], OPERATOR)
    assert len(bench.arm.holds) == 2 and not bench.arm.commands


def test_one_chunk_at_a_time() -> None:
    bench = Bench()

    def nested() -> Iterator[list[float]]:
        bench.executor.run_chunk([[0.01, 0, 0, 1]], OPERATOR)
        yield [0.01, 0, 0, 1]

    with pytest.raises(RobotError, match="already running"):
        bench.run(nested())
    assert bench.run([[0.01, 0, 0, 1]]).outcome is Outcome.COMPLETED


def test_after_a_hold_rows_start_from_the_measured_pose() -> None:
    bench = Bench()
    bench.run([[0.02, 0, 0, 1]])
    bench.executor.hold("operator")
    bench.arm._goal = bench.arm._from = _shifted(bench, [0, 0, -0.004])
    bench.run([[0.0, 0.02, 0, 1]])
    assert bench.at == pytest.approx([0.32, 0.02, 0.146], abs=1e-4)


@pytest.mark.parametrize("speed", [0.0, -1.0, 1.01, math.nan])
def test_speed_is_a_share(speed: float) -> None:
    with pytest.raises(ConfigurationError):
        Bench(speed=speed)
