"""What the executor asks before anything moves: a fresh state, what the arm touches, and the filter's word.

The filter is asked about every row, and again about every substep, with the newest state. Shortly before a substep has
ended, what follows it is checked ahead, from where the arm is expected then. When the time has nearly come, the newest
state says whether it still gets there; if not, the check is made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from vlm2vla_client.clock import Clock
from vlm2vla_client.errors import RobotError
from vlm2vla_client.motion import Ahead, FloatArray, Judged, Leg, as_if_at, plan_leg, row_between
from vlm2vla_client.robots.base import Robot
from vlm2vla_client.safety import Decision, Limits, RobotState, SafetyContext, filter_row
from vlm2vla_client.safety_types import CONTACT_MARGIN_M
from vlm2vla_twin.kinematics import Pose, forward

MAX_STATE_AGE_S: Final = 0.25
MAX_STATE_MISMATCH_M: Final = 0.02
#: A look at the arm is not repeated within this time: even at full speed it moves half a millimetre in it.
SAME_LOOK_S: Final = 0.002


class Checks:
    """Of one arm.

    Args:
        limits: what the filter enforces.
        pace: the limits at the speed of this run; slower ones make longer motions.
    """

    def __init__(self, robot: Robot, clock: Clock, limits: Limits, pace: Limits) -> None:
        self._robot, self._clock, self._limits, self._pace = robot, clock, limits, pace
        self._foreseen: Judged | None = None
        self._looked: tuple[float, RobotState] | None = None

    def forget(self) -> None:
        """What was seen and checked ahead belongs to a chunk that has ended."""
        self._foreseen = self._looked = None

    def state(self) -> RobotState:
        """A measurement of this moment that does not contradict itself. Raises RobotError when there is none."""
        now_s = self._clock.now_s()
        if self._looked is not None and now_s - self._looked[0] <= SAME_LOOK_S:
            return self._looked[1]
        state = self._robot.state()
        age_s = self._clock.now_s() - state.stamp_s
        if not age_s <= MAX_STATE_AGE_S:
            raise RobotError(
                f"the arm's state is {age_s:.2f} s old (limit {MAX_STATE_AGE_S} s): is its driver running?"
            )
        gap_m = math.dist(forward(state.joints_rad).position_m, state.ee_position_m)
        if not gap_m <= MAX_STATE_MISMATCH_M:
            raise RobotError(
                f"the arm's joints and its reported position disagree by {1000 * gap_m:.0f} mm: recalibrate"
            )
        self._looked = now_s, state
        return state

    def row(self, row: Sequence[float], context: SafetyContext, state: RobotState, base: Pose) -> Judged:
        """The filter's word on a row from ``base``. What was said ahead counts if it would be asked the same now."""
        here, touching = as_if_at(state, base), self._touching(context, state)
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen.still_holds(row, here, base, touching):
            return foreseen
        return self._judge(row, here, base, touching)

    def substep(self, wanted: Pose, leg: Leg, context: SafetyContext, state: RobotState) -> Decision:
        """The filter's word on a substep. What was said ahead counts while the arm is where it was looked at then."""
        touching = self._touching(context, state)
        ahead, leg.ahead = leg.ahead, None
        if ahead is not None and ahead.still_holds(state, touching):
            return ahead.decision
        return filter_row(row_between(state, wanted, leg), state, touching, self._limits)

    def foresee_substep(
        self, leg: Leg, at_m: FloatArray, step: int, context: SafetyContext, coming: RobotState
    ) -> None:
        """Checks a substep that begins at ``at_m`` before its time, with the state expected then. Commands nothing."""
        touching = self._touching(context, coming)
        decision = filter_row(row_between(coming, leg.wanted(at_m, step), leg), coming, touching, self._limits)
        leg.ahead = Ahead(coming, touching, decision) if decision.verdict == "pass" else None

    def foresee_row(self, row: Sequence[float], base: Pose, context: SafetyContext, coming: RobotState) -> None:
        """Checks a row and its first substep, as ``foresee_substep``."""
        touching = self._touching(context, coming)
        self._foreseen = self._judge(row, as_if_at(coming, base), base, touching)
        leg = self._foreseen.leg
        if leg is not None and leg.steps:
            self.foresee_substep(leg, base.position_m, 1, context, coming)

    def _judge(self, row: Sequence[float], here: RobotState, base: Pose, touching: SafetyContext) -> Judged:
        decision = filter_row(row, here, touching, self._limits)
        leg = None if decision.row is None else plan_leg(here, base, decision.row, self._pace)
        return Judged(row, here, base, touching, decision, leg)

    def _touching(self, context: SafetyContext, state: RobotState) -> SafetyContext:
        found = set(context.contacts) | set(self._robot.contacts())
        floor_m = self._limits.counter_z_m + CONTACT_MARGIN_M
        if min(np.asarray(state.finger_tips_m)[:, 2].tolist()) <= floor_m:
            found.add("counter")
        return replace(context, contacts=frozenset(found))
