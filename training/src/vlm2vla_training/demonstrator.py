"""A scripted teleoperator for the twin: 5 Hz deltas with jitter, misjudged aims and missed grasps that it corrects.

It reads the simulator, as a person reads the bench; what it leaves in the log is what a real log would hold. Mistakes
are on purpose: a policy that only ever saw clean runs does not know the way back (twin.md, "Model").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm2vla_twin import kinematics
from vlm2vla_twin.physics import UnreachableError, World

STEP_S = 0.2
_SUBSTEPS = 10
HOVER_M = 0.07
GRASP_Z_M = 0.006
CARRY_Z_M = 0.13
PLACE_Z_M = 0.022
RETREAT_M = 0.08
_ARRIVED_M = 0.002

Array = NDArray[np.float64]
Row = list[float]


@dataclass(frozen=True)
class Handling:
    """One object to take, as the simulator names it; `target` None when it is only lifted."""

    object: str
    target: str | None


@dataclass(frozen=True)
class Style:
    """How one demonstrator moves.

    Attributes:
        speed_m: longest motion of one 5 Hz step, metres.
        jitter: relative standard deviation of the length of a step.
        aim_m: standard deviation of a misjudged first aim, metres.
        misjudge: probability of misjudging an aim.
        miss: probability of closing the gripper too high at first.
    """

    speed_m: float = 0.012
    jitter: float = 0.02
    aim_m: float = 0.02
    misjudge: float = 0.4
    miss: float = 0.1


class Demonstrator:
    """Yields rows [dx_m, dy_m, dz_m, gripper] for a list of handlings; the caller executes each before the next."""

    def __init__(self, world: World, handlings: list[Handling], random: np.random.Generator, style: Style) -> None:
        """Start at the arm's present pose with the gripper open."""
        self._world = world
        self._handlings = handlings
        self._random = random
        self._style = style
        self._gripper = 1.0
        self.goal_m: Array = np.array(world.ee_pose().position_m, dtype=np.float64)

    def rows(self) -> Iterator[Row]:
        """Yield the whole demonstration, ending with one row at rest."""
        for handling in self._handlings:
            yield from self._take(handling.object)
            yield from self._to_height(CARRY_Z_M + self._random.uniform(-0.005, 0.005))
            if handling.target is not None:
                yield from self._put(handling.target)
        yield self._row(np.zeros(3))

    def _take(self, name: str) -> Iterator[Row]:
        yield from self._above(name, HOVER_M)
        if self._random.random() < self._style.miss:
            yield from self._to_height(self._position(name)[2] + self._random.uniform(0.03, 0.05))
            yield from self._grip(0.0)
            rises = self._random.random() < 0.5
            yield from self._open(before_rising=rises)
            if rises:
                yield from self._above(name, HOVER_M)
        yield from self._descend(name, GRASP_Z_M)
        yield from self._grip(0.0)

    def _put(self, target: str) -> Iterator[Row]:
        offset = self._random.normal(0.0, 0.008, 2)
        goal = self._position(target)[:2] + offset
        if self._random.random() < self._style.misjudge:
            aim = goal + self._random.normal(0.0, self._style.aim_m, 2)
            yield from self._to(np.array([*aim, self.goal_m[2]]))
            yield from self._look()
        yield from self._to(np.array([*goal, self.goal_m[2]]))
        yield from self._to_height(PLACE_Z_M)
        yield from self._open(before_rising=True)
        yield from self._to_height(self.goal_m[2] + RETREAT_M + self._random.uniform(-0.005, 0.005))

    def _above(self, name: str, height_m: float) -> Iterator[Row]:
        hover = self._position(name)[2] + height_m + self._random.uniform(-0.004, 0.004)
        if self._random.random() < self._style.misjudge:
            aim = self._position(name)[:2] + self._random.normal(0.0, self._style.aim_m, 2)
            yield from self._to(np.array([*aim, hover + self._random.uniform(0.0, 0.02)]))
            yield from self._look()
        yield from self._to(np.array([*self._position(name)[:2], hover]))

    def _descend(self, name: str, height_m: float) -> Iterator[Row]:
        yield from self._to(np.array([*self._position(name)[:2], height_m]))

    def _to_height(self, height_m: float) -> Iterator[Row]:
        yield from self._to(np.array([self.goal_m[0], self.goal_m[1], height_m]))

    def _to(self, target_m: Array) -> Iterator[Row]:
        while True:
            left = target_m - self.goal_m
            distance = float(np.linalg.norm(left))
            if distance < _ARRIVED_M:
                return
            speed = self._style.speed_m * (1.0 + self._random.normal(0.0, self._style.jitter))
            yield self._row(left * min(1.0, speed / distance))

    def _grip(self, gripper: float) -> Iterator[Row]:
        self._gripper = gripper
        for _ in range(3):
            yield self._row(np.zeros(3))

    def _open(self, before_rising: bool) -> Iterator[Row]:
        """Open with a slight motion against the one that follows: a hand does, and merging rows (B.2) then keeps the
        opening apart. Merged with the retreat it would be executed after it: a row translates before it grips.
        """
        self._gripper = 1.0
        for _ in range(3):
            yield self._row(np.array([0.0, 0.0, -0.001 if before_rising else 0.001]))

    def _look(self) -> Iterator[Row]:
        """Pause, as somebody who sees that the aim was wrong."""
        for _ in range(2):
            yield self._row(np.zeros(3))

    def _row(self, step_m: Array) -> Row:
        rounded = np.round(step_m, 4) + 0.0
        self.goal_m = self.goal_m + rounded
        return [float(rounded[0]), float(rounded[1]), float(rounded[2]), self._gripper]

    def _position(self, name: str) -> Array:
        return np.array(self._world.object_pose(name)[0], dtype=np.float64)


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
