from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from twin_drive import Drive, scene

from vlm2vla_schema.parsing import parse_actions, parse_motion_plan, parse_subtasks
from vlm2vla_twin.expert import ROW_LIMIT_M, Expert, UnknownTaskError, Waypoint, deltas, rows_for
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import CardSpec, SceneSpec, resting
from vlm2vla_twin.skills import Goal
from vlm2vla_twin.truth import observe, subtask_done

CARROT_ON_PLATE = "put the carrot on the yellow plate"
metres = st.floats(-0.3, 0.3)


def bench(seed: int) -> SceneSpec:
    """Carrot and plate anywhere on the two sides of the bench."""
    rng = np.random.default_rng(seed)
    side = 1.0 if rng.random() < 0.5 else -1.0
    carrot = (float(rng.uniform(0.20, 0.38)), side * float(rng.uniform(0.05, 0.14)))
    plate = (float(rng.uniform(0.27, 0.38)), -side * float(rng.uniform(0.08, 0.14)))
    objects = (resting("carrot", carrot, float(rng.uniform(0.0, 6.28))), resting("plate", plate))
    return SceneSpec(seed=seed, objects=objects)


def carry_out(drive: Drive, rows: list[list[float]]) -> None:
    """Move by every row, and the gripper after the row that changes it."""
    open_ = drive.world.gripper_fraction() > 0.8
    for dx, dy, dz, gripper in rows:
        if (dx, dy, dz) != (0.0, 0.0, 0.0):
            drive.by(dx, dy, dz)
        if bool(gripper) != open_:
            open_ = bool(gripper)
            drive.gripper(open_)


@pytest.mark.parametrize("seed", range(6))
def test_its_words_put_the_carrot_on_the_plate(seed: int) -> None:
    world = World(bench(seed))
    drive, expert = Drive(world), Expert(world)
    subtasks = parse_subtasks(expert.subtasks(CARROT_ON_PLATE))
    assert len(subtasks) == 6
    for subtask, following in zip(subtasks, [*subtasks[1:], None], strict=True):
        before = observe(world)
        drive.target_m = np.array(world.ee_pose().position_m)
        parse_motion_plan(expert.motion_plan(subtask))
        carry_out(drive, parse_actions(expert.actions(subtask)).rows)
        verdict = subtask_done(world, before, subtask, following)
        assert verdict.success, f"{subtask}: {verdict.reasoning}"
    assert world.inside("carrot", "plate") and world.resting_on("carrot", "plate")


def test_a_missed_grasp_is_opened_raised_and_tried_again() -> None:
    world = World(scene(("carrot", 0.30, 0.06)))
    drive, expert = Drive(world), Expert(world)
    drive.to(0.30, 0.0, 0.012)
    drive.gripper(False)
    assert not world.grasped("carrot")
    assert expert.motion_plan("Grasp Carrot").startswith("Move up, then open the gripper, then move left")
    carry_out(drive, parse_actions(expert.actions("Grasp Carrot")).rows)
    assert world.grasped("carrot")


def test_what_it_says_in_words_and_in_rows() -> None:
    world = World(scene(("carrot", 0.36, -0.12)))
    expert = Expert(world)
    assert parse_subtasks(expert.subtasks("pick up the carrot")) == ["Move to Carrot", "Grasp Carrot", "Lift Carrot"]
    assert expert.motion_plan("Move to Carrot") == "Move forward, far right and down, gripper stays open."
    rows = parse_actions(expert.actions("Move to Carrot")).rows
    start = world.ee_pose().position_m
    assert start + np.sum(rows, axis=0)[:3] == pytest.approx([0.36, -0.12, 0.07], abs=3e-3)
    assert all(abs(value) <= ROW_LIMIT_M for row in rows for value in row[:3])
    assert {row[3] for row in rows} == {1.0}
    world.set_arm((0.36, -0.12, 0.07), gripper_m=0.037)
    assert expert.motion_plan("Grasp Carrot") == "Move down, then close the gripper."
    assert parse_actions(expert.actions("Grasp Carrot")).rows[-1] == [0.0, 0.0, 0.0, 0.0]


def test_an_action_is_said_even_where_nothing_is_left_to_do() -> None:
    world = World(scene(("carrot", 0.30, 0.0)))
    position, _ = world.object_pose("carrot")
    world.set_arm((float(position[0]), float(position[1]), 0.07), gripper_m=0.037)
    assert parse_actions(Expert(world).actions("Move to Carrot")).rows == [[0.0, 0.0, 0.0, 1.0]]
    assert Expert(world).motion_plan("Move to Carrot") == "Hold still, gripper stays open."


def test_the_item_above_a_card_is_looked_up_in_the_scene() -> None:
    cards = (CardSpec("rocket", (0.24, 0.08)), CardSpec("cat", (0.24, -0.10)))
    spec = replace(scene(("eggplant", 0.30, 0.08), ("carrot", 0.36, -0.02)), cards=cards)
    expert = Expert(World(spec))
    assert expert.goals("pick up the item above the rocket") == [Goal("eggplant")]
    with pytest.raises(UnknownTaskError, match="nothing stands above a cat"):
        expert.goals("pick up the item above the cat")
    with pytest.raises(UnknownTaskError):
        expert.goals("pick up the item above the star")


def test_what_it_does_not_know_it_refuses() -> None:
    expert = Expert(World(scene(("carrot", 0.30, 0.0))))
    with pytest.raises(UnknownTaskError):
        expert.subtasks("make some tea")
    with pytest.raises(UnknownTaskError, match="no known thing or verb"):
        expert.actions("Retract")
    with pytest.raises(UnknownTaskError, match="has no fish"):
        expert.motion_plan("Move to Fish")
    with pytest.raises(UnknownTaskError, match="has no plate"):
        expert.actions("Move Carrot to Yellow Plate")


@given(st.tuples(metres, metres, metres), st.tuples(metres, metres, metres), st.sampled_from([0.0124, 0.05]))
def test_deltas_reach_the_goal_within_their_limit(
    start_m: tuple[float, float, float], goal_m: tuple[float, float, float], most_m: float
) -> None:
    steps = list(deltas(np.array(start_m), np.array(goal_m), most_m))
    assert all(float(np.max(np.abs(step))) <= most_m for step in steps)
    reached = np.array(start_m) + sum(steps, start=np.zeros(3))
    assert float(np.max(np.abs(reached - goal_m))) <= 5e-4 + 1e-9
    assert len(steps) <= np.ceil(np.max(np.abs(np.subtract(goal_m, start_m))) / most_m)


def test_the_gripper_changes_once_it_is_there() -> None:
    way = [Waypoint((0.08, 0.0, 0.0), True), Waypoint((0.08, 0.0, 0.0), False), Waypoint((0.08, 0.0, 0.04), False)]
    rows = [[*step.round(4).tolist(), grip] for step, grip in rows_for(np.zeros(3), way, True, 0.05)]
    assert rows == [[0.05, 0.0, 0.0, 1.0], [0.03, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.04, 0.0]]
