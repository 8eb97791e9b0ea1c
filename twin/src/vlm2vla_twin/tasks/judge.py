"""Scoring from physics, never from the model's words: the two rubrics of appendix D.1.

Stages are latched: contact; a lift of 5 cm held for one second; at rest on or in the target, released, for one second;
the gripper moved toward the fish. The planning rubric adds the keywords of D.3 where D.1 asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vlm2vla_schema.types import Verdict
from vlm2vla_twin.physics import World
from vlm2vla_twin.tasks.plans import decomposed
from vlm2vla_twin.tasks.suites import Goal, Suite
from vlm2vla_twin.truth import observe, subtask_done

LIFT_M = 0.05
HOLD_S = 1.0
REST_SPEED_M_S = 0.02
TOWARD_M = 0.05
"""How much nearer (horizontally) the gripper must have come to count as having moved toward something."""

_EPSILON_S = 1e-6


@dataclass(frozen=True)
class Score:
    """What a trial earned.

    Attributes:
        score: by the rubric asked for; ``planning_score`` and ``non_planning_score`` are both rubrics' results.
        success: full score by physics, whatever plan or verifier said.
        plan_credit: whether the plan named the right things (D.3); None where D.1 does not ask.
        flags: the stages reached, in order.
    """

    score: int
    max_score: int
    success: bool
    planning_score: int
    non_planning_score: int
    plan_credit: bool | None
    flags: dict[str, bool] = field(default_factory=dict)


@dataclass
class _Lasting:
    """Latches once a condition has held for a second without a break."""

    since_s: float | None = None
    reached: bool = False

    def see(self, holds: bool, now_s: float) -> None:
        if not holds:
            self.since_s = None
            return
        if self.since_s is None:
            self.since_s = now_s
        self.reached = self.reached or now_s - self.since_s >= HOLD_S - _EPSILON_S


class _Watched:
    """One object of the goal: touched, lifted, placed."""

    def __init__(self, world: World, name: str, target: str | None) -> None:
        self._world, self.name, self._target = world, name, target
        self._start_z_m = float(world.object_pose(name)[0][2])
        self.contact = self.raised = False
        self.lift, self.rest = _Lasting(), _Lasting()

    def see(self, now_s: float) -> None:
        world, name = self._world, self.name
        touched = world.touching(name)
        self.contact = self.contact or touched
        if not self.contact:
            return  # nothing below can begin before the gripper has touched it
        up_m = float(world.object_pose(name)[0][2]) - self._start_z_m
        self.raised = self.raised or (touched and up_m >= 0.01)
        self.lift.see(touched and up_m >= LIFT_M, now_s)
        if self._target is not None:
            self.rest.see(not touched and self.raised and _rests(world, name, self._target), now_s)


def _rests(world: World, name: str, target: str) -> bool:
    slow = world.object_speed_m_s(name) <= REST_SPEED_M_S
    return slow and world.inside(name, target) and world.resting_on(name, target)


def task_done(world: World, goal: Goal) -> Verdict:
    """The simulator's verdict on a whole task at this moment: for a policy without reasoning, whose one subtask is its
    instruction. Looks once and latches nothing: what is to be placed lies there, released; what is to be lifted is held
    as high as after "Lift".
    """
    named = [name for name in (goal.place, goal.target, goal.lift) if name is not None]
    if not set(named) <= set(world.object_names()):
        return Verdict(False, "High", "The task names something that is not in this scene.")
    place, target = goal.place, goal.target
    if place is not None and target is not None and (world.touching(place) or not _rests(world, place, target)):
        return Verdict(False, "High", f"The {place} does not lie released in its place.")
    if goal.lift is not None:
        return subtask_done(world, observe(world), f"Lift {goal.lift}", None)
    return Verdict(True, "High", "The task is done.")


class Judge:
    """Watches one trial.

    Args:
        world: the world of the trial, at its start.
        suite: what was asked. In a scene without the objects it needs, no stage is ever reached.
    """

    def __init__(self, world: World, suite: Suite) -> None:
        self._world, self._suite = world, suite
        self._goal = goal = suite.goal(world.spec)
        self._concepts = suite.keywords(world.spec)
        present = set(world.object_names())
        self._placing = (
            _Watched(world, goal.place, goal.target)
            if goal.place in present and goal.target in present and goal.place is not None
            else None
        )
        self._lifting = _Watched(world, goal.lift, None) if goal.lift is not None and goal.lift in present else None
        self._both = goal.place is not None and goal.lift is not None
        self._distance_at_rest_m: float | None = None
        self._toward = False

    def observe(self) -> None:
        """Looks once; call it after each advance of the physics (every 20 ms is plenty). Cheap, changes nothing."""
        now_s = self._world.time_s
        if self._placing is not None and not self._placing.rest.reached:
            self._placing.see(now_s)
            self._note_distance(self._placing)
        if self._lifting is None:
            return
        if not self._both:
            self._lifting.see(now_s)
        elif self._placing is not None and self._placing.rest.since_s is not None:
            # "then": what happens to the second object counts from the moment the first one lies in its target.
            self._approach(self._lifting.name)
            if self._placing.rest.reached:
                self._lifting.see(now_s)

    def _note_distance(self, placing: _Watched) -> None:
        if self._lifting is None:
            return
        if placing.rest.since_s is None:
            self._distance_at_rest_m, self._toward = None, False
        elif self._distance_at_rest_m is None:
            self._distance_at_rest_m = self._distance_m(self._lifting.name)

    def _approach(self, name: str) -> None:
        if not self._toward and self._distance_at_rest_m is not None:
            self._toward = self._distance_m(name) <= self._distance_at_rest_m - TOWARD_M

    def _distance_m(self, name: str) -> float:
        gripper, thing = self._world.ee_pose().position_m, self._world.object_pose(name)[0]
        return float(np.hypot(gripper[0] - thing[0], gripper[1] - thing[1]))

    def flags(self) -> dict[str, bool]:
        """The stages of this task in order, each True once it was reached."""
        stages: dict[str, bool] = {}
        placing, lifting = self._placing, self._lifting
        wants_place = self._goal.place
        if wants_place is not None:
            stages[f"contact_{wants_place}"] = placing is not None and placing.contact
            stages[f"grasped_{wants_place}"] = placing is not None and placing.raised
            stages[f"placed_{wants_place}"] = placing is not None and placing.rest.reached
        if self._both:
            placed = stages[f"placed_{wants_place}"]
            contact = lifting is not None and lifting.contact
            then = self._goal.lift
            stages[f"toward_{then}"] = placed and (self._toward or contact)
            stages[f"contact_{then}"] = contact
            stages[f"lifted_{then}"] = lifting is not None and lifting.lift.reached
        elif wants_place is None:
            stages["contact"] = lifting is not None and lifting.contact
            stages["lifted"] = lifting is not None and lifting.lift.reached
        return stages

    def score(self, plan_text: str | None, planning: bool, plan_override: bool | None = None) -> Score:
        """What the trial has earned so far.

        Args:
            plan_text: everything the policy wrote, one subtask or motion plan a line; None for policies that wrote
                nothing. A line that only repeats the instruction decomposes nothing and does not count.
            planning: which of the two rubrics of D.1 gives ``score``.
            plan_override: a person's verdict on the plan, which replaces the keywords (D.3, "manually checked").
        """
        credit = decomposed(self._concepts, self._own_words(plan_text)) if plan_override is None else plan_override
        return score_of(self._suite, self.flags(), credit if self._suite.plan_counts else None, planning)

    def _own_words(self, plan_text: str | None) -> str | None:
        if plan_text is None:
            return None
        told = self._suite.instruction(self._world.spec.seed).casefold().strip()
        return "\n".join(line for line in plan_text.splitlines() if line.casefold().strip() != told)


def score_of(suite: Suite, flags: Mapping[str, bool], plan_credit: bool | None, planning: bool) -> Score:
    """The rubrics of D.1 on stages already observed, so that a recorded trial can be scored again.

    The long task is a ladder: a rung counts once the physical rungs below it are reached.
    """
    if suite.max_score == 5:
        without = _ladder([flags["contact_eggplant"], flags["placed_eggplant"], flags["toward_fish"],
                           flags["contact_fish"], flags["lifted_fish"]])  # fmt: skip
        physical = _ladder([flags["contact_eggplant"], flags["placed_eggplant"], flags["contact_fish"],
                            flags["lifted_fish"]])  # fmt: skip
        with_plan = physical + 1 if physical else int(bool(plan_credit))
        success = physical == 4
    else:
        names = list(flags)
        success, contact = flags[names[-1]], flags[names[0]]
        without = 2 if success else int(contact)
        with_plan = 2 if success else int(contact and plan_credit is not False)
    score = with_plan if planning else without
    return Score(score, suite.max_score, success, with_plan, without, plan_credit, dict(flags))


def _ladder(rungs: list[bool]) -> int:
    height = 0
    for reached in rungs:
        if not reached:
            break
        height += 1
    return height
