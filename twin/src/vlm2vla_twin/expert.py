"""The scripted demonstrator: it reads the simulator, knows the way, and says it in the words and rows of the method.

:func:`waypoints` is the skill itself: where the gripper must go for one subtask from where it is now. Everything else
here turns waypoints into rows: one row of at most 5 cm an axis for a policy that answers, one step of 5 Hz for a
demonstration to record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema.directions import direction_words, join_words
from vlm2vla_schema.parsing import format_actions, format_subtasks
from vlm2vla_twin.physics import World
from vlm2vla_twin.skills import Goal, Skill, parse_subtask, parse_task, skills_for, title
from vlm2vla_twin.truth import is_held, observe

Array = NDArray[np.float64]

HOVER_M = 0.07
GRASP_M = 0.009
LIFT_M = 0.0992
RETREAT_M = 0.0496
PLACE_M = {"plate": 0.018, "pan": 0.016}
ROW_LIMIT_M = 0.05
LOW_M = 0.055
NEAR_M = 0.012


class UnknownTaskError(ValueError):
    """The demonstrator does not understand a task or subtask, or the scene lacks what it names."""


@dataclass(frozen=True)
class Waypoint:
    """Where the end effector goes next (metres, base frame), and the gripper once it is there."""

    position_m: tuple[float, float, float]
    open: bool


def waypoints(world: World, skill: Skill) -> list[Waypoint]:
    """The way through one subtask from the present state; recovers from a missed grasp and from a low start.

    Raises:
        UnknownTaskError: the scene has no such object.
    """
    for name in (skill.object, skill.target):
        if name is not None and name not in world.object_names():
            raise UnknownTaskError(f"this scene has no {name}; it has {', '.join(world.object_names())}")
    x, y, z = (float(v) for v in world.ee_pose().position_m)
    ox, oy, _ = (float(v) for v in world.object_pose(skill.object)[0])
    aside = max(abs(ox - x), abs(oy - y))
    if skill.kind in ("move", "grasp"):
        way = []
        if world.gripper_fraction() < 0.8 or (z < LOW_M and aside > NEAR_M):
            way.append(Waypoint((x, y, HOVER_M if z < LOW_M else z), True))
        if skill.kind == "move" or (z < LOW_M and aside > NEAR_M):
            way.append(Waypoint((ox, oy, HOVER_M), True))
        if skill.kind == "grasp":
            way += [Waypoint((ox, oy, GRASP_M), True), Waypoint((ox, oy, GRASP_M), False)]
        return way
    if skill.kind == "lift":
        return [Waypoint((x, y, z + LIFT_M), False)]
    target = world.object_pose(skill.target)[0] if skill.target else np.array([x, y, 0.0])
    tx, ty = float(target[0]) + (x - ox) * bool(skill.target), float(target[1]) + (y - oy) * bool(skill.target)
    if skill.kind == "carry":
        return [Waypoint((tx, ty, max(z, 0.085)), False)]
    if skill.kind == "lower":
        return [Waypoint((x, y, PLACE_M.get(skill.target or "", GRASP_M + 0.003)), False)]
    return [Waypoint((x, y, z), True), Waypoint((x, y, z + RETREAT_M), True)]


def deltas(start_m: Array, goal_m: Array, most_m: float) -> Iterator[Array]:
    """The displacements from start to goal, each at most ``most_m`` an axis, every axis as fast as it may."""
    left = np.asarray(goal_m, dtype=np.float64) - start_m
    while np.max(np.abs(left)) > 5e-4:
        step = np.clip(left, -most_m, most_m)
        left = left - step
        yield step


def rows_for(start_m: Array, way: list[Waypoint], open_now: bool, most_m: float) -> Iterator[tuple[Array, float]]:
    """Displacements and gripper values [dx, dy, dz], 1 open or 0 closed, along a list of waypoints."""
    here, state = np.asarray(start_m, dtype=np.float64), open_now
    for point in way:
        goal = np.asarray(point.position_m)
        for step in deltas(here, goal, most_m):
            yield step, float(state)
        here = goal
        if point.open != state:
            state = point.open
            yield np.zeros(3), float(state)


class Expert:
    """Answers the three stages of section 3.1 from the simulator's own knowledge of ``world``."""

    def __init__(self, world: World) -> None:
        self.world = world

    def goals(self, task: str) -> list[Goal]:
        """What an instruction asks for in this scene.

        Raises:
            UnknownTaskError: nothing in the instruction is known.
        """
        parsed = parse_task(task)
        if isinstance(parsed, str):
            truth = observe(self.world)
            item = truth.above_card(parsed) if parsed in truth.cards else None
            if item is None:
                raise UnknownTaskError(f"nothing stands above a {parsed} in this scene")
            return [Goal(item)]
        if parsed is None:
            raise UnknownTaskError("the instruction names nothing that this kitchen knows")
        return parsed

    def subtasks(self, task: str) -> str:
        """The text of the first stage: a list in the manner of D.4's example."""
        return format_subtasks([title(skill) for skill in skills_for(self.goals(task))])

    def motion_plan(self, subtask: str) -> str:
        """The text of the second stage: directions with words of degree, from where the gripper is now."""
        skill = self._skill(subtask)
        here, state = np.array(self.world.ee_pose().position_m), self._open()
        parts, changed = [], False
        for point in waypoints(self.world, skill):
            words = direction_words([float(v) for v in np.asarray(point.position_m) - here])
            if words:
                parts.append(f"move {join_words(words)}")
            if point.open != state:
                parts.append("open the gripper" if point.open else "close the gripper")
                state, changed = point.open, True
            here = np.asarray(point.position_m)
        if not changed:
            parts.append(f"gripper stays {'open' if state else 'closed'}")
            text = ", ".join([", then ".join(parts[:-1]) or "hold still", parts[-1]])
        else:
            text = ", then ".join(parts)
        return text[0].upper() + text[1:] + "."

    def actions(self, subtask: str, motion_plan: str | None = None) -> str:
        """The text of the third stage: rows of at most 5 cm an axis from where the gripper is now."""
        way = waypoints(self.world, self._skill(subtask))
        start = np.array(self.world.ee_pose().position_m)
        rows = [
            [*(round(float(v), 3) + 0.0 for v in delta), grip]
            for delta, grip in rows_for(start, way, self._open(), ROW_LIMIT_M)
        ]
        return format_actions(rows or [[0.0, 0.0, 0.0, float(self._open())]])

    def _open(self) -> bool:
        """What the gripper was last told; a gripper that holds something or stands closed counts as closed."""
        held = any(is_held(self.world, name) for name in self.world.object_names())
        return self.world.gripper_fraction() > 0.8 and not held

    def _skill(self, subtask: str) -> Skill:
        skill = parse_subtask(subtask)
        if skill is None:
            raise UnknownTaskError("the subtask names no known thing or verb")
        return skill
