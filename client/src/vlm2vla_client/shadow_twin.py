"""The twin that moves a chunk before the arm does: the client's own executor and filter on a simulated arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from vlm2vla_client.executor import Executor, MotionStart, Outcome
from vlm2vla_client.robots.twin import TwinClock, TwinRobot
from vlm2vla_client.safety import Box, Limits, RobotState, SafetyContext
from vlm2vla_client.shadow import CLEARANCE_M, Forecast, Touch
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import FINGER_CLOSED_M, FINGER_OPEN_M, Bench, SceneSpec

FINGERS: Final = frozenset({"left_finger", "right_finger"})
#: What touches from the start is the chunk's doing only when it comes nearer by more than this.
_NEARER_M: Final = 0.002


class TwinShadow:
    """A simulated arm on this bench.

    Args:
        limits: those of the run; the counter, the wall and the forbidden boxes stand where they say.
        speed: share of the speed limits, as in the run.
    """

    def __init__(self, limits: Limits, speed: float) -> None:
        self._limits, self._speed = limits, speed
        boxes = tuple(_raised(box, limits.counter_z_m) for box in limits.forbidden_boxes)
        bench = Bench(limits.counter_z_m, limits.wall_x_m, boxes)
        self._world = World(SceneSpec(seed=0), settle_s=0.0, bench=bench)

    def rehearse(self, rows: Sequence[Sequence[float]], context: SafetyContext, state: RobotState) -> Forecast:
        """See :class:`~vlm2vla_client.shadow.Shadow`; from the measured joints and opening, through the same filter.

        Raises:
            RobotError: the twin cannot take up that state.
        """
        world = self._world
        opening_m = FINGER_CLOSED_M + min(max(state.gripper, 0.0), 1.0) * (FINGER_OPEN_M - FINGER_CLOSED_M)
        world.set_joints(np.asarray(state.joints_rad, dtype=np.float64), gripper_m=opening_m)
        world.command_joints(world.joints_rad())
        world.command_gripper(state.gripper >= 0.5)
        clock = TwinClock(world)
        robot, seen = TwinRobot(world, clock), _Gaps(world)
        clock.on_advance.append(seen.look)
        robot.connect()
        executor = Executor(robot, clock, self._limits, speed=self._speed, on_event=seen.on_event)
        start = MotionStart(clock.now_s(), np.asarray(robot.state().ee_position_m, dtype=np.float64))
        result = executor.run_chunk(rows, context, start)
        robot.close()
        return Forecast(
            outcome=result.outcome,
            reason=result.reason,
            reasons=result.reasons,
            rows=len(result.rows),
            asked=len(rows),
            changes=tuple(
                f"row {row.index} {row.decision.verdict}: {', '.join(row.decision.reasons)}"
                for row in result.rows
                if row.decision.verdict != "pass"
            ),
            end_m=tuple(float(v) for v in world.ee_pose().position_m),
            touches=seen.touches(blocked=result.outcome is Outcome.NOT_ARRIVED),
        )


class _Gaps:
    """The nearest that each link came to each thing, and in which row it first came near."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._at_start = world.arm_gaps_m(CLEARANCE_M)
        self._nearest: dict[tuple[str, str], tuple[int, float]] = {}
        self._row = 0

    def on_event(self, kind: str, data: dict[str, Any]) -> None:
        """The executor's; a row begins."""
        if kind == "row":
            self._row = int(data["index"])

    def look(self) -> None:
        """After every step of the physics."""
        for pair, gap_m in self._world.arm_gaps_m(CLEARANCE_M).items():
            row, nearest_m = self._nearest.get(pair, (self._row, gap_m))
            self._nearest[pair] = (row, min(gap_m, nearest_m))

    def touches(self, blocked: bool) -> tuple[Touch, ...]:
        """The forbidden first, then by row; of an arm that was blocked, what touched from the start too.

        Fingers near the counter or the wall have met it only when they touch."""
        found = []
        for pair, (row, gap_m) in self._nearest.items():
            if not blocked and pair in self._at_start and gap_m > self._at_start[pair] - _NEARER_M:
                continue
            allowed = pair[0] in FINGERS and pair[1] in ("counter", "wall")
            if not allowed or gap_m <= 0.001:
                found.append(Touch(*pair, row, gap_m, not allowed))
        return tuple(sorted(found, key=lambda touch: (not touch.forbidden, touch.row, touch.link)))


def _raised(box: Box, counter_z_m: float) -> Box:
    """A forbidden box in the base frame; its heights are relative to the counter."""
    (x0, y0, z0), (x1, y1, z1) = box
    return (x0, y0, z0 + counter_z_m), (x1, y1, z1 + counter_z_m)
