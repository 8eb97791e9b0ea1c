"""The row that follows is checked before the one under way has ended, and again when anything is not as it was then."""

from typing import Any

import numpy as np
import pytest
from robot_fakes import FakeArm, ManualClock, limits

from vlm2vla_client import checks
from vlm2vla_client.errors import RobotError
from vlm2vla_client.executor import ChunkResult, Executor, Outcome
from vlm2vla_client.safety import Decision, Reason, RobotState, SafetyContext, filter_row
from vlm2vla_twin import kinematics

AHEAD_S = 0.004
OPERATOR = SafetyContext("e1", "e1", None, None, source="operator")
ROWS = [[0.03, 0.0, 0.0, 1], [0.0, 0.03, -0.02, 1], [-0.01, 0.0, 0.0, 1]]


class DisturbedArm(FakeArm):
    """From a moment on it touches something, stands a little higher than it was sent, or does not hold any more."""

    moment_s = float("inf")
    touched = ""
    pushed_m = 0.0
    lost = False

    def state(self) -> RobotState:
        if self.pushed_m and self._clock.now_s() >= self.moment_s:
            here = kinematics.forward(self._goal)
            above_m = here.position_m + np.array([0.0, 0.0, self.pushed_m])
            pushed = kinematics.inverse(above_m, here.rotation, self._goal, 1e-7, 1e-6)
            assert pushed is not None
            self._from, self._goal, self.pushed_m = pushed, pushed, 0.0
        return super().state()

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
    """The moment after the second row was checked ahead, before the first has ended: the same in every run."""
    bench = Bench(monkeypatch)
    return bench.first_row_ended_s(bench.run()) - AHEAD_S / 2


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


def test_a_fault_between_two_rows_starts_no_row_and_loses_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    moment_s = between_two_rows(monkeypatch)
    bench = Bench(monkeypatch)
    bench.pressed_s = moment_s
    result = bench.run()
    assert result.outcome is Outcome.FAULT and len(bench.arm.holds) == 1
    assert bench.told[-2:] == ["fault", "hold"] and bench.told.count("row") == 1
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
