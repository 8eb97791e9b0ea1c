"""Rows to motion: timed substeps, each filtered again with fresh state; arrival checks; hold on every fault.

For one row: filter, translate in substeps, wait for arrival, then move the gripper (contracts, "Execution").
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from vlm2vla_client.checks import Checks
from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import ConfigurationError, RobotError
from vlm2vla_client.executor_types import ChunkResult, Monitor, Monitors, MotionStart, NoMonitor, Outcome, RowResult
from vlm2vla_client.motion import FloatArray, Leg, UnderWay, apply_decision, row_data, substep_data
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.safety import Limits, Reason, RobotState, SafetyContext
from vlm2vla_client.safety_types import MAX_ZEROED_ROWS
from vlm2vla_twin.kinematics import Pose

EventSink = Callable[[str, dict[str, Any]], None]

MAX_START_FRAME_AGE_S: Final = 0.5
MAX_START_SHIFT_M: Final = 0.005
BASE_TOLERANCE_M: Final = 0.010
BASE_TOLERANCE_RAD: Final = 0.10
ARRIVAL_DEADLINE_S: Final = 2.0
GRIPPER_DEADLINE_S: Final = 1.5
_POLL_S: Final = 0.02
_GRIPPER_STILL_S: Final = 0.2


class _Fault(Exception):
    """A monitor reported a fault; leaves the executor as an Outcome, never as an exception."""


class Executor:
    """Runs one chunk at a time on one robot.

    Args:
        robot: connected.
        clock: the same one that stamps frames and states.
        limits: enforced on every row and every substep.
        monitor: polled before every substep and while waiting; a fault ends in hold.
        speed: share (0..1] of the speed limits.
        on_event: called with (kind, JSON-serialisable data) for the recorder; runs in the executor's thread.
        gripper: what the gripper is known to be told already (1 open, 0 closed), so that rows of the same value leave
            its grip alone; None: the first row commands it.
        ahead_s: how long before a substep has ended the next one, or the next row, is checked, so that it can follow
            without a pause; half that time before, the arm is looked at again. 0 where time is simulated: there it
            does not pass meanwhile.
    """

    def __init__(
        self,
        robot: Robot,
        clock: Clock,
        limits: Limits,
        monitor: Monitor | None = None,
        *,
        speed: float = 1.0,
        on_event: EventSink | None = None,
        gripper: float | None = None,
        ahead_s: float = 0.0,
    ) -> None:
        if not 0.0 < speed <= 1.0:
            raise ConfigurationError(f"speed must be above 0 and at most 1, got {speed}")
        self._robot, self._clock = robot, clock
        self._monitor: Monitor = monitor or NoMonitor()
        # Slower limits make longer motions; the filter itself judges joint speeds at these limits too.
        pace = replace(
            limits,
            max_speed_m_s=limits.max_speed_m_s * speed,
            max_rotation_speed_rad_s=limits.max_rotation_speed_rad_s * speed,
        )
        self._checks = Checks(robot, clock, limits, pace)
        self._on_event = on_event
        self._busy = threading.Lock()
        self._commanded: Pose | None = None
        self._gripper = gripper
        self._ahead_s, self._again_s = ahead_s, ahead_s / 2
        self._under_way: UnderWay | None = None  # not where time is simulated: there a substep ends as it begins
        self._between_rows = False  # then nothing is written down until the arm moves again
        self._unsaid: list[tuple[str, dict[str, Any]]] = []

    def run_chunk(
        self,
        rows: Iterable[Sequence[float]],
        context: SafetyContext,
        start: MotionStart | Callable[[], MotionStart] | None = None,
    ) -> ChunkResult:
        """Execute rows in order until they are done or something ends the chunk. Blocks while the arm moves.

        Args:
            rows: 4-D or 7-D rows; an iterator may deliver them while they are executed. Of a list the next row is
                checked ahead.
            context: where the rows came from; contacts and zeroed rows are added here.
            start: facts for the motion-start rule, or a function called when the first row is there. Only an
                operator's rows may do without.

        Raises:
            RobotError: the arm failed or a chunk is already running. Whatever is raised, the arm is held first.
        """
        if not self._busy.acquire(blocking=False):
            raise RobotError("a chunk is already running on this arm: wait for it or call hold()")
        done: list[RowResult] = []
        try:
            return self._run(rows, context, start, done)
        except _Fault as fault:
            self.hold(str(fault))
            return ChunkResult(Outcome.FAULT, tuple(done), str(fault))
        except BaseException as error:
            self.hold(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._checks.forget()
            self._under_way = None
            self._busy.release()

    def hold(self, reason: str) -> None:
        """Stop here and now; the next row starts from the measured pose. Raises RobotError if even that fails."""
        self._commanded = None
        self._between_rows = False
        # First the arm, then the record of it: a full disk must not keep the arm moving.
        try:
            self._robot.hold(reason)
        except BaseException:
            self._tell()
            raise
        try:
            self._tell()
        finally:
            self._emit("hold", {"reason": reason})

    # --- one chunk ------------------------------------------------------------------------------------------------

    def _run(
        self,
        rows: Iterable[Sequence[float]],
        context: SafetyContext,
        start: MotionStart | Callable[[], MotionStart] | None,
        done: list[RowResult],
    ) -> ChunkResult:
        zeroed = context.fully_zeroed_rows_before
        known = rows if self._ahead_s and isinstance(rows, Sequence) else ()
        for index, row in enumerate(rows):
            if index == 0:
                late = self._too_late(context, start() if callable(start) else start)
                if late is not None:
                    self._emit("not_started", {"reason": late})
                    return ChunkResult(Outcome.NOT_STARTED, (), late)
            self._poll()
            following = known[index + 1] if index + 1 < len(known) else None
            result, leg = self._row(index, row, replace(context, fully_zeroed_rows_before=zeroed), following)
            done.append(result)
            ended = self._after_row(result, leg, tuple(done))
            if ended is not None:
                return ended
            zeroed = zeroed + 1 if self._stood_still(result, leg) else 0
            if zeroed >= MAX_ZEROED_ROWS:
                why = f"{zeroed} rows in a row pushed only into what the gripper touches"
                return ChunkResult(Outcome.ENDED_EARLY, tuple(done), why, (Reason.REPEATED_CONTACT,))
        return ChunkResult(Outcome.COMPLETED, tuple(done))

    def _too_late(self, context: SafetyContext, start: MotionStart | None) -> str | None:
        """The motion-start rule: the picture must still be true when the arm begins to move."""
        if start is None:
            return None if context.source == "operator" else "no frame to start from: a policy's rows need one"
        age_s = self._clock.now_s() - start.newest_frame_s
        if not age_s <= MAX_START_FRAME_AGE_S:
            return f"the newest frame is {age_s:.2f} s old (limit {MAX_START_FRAME_AGE_S} s)"
        shift_m = math.dist(self._checks.state().ee_position_m, start.captured_position_m)
        if not shift_m <= MAX_START_SHIFT_M:
            return f"the arm is {1000 * shift_m:.1f} mm from its pose at capture (limit {1000 * MAX_START_SHIFT_M} mm)"
        return None

    def _row(
        self, index: int, row: Sequence[float], context: SafetyContext, following: Sequence[float] | None
    ) -> tuple[RowResult, Leg | None]:
        coming = self._coming(self._checks.state())
        judged = self._checks.row(row, context, coming, self._base(coming))
        decision, leg, given = judged.decision, judged.leg, list(row)
        if leg is None or leg.steps == 0:
            self._between_rows = False
        self._emit("row", row_data(index, given, judged))
        if leg is None:
            return RowResult(index, given, decision, 0, False), None
        if leg.steps == 0:
            self._let_move(0.0)  # what the row before still does
            self._move_gripper(leg.gripper)
            return RowResult(index, given, decision, 0, True), leg
        plain = decision.verdict == "pass" and leg.gripper == self._gripper
        self._travel(leg, context, following if plain else None)
        if leg.stop is not None and leg.stop.row is None:
            return RowResult(index, given, decision, leg.done, False), leg
        arrived = self._arrive()
        if arrived:
            self._move_gripper(leg.gripper)
        return RowResult(index, given, decision, leg.done, arrived), leg

    def _after_row(self, result: RowResult, leg: Leg | None, done: tuple[RowResult, ...]) -> ChunkResult | None:
        """The end of the chunk, if this row was it."""
        decision = result.decision
        stop = leg.stop if leg is not None else None
        refusal = decision if decision.row is None else stop if stop is not None and stop.row is None else None
        if refusal is not None:
            why = "refused: " + ", ".join(refusal.reasons)
            self.hold(why)
            return ChunkResult(Outcome.REFUSED, done, why, refusal.reasons)
        if not result.arrived:
            why = f"row {result.index} did not arrive within {ARRIVAL_DEADLINE_S} s"
            self.hold(why)
            return ChunkResult(Outcome.NOT_ARRIVED, done, why)
        changed = decision if decision.ends_chunk else stop
        if changed is not None:
            why = "changed: " + ", ".join(changed.reasons)
            return ChunkResult(Outcome.ENDED_EARLY, done, why, changed.reasons)
        return None

    def _stood_still(self, result: RowResult, leg: Leg | None) -> bool:
        """Whether contact stopped the whole of a row's non-zero translation, in the row's check or in its substeps."""
        contact = {Reason.COUNTER_CONTACT, Reason.WALL_CONTACT} & set(result.decision.reasons)
        if leg is None or not any(result.row[:3]) or not (contact or leg.touched):
            return False
        moved = leg.goal_m - leg.base.position_m if leg.steps else np.zeros(3)
        return float(np.abs(moved).max()) < 1e-3 if leg.touched else not moved.any()

    # --- one row --------------------------------------------------------------------------------------------------

    def _travel(self, leg: Leg, context: SafetyContext, following: Sequence[float] | None) -> None:
        """Run the substeps; sets ``leg.stop`` when one was refused or changed in a way that ends the chunk.

        ``following``: the row after this one, where nothing but its arrival comes between them.
        """
        at_m = leg.base.position_m
        # Rows in a row are counted here, not substeps.
        plain = replace(context, fully_zeroed_rows_before=0)
        for step in range(1, leg.steps + 1):
            self._poll()
            state = self._checks.state()
            coming = self._coming(state)
            wanted = leg.wanted(at_m, step)
            decision = self._checks.substep(wanted, leg, plain, coming)
            target = apply_decision(coming, wanted, decision, leg)
            if target is not None:
                self._command(leg, at_m, target)
            self._between_rows = False
            # Only now: a disk that takes a second must not come between a check and its motion.
            self._emit("substep", substep_data(step, leg, state, target, decision))
            if target is None:
                leg.stop = decision
                return
            at_m = target.position_m
            leg.done += 1
            if decision.ends_chunk:
                self._let_move(leg.step_s)
                leg.stop = decision
                return
            ends = step == leg.steps
            if not self._ahead_s or (ends and (following is None or leg.touched)):
                self._let_move(leg.step_s)
                continue
            self._let_move(leg.step_s, self._ahead_s)
            coming = self._coming(self._checks.state())
            if not ends:
                self._checks.foresee_substep(leg, at_m, step + 1, plain, coming)
            elif following is not None:
                self._checks.foresee_row(following, target, plain, coming)
                self._between_rows = True
            self._let_move(0.0, self._again_s)

    def _coming(self, state: RobotState) -> RobotState:
        """The state to expect when the substep under way has ended."""
        return state if self._under_way is None else self._under_way.coming(state, self._clock.now_s())

    def _command(self, leg: Leg, from_m: FloatArray, target: Pose) -> None:
        """Starts a substep when the one under way has ended."""
        if self._under_way is not None:
            self._let_move(0.0)
            self._poll()
        ends_s = self._clock.now_s() + leg.step_s
        self._robot.command(target.position_m, target.rotation, leg.step_s)
        self._commanded = target
        self._under_way = UnderWay(leg, from_m, target, ends_s) if self._ahead_s else None

    def _let_move(self, duration_s: float, before_s: float = 0.0) -> None:
        """Waits until so long before the substep under way has ended. Simulated motion takes all of its time."""
        under_way = self._under_way
        self._clock.sleep_s(duration_s if under_way is None else under_way.ends_s - before_s - self._clock.now_s())

    def _arrive(self) -> bool:
        """Wait until the arm is where the last substep sent it, or the deadline."""
        goal = self._commanded
        assert goal is not None
        now_s = self._clock.now_s()
        ends_s = now_s if self._under_way is None else max(self._under_way.ends_s, now_s)
        while True:
            self._poll()
            error_m = math.dist(self._checks.state().ee_position_m, goal.position_m)
            waited_s = self._clock.now_s() - ends_s
            arrived = error_m <= self._robot.capabilities.arrival_tolerance_m
            if arrived or waited_s >= ARRIVAL_DEADLINE_S:
                self._emit("arrival", {"arrived": arrived, "error_m": error_m, "waited_s": max(waited_s, 0.0)})
                return arrived
            self._clock.sleep_s(_POLL_S if waited_s >= 0.0 else -waited_s)

    def _move_gripper(self, gripper: float) -> None:
        """Open or close, and wait until the fingers arrive or stop (an object between them), at most the deadline."""
        if gripper == self._gripper:
            return
        self._poll()  # what was recorded since the last look may have taken a while
        self._robot.set_gripper(gripper >= 0.5, GRIPPER_DEADLINE_S)
        self._gripper = gripper
        began_s = still_since_s = self._clock.now_s()
        last = self._checks.state().gripper
        while True:
            self._clock.sleep_s(_POLL_S)
            self._poll()
            now_s, opening = self._clock.now_s(), self._checks.state().gripper
            if abs(opening - last) > 0.01:
                last, still_since_s = opening, now_s
            there = abs(opening - gripper) < 0.02
            if there or now_s - still_since_s >= _GRIPPER_STILL_S or now_s - began_s >= GRIPPER_DEADLINE_S:
                self._emit("gripper", {"commanded": gripper, "measured": opening, "waited_s": now_s - began_s})
                return

    # --- what is known --------------------------------------------------------------------------------------------

    def _poll(self) -> None:
        fault = self._monitor.fault()
        if fault is not None:
            self._emit("fault", {"reason": fault})
            raise _Fault(fault)

    def _base(self, state: RobotState) -> Pose:
        """What a row is relative to: the last commanded pose, unless the arm is not there."""
        measured = Pose(np.array(state.ee_position_m, dtype=np.float64), np.array(state.ee_rotation, dtype=np.float64))
        if self._commanded is None:
            return measured
        gap_m = math.dist(measured.position_m, self._commanded.position_m)
        turn = float(np.vdot(self._commanded.rotation, measured.rotation))  # the trace of the turn between them
        gap_rad = math.acos(min(max(0.5 * (turn - 1.0), -1.0), 1.0))
        if gap_m <= BASE_TOLERANCE_M and gap_rad <= BASE_TOLERANCE_RAD:
            return self._commanded
        self._emit("base", {"used": "measured", "gap_m": gap_m, "gap_rad": gap_rad})
        return measured

    def _emit(self, kind: str, data: dict[str, Any]) -> None:
        """Tells the recorder; between two rows as soon as the arm moves again or is held, in the same order."""
        self._unsaid.append((kind, data))
        if not self._between_rows:
            self._tell()

    def _tell(self) -> None:
        unsaid, self._unsaid = self._unsaid, []
        if self._on_event is not None:
            for kind, data in unsaid:
                self._on_event(kind, data)


__all__ = [
    "ChunkResult",
    "EventSink",
    "Executor",
    "Monitor",
    "Monitors",
    "MotionStart",
    "NoMonitor",
    "Outcome",
    "RowResult",
]
