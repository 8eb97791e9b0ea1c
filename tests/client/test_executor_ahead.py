"""What follows is checked before the substep under way has ended, and again when anything is not as expected then."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from robot_fakes import FakeArm, ManualClock, limits, state_at

from vlm2vla_client import checks
from vlm2vla_client.errors import RobotError
from vlm2vla_client.executor import ChunkResult, Executor, Outcome
from vlm2vla_client.motion import Leg, UnderWay
from vlm2vla_client.physical import CHECK_AHEAD_S
from vlm2vla_client.safety import Decision, Reason, RobotState, SafetyContext, filter_row
from vlm2vla_client.safety_geometry import rotation_of
from vlm2vla_twin import kinematics

AHEAD_S = CHECK_AHEAD_S
OPERATOR = SafetyContext("e1", "e1", None, None, source="operator")
ROWS = [[0.03, 0.0, 0.0, 1], [0.0, 0.03, -0.02, 1], [-0.01, 0.0, 0.0, 1]]


class DisturbedArm(FakeArm):
    """From a moment on it touches something, is a little higher than it was sent, or does not hold any more."""

    moment_s = float("inf")
    touched = ""
    pushed_m = 0.0
    lost = False
    gripped_s = float("inf")

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        self.gripped_s = self._clock.now_s()
        super().set_gripper(open_, deadline_s)

    def state(self) -> RobotState:
        if self.pushed_m and self._clock.now_s() >= self.moment_s:
            self._from, self._goal = self._above(self._from), self._above(self._goal)
            self.pushed_m = 0.0
        return super().state()

    def _above(self, joints_rad: Any) -> Any:
        here = kinematics.forward(joints_rad)
        above_m = here.position_m + np.array([0.0, 0.0, self.pushed_m])
        pushed = kinematics.inverse(above_m, here.rotation, joints_rad, 1e-7, 1e-6)
        assert pushed is not None
        return pushed

    def hold(self, reason: str) -> None:
        if self.lost:
            raise RobotError("the arm does not answer")
        super().hold(reason)

    def contacts(self) -> frozenset[str]:
        return frozenset({self.touched}) if self.touched and self._clock.now_s() >= self.moment_s else frozenset()


class Bench:
    """An executor whose filter and recorder note when they were asked and told; each line takes ``writing_s``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **disturbed: Any) -> None:
        self.clock = ManualClock()
        self.arm = DisturbedArm(self.clock)
        vars(self.arm).update(disturbed)
        self.told: list[str] = []
        self.asked: list[tuple[float, Decision]] = []
        self.writing_s, self.fails_at, self.pressed_s = 0.0, "", float("inf")
        self.executor = Executor(
            self.arm, self.clock, limits(), self, on_event=self.write, gripper=1.0, ahead_s=AHEAD_S
        )  # fmt: skip
        monkeypatch.setattr(checks, "filter_row", self.filter)

    def filter(self, *asked: Any) -> Decision:
        decision = filter_row(*asked)
        self.asked.append((self.clock.now_s(), decision))
        return decision

    def write(self, kind: str, data: dict[str, Any]) -> None:
        self.clock.sleep_s(self.writing_s)
        if kind == self.fails_at:
            raise OSError("no space left")
        self.told.append(kind)

    def fault(self) -> str | None:
        return "a key" if self.clock.now_s() >= self.pressed_s else None

    def run(self, rows: Any = None) -> ChunkResult:
        return self.executor.run_chunk(ROWS if rows is None else rows, OPERATOR)

    def first_row_ended_s(self, result: ChunkResult) -> float:
        _, duration_s, last_s = self.arm.commands[result.rows[0].substeps - 1]
        return last_s + duration_s


def between_two_rows(monkeypatch: pytest.MonkeyPatch) -> float:
    """A moment after the second row was checked ahead, before the arm is looked at again: the same in every run."""
    bench = Bench(monkeypatch)
    return bench.first_row_ended_s(bench.run()) - 0.75 * AHEAD_S


