"""A scripted teleoperator for the twin: 5 Hz deltas with misjudged aims and missed grasps that it corrects, its own
or those of a policy that it lets act first.

It reads the simulator, as a person reads the bench; what it leaves in the log is what a real log would hold. Mistakes
are on purpose: a policy that only ever saw clean runs does not know the way back (twin.md, "Model").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm2vla_twin import kinematics
from vlm2vla_twin.expert import GRASP_M, HOVER_M, Waypoint, rows_for, waypoints
from vlm2vla_twin.physics import UnreachableError, World
from vlm2vla_twin.skills import Goal, Skill

STEP_S = 0.2
_SUBSTEPS = 10
_GRIP_ROWS = 3
_PAUSE_ROWS = 2
_NUDGE_M = 0.001
# A smaller error would not be noticed.
_SEEN_M = 0.015
# A policy's attempt is looked at for so many rows; one this far beside its object or off its height is corrected.
_LOOK_ROWS = 3
_OFF_M = 0.012
_HOVER_M = (0.045, 0.095)
# So often; else the policy goes on to grasp from there, as it does when its verifier is wrong.
_CORRECTED = 0.5
# A second attempt of the policy to grasp is let happen so often.
_SECOND_TRY = 0.35

Array = NDArray[np.float64]
Row = list[float]
# A policy's rows for a subtask, from the present picture.
Policy = Callable[[Skill], list[Row]]


@dataclass(frozen=True)
class Style:
    """How the demonstrator moves and errs.

    Attributes:
        speed_m: longest motion of one 5 Hz step on each axis, metres. Four of the default make one merged row.
        aim_m: largest error of a misjudged first aim, metres.
        misjudge: probability of misjudging an aim.
        residual_m: largest error that is left over the object and corrected while descending, metres.
        miss: probability of closing the gripper too high or beside the object at first.
    """

    speed_m: float = 0.0124
    aim_m: float = 0.045
    misjudge: float = 0.4
    residual_m: float = 0.009
    miss: float = 0.12


class Demonstrator:
    """Yields rows [dx_m, dy_m, dz_m, gripper] for a list of goals; the caller executes each before the next.

    The way comes from the twin's expert; aims, pauses and mistakes are this class's.
    """

    def __init__(
        self,
        world: World,
        goals: tuple[Goal, ...],
        random: np.random.Generator,
        style: Style,
        policy: Policy | None = None,
    ) -> None:
        """Start at the arm's present pose with the gripper open. A `policy` makes the first attempts to move over each
        object and to grasp it, in place of the demonstrator's own mistakes.
        """
        self._world = world
        self._goals = goals
        self._random = random
        self._style = style
        self._policy = policy
        self._open = True
        self.goal_m: Array = np.array(world.ee_pose().position_m, dtype=np.float64)

    def rows(self) -> Iterator[Row]:
        """Yield the whole demonstration, ending with one row at rest."""
        for goal in self._goals:
            if self._policy is not None:
                yield from self._attempted(goal.object, self._policy)
            else:
                yield from self._aim(Skill("move", goal.object))
                if self._random.random() < self._style.miss:
                    yield from self._miss(goal.object)
            if not self._world.grasped(goal.object):
                yield from self._skill(Skill("grasp", goal.object))
            yield from self._skill(Skill("lift", goal.object))
            if goal.target is not None:
                yield from self._aim(Skill("carry", goal.object, goal.target))
                yield from self._skill(Skill("lower", goal.object, goal.target))
                yield from self._release(Skill("release", goal.object, goal.target))
        yield self._row(np.zeros(3))

    def _skill(self, skill: Skill) -> Iterator[Row]:
        yield from self._along(self._way(skill))

    def _way(self, skill: Skill) -> list[Waypoint]:
        """The expert's way, with what it takes from the measured pose moved to the commanded one: the last millimetre
        that an arm lags behind is no part of what the demonstrator means.
        """
        lag = self.goal_m - np.array(self._world.ee_pose().position_m)
        way = waypoints(self._world, skill)
        if skill.kind in ("move", "grasp"):
            return way
        if skill.kind == "carry":
            x, y, z = way[0].position_m
            return [Waypoint((x, y, max(float(self.goal_m[2]), z + float(lag[2]))), False)]
        lag[2] *= skill.kind != "lower"
        return [_moved([point], lag)[0] for point in way]

    def _aim(self, skill: Skill) -> Iterator[Row]:
        """Go over the object or place, perhaps to a wrong spot first, which is seen and corrected."""
        if self._random.random() < self._style.misjudge:
            offset = [*self._disc(_SEEN_M, self._style.aim_m), self._random.uniform(0.0, 0.015)]
            yield from self._along(_moved(self._way(skill), np.array(offset)))
            yield from self._at_rest(_PAUSE_ROWS)
        offset = [*self._disc(0.0, self._style.residual_m), 0.0]
        yield from self._along(_moved(self._way(skill), np.array(offset)))

    def _disc(self, least_m: float, most_m: float) -> list[float]:
        angle, radius = self._random.uniform(0.0, 2 * np.pi), self._random.uniform(least_m, most_m)
        return [float(radius * np.cos(angle)), float(radius * np.sin(angle))]

    def _miss(self, thing: str) -> Iterator[Row]:
        """Close too high, far beside the object or just beside it, and open again right there; what was caught after
        all is kept."""
        x, y = (float(value) for value in self.goal_m[:2])
        kind = str(self._random.choice(["high", "beside", "near", "near"]))
        if kind == "high":
            place = (x, y, float(self._random.uniform(0.040, 0.055)))
        else:
            # Near is what a policy that aims badly does: the fingers push the object, or close on its end.
            dx, dy = self._disc(0.05, 0.06) if kind == "beside" else self._disc(0.016, 0.035)
            place = (x + dx, y + dy, GRASP_M)
            if kind == "beside":
                yield from self._along([Waypoint((*place[:2], HOVER_M), True)])
        yield from self._along([Waypoint(place, True), Waypoint(place, False)])
        if not self._world.grasped(thing):
            yield from self._opened(rising_next=kind != "high")

    def _attempted(self, thing: str, policy: Policy) -> Iterator[Row]:
        """The policy moves over the object and grasps; what it gets wrong is put right, ready for a grasp or done."""
        move, grasp = Skill("move", thing), Skill("grasp", thing)
        yield from self._as_told(policy(move))
        if not self._open or (self._off(thing) and self._random.random() < _CORRECTED):
            yield from self._at_rest(_LOOK_ROWS)
            if not self._open:
                yield from self._opened(rising_next=True)
            yield from self._aim(move)
        for _ in range(1 + int(self._random.random() < _SECOND_TRY)):
            yield from self._as_told(policy(grasp))
            if self._open:
                yield from self._at_rest(_LOOK_ROWS)
        if not self._open and not self._world.grasped(thing):
            yield from self._opened(rising_next=True)

    def _as_told(self, rows: list[Row]) -> Iterator[Row]:
        """A policy's rows at 5 Hz: each translates, then grips, and none pushes below where objects are grasped."""
        for dx, dy, dz, gripper in rows:
            x, y, z = (float(v) for v in self.goal_m + np.array([dx, dy, dz]))
            yield from self._along([Waypoint((x, y, max(z, GRASP_M)), gripper > 0.5)])

    def _off(self, thing: str) -> bool:
        """Whether the open gripper is not over the object, as far as one can see."""
        there, height = self._world.object_pose(thing)[0][:2], float(self.goal_m[2])
        aside = float(np.linalg.norm(self.goal_m[:2] - there))
        return not self._open or aside > _OFF_M or not _HOVER_M[0] <= height <= _HOVER_M[1]

    def _at_rest(self, rows: int) -> Iterator[Row]:
        for _ in range(rows):
            yield self._row(np.zeros(3))

    def _release(self, skill: Skill) -> Iterator[Row]:
        yield from self._opened(rising_next=True)
        yield from self._along(self._way(skill)[1:])

    def _opened(self, rising_next: bool) -> Iterator[Row]:
        """Open with a slight motion against the one that follows, as a hand does: merging rows (B.2) then keeps the
        opening apart. Merged with what follows it would be executed after it, for a row translates before it grips.
        """
        self._open = True
        for _ in range(_GRIP_ROWS):
            yield self._row(np.array([0.0, 0.0, -_NUDGE_M if rising_next else _NUDGE_M]))

    def _along(self, way: list[Waypoint]) -> Iterator[Row]:
        was_open = self._open
        for step, gripper in rows_for(self.goal_m, way, was_open, self._style.speed_m):
            changed = (gripper > 0.5) != self._open
            self._open = gripper > 0.5
            for _ in range(_GRIP_ROWS if changed else 1):
                yield self._row(step)

    def _row(self, step_m: Array) -> Row:
        rounded = np.round(step_m, 4) + 0.0
        self.goal_m = self.goal_m + rounded
        return [float(rounded[0]), float(rounded[1]), float(rounded[2]), float(self._open)]


def _moved(way: list[Waypoint], offset_m: Array) -> list[Waypoint]:
    """The same way with its last waypoint displaced, metres."""
    last = np.asarray(way[-1].position_m) + offset_m
    return [*way[:-1], Waypoint((float(last[0]), float(last[1]), float(last[2])), way[-1].open)]


def execute(world: World, goal_m: Array, gripper: float) -> None:
    """Move the end effector to `goal_m`, gripper down, over one 5 Hz step; joints go linearly to their goal.

    Raises:
        UnreachableError: no joint angles reach it.
    """
    start = np.array(world.data.ctrl[:6], dtype=np.float64)
    joints = kinematics.inverse(goal_m, kinematics.DOWN, start, 1e-5, 1e-4)
    if joints is None:
        raise UnreachableError(f"no arm pose with the gripper down at {np.round(goal_m, 3)} m")
    world.command_gripper(gripper > 0.5)
    for substep in range(1, _SUBSTEPS + 1):
        world.command_joints(start + (joints - start) * substep / _SUBSTEPS)
        world.step(STEP_S / _SUBSTEPS)