def test_a_row_follows_at_once_however_slowly_things_are_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.writing_s = 0.003
    result, at = bench.run(), 0
    assert result.outcome is Outcome.COMPLETED
    for row in result.rows[:-1]:
        at += row.substeps
        (_, duration_s, last_s), (_, _, next_s) = bench.arm.commands[at - 1 : at + 1]
        assert next_s == pytest.approx(last_s + duration_s, abs=1e-9)
    assert np.array(bench.arm.state().ee_position_m) == pytest.approx([0.32, 0.03, 0.13], abs=1e-4)


def test_what_is_written_down_later_is_the_same_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    listed, streamed = Bench(monkeypatch), Bench(monkeypatch)
    assert listed.run().outcome is streamed.run(iter(ROWS)).outcome is Outcome.COMPLETED
    assert listed.told == streamed.told  # of an iterator nobody knows the row that follows
    for (goal_m, *_), (other_m, *_) in zip(listed.arm.commands, streamed.arm.commands, strict=True):
        assert goal_m == pytest.approx(other_m, abs=1e-9)


def test_every_motion_was_checked_shortly_before(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    result = bench.run()
    assert len(bench.asked) == len(result.rows) + len(bench.arm.commands)  # each row and each substep, once
    for _, _, commanded_s in bench.arm.commands:
        assert any(0.0 <= commanded_s - asked_s <= AHEAD_S + 1e-9 for asked_s, _ in bench.asked)


def test_a_contact_after_the_check_ahead_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    moment_s = between_two_rows(monkeypatch)
    bench = Bench(monkeypatch, moment_s=moment_s, touched="counter")
    result = bench.run()
    assert result.rows[1].decision.reasons == (Reason.COUNTER_CONTACT,)
    lowest_m = min(goal_m[2] for goal_m, _, _ in bench.arm.commands)
    assert lowest_m == pytest.approx(0.15, abs=1e-4), "it was lowered onto what it touches"


@pytest.mark.parametrize(("pushed_m", "again"), [(0.0025, True), (0.0005, False)])
def test_an_arm_that_stands_elsewhere_is_checked_again(
    monkeypatch: pytest.MonkeyPatch, pushed_m: float, again: bool
) -> None:
    moment_s = between_two_rows(monkeypatch)
    bench = Bench(monkeypatch, moment_s=moment_s, pushed_m=pushed_m)
    result = bench.run()
    assert result.outcome is Outcome.COMPLETED
    next_s = bench.arm.commands[result.rows[0].substeps][2]
    assert any(moment_s < asked_s <= next_s for asked_s, _ in bench.asked) is again


def test_a_substep_within_a_row_is_checked_again_too(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Bench(monkeypatch)
    first.run(ROWS[:1])
    (_, duration_s, at_s), (_, _, next_s), *_ = first.arm.commands
    moment_s = at_s + duration_s - 0.75 * AHEAD_S
    bench = Bench(monkeypatch, moment_s=moment_s, pushed_m=0.0025)
    assert bench.run(ROWS[:1]).outcome is Outcome.COMPLETED
    assert any(moment_s < asked_s <= next_s for asked_s, _ in bench.asked)


def test_an_arm_that_keeps_beside_its_way_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, position_error_m=0.002)
    result = bench.run()
    assert result.outcome is Outcome.COMPLETED
    assert len(bench.asked) == len(result.rows) + len(bench.arm.commands)


@pytest.mark.parametrize("next_row", [[0.0, 0.0, 0.0, 1], [0.0, 0.0, 0.0, 0]], ids=["nothing", "only the gripper"])
def test_what_does_not_move_waits_until_the_row_before_has_ended(
    monkeypatch: pytest.MonkeyPatch, next_row: list[float]
) -> None:
    bench = Bench(monkeypatch)
    result = bench.run([ROWS[0], next_row])
    assert result.outcome is Outcome.COMPLETED
    ended_s = bench.first_row_ended_s(result)
    assert bench.clock.now_s() >= ended_s - 1e-9 and bench.arm.gripped_s >= ended_s - 1e-9
    assert len(bench.arm.grips) == (next_row[3] == 0)


@pytest.mark.parametrize("turned_rad", [[0.0, 0.0, 0.0], [0.0, 0.2, 0.1]])
@pytest.mark.parametrize("left", [0.25, 1.0])
def test_the_state_to_expect_is_that_of_the_target_and_as_far_beside_it(turned_rad: list[float], left: float) -> None:
    from_m, to_m, beside_m = np.array([0.30, 0.0, 0.15]), np.array([0.31, 0.01, 0.14]), np.array([0.0, 0.0, -0.003])
    turned = np.array(turned_rad)

    def at(share: float) -> RobotState:
        turn = rotation_of(turned * share)
        state = state_at([0.30, 0.0, 0.15])
        arms, here_m = np.asarray(state.finger_tips_m) - from_m, from_m + share * (to_m - from_m) + beside_m
        return replace(
            state, ee_position_m=here_m, ee_rotation=turn @ state.ee_rotation, finger_tips_m=here_m + arms @ turn.T
        )

    leg = Leg(to_m, kinematics.Pose(from_m, kinematics.DOWN), turned, 1.0, 7, 1, 0.08)
    target = kinematics.Pose(to_m, rotation_of(turned) @ kinematics.DOWN)
    under_way = UnderWay(leg, from_m, target, ends_s=5.0)
    coming, end = under_way.coming(at(1.0 - left), 5.0 - left * 0.08), at(1.0)
    assert coming.ee_position_m == pytest.approx(end.ee_position_m, abs=1e-9)
    assert np.asarray(coming.ee_rotation) == pytest.approx(np.asarray(end.ee_rotation), abs=0.01)  # angles do not add
    assert np.asarray(coming.finger_tips_m) == pytest.approx(np.asarray(end.finger_tips_m), abs=3e-4)
    assert under_way.coming(end, 5.0) is end


@pytest.mark.parametrize("later_s", [0.0, AHEAD_S / 2], ids=["before the second look", "after it"])
def test_a_fault_between_two_rows_starts_no_row_and_loses_no_line(
    monkeypatch: pytest.MonkeyPatch, later_s: float
) -> None:
    moment_s = between_two_rows(monkeypatch) + later_s
    bench = Bench(monkeypatch)
    bench.pressed_s = moment_s
    result = bench.run()
    assert result.outcome is Outcome.FAULT and len(bench.arm.holds) == 1
    assert bench.told[-2:] == ["fault", "hold"] and bench.told.count("substep") == len(bench.arm.commands)
    assert not any(commanded_s > moment_s for _, _, commanded_s in bench.arm.commands)


def test_an_arm_that_does_not_even_hold_loses_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    moment_s = between_two_rows(monkeypatch)
    bench = Bench(monkeypatch, lost=True)
    bench.pressed_s = moment_s
    with pytest.raises(RobotError, match="does not answer"):
        bench.run()
    assert bench.told[-1] == "fault" and "hold" not in bench.told


@pytest.mark.parametrize("kind", ["arrival", "row", "substep"])
def test_a_line_that_cannot_be_written_holds_the_arm_and_the_hold_is_told(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    bench = Bench(monkeypatch)
    bench.fails_at = kind
    with pytest.raises(OSError, match="no space"):
        bench.run()
    assert len(bench.arm.holds) == 1 and bench.told[-1] == "hold"


def test_a_row_that_is_refused_ahead_is_refused_when_its_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    result = bench.run([ROWS[0], [0.2, 0.0, 0.0, 1]])
    assert result.outcome is Outcome.REFUSED and result.reasons == (Reason.AXIS_FAR_OVER_LIMIT,)
    assert result.rows[0].arrived and len(bench.arm.commands) == result.rows[0].substeps
    assert bench.told[-3:] == ["arrival", "row", "hold"]
