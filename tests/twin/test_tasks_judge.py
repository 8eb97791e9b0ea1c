"""The judge sees what happened, in order, and neither less nor more."""

from __future__ import annotations

import time

import pytest
from twin_drive import Drive, scene

from vlm2vla_twin.physics import World
from vlm2vla_twin.tasks import SUITES, Judge, Suite, score_of, task_done

PICK, PLATE, LONG = SUITES["pick_carrot"], SUITES["carrot_on_plate"], SUITES["eggplant_pan_fish"]
LANGUAGE, PICTURE = SUITES["pick_carrot_hi"], SUITES["pick_above_picture"]
LONG_XY = (("eggplant", 0.35, -0.13), ("fish", 0.36, -0.05), ("pan", 0.285, 0.12))
PLAN = "grasp the eggplant, move to the pan, lift the fish"


def trial(suite: Suite, *names_xy: tuple[str, float, float]) -> tuple[Judge, Drive]:
    world = World(scene(*names_xy))
    judge = Judge(world, suite)
    return judge, Drive(world, judge.observe)


def test_nothing_done_scores_nothing() -> None:
    for suite in SUITES.values():
        world = World(suite.scene(0))
        judge = Judge(world, suite)
        Drive(world, judge.observe).wait(1.5)
        for planning in (True, False):
            score = judge.score(None, planning)
            assert (score.score, score.success, score.max_score) == (0, False, suite.max_score)
            assert not any(score.flags.values())


def test_contact_is_one_point_and_a_held_lift_two() -> None:
    judge, drive = trial(PICK, ("carrot", 0.30, 0.0))
    drive.grasp("carrot")
    assert judge.score(None, False).score == 1
    drive.by(0.0, 0.0, 0.06)
    drive.wait(1.2)
    score = judge.score(None, False)
    assert score.score == 2 and score.success and score.flags == {"contact": True, "lifted": True}


def test_a_lift_must_be_high_enough() -> None:
    judge, drive = trial(PICK, ("carrot", 0.30, 0.0))
    drive.grasp("carrot")
    drive.by(0.0, 0.0, 0.03)
    drive.wait(2.0)
    assert judge.score(None, False).score == 1


def test_a_lift_must_be_held_for_a_second() -> None:
    judge, drive = trial(PICK, ("carrot", 0.30, 0.0))
    drive.grasp("carrot")
    drive.by(0.0, 0.0, 0.06)
    drive.gripper(True)
    drive.wait(2.0)
    assert judge.score(None, False).score == 1
    drive.grasp("carrot")
    drive.by(0.0, 0.0, 0.06)
    drive.wait(1.0)
    assert judge.score(None, False).success, "a second try counts"


def test_the_wrong_object_earns_nothing() -> None:
    judge, drive = trial(PICK, ("carrot", 0.30, 0.08), ("eggplant", 0.30, -0.08))
    drive.grasp("eggplant")
    drive.by(0.0, 0.0, 0.06)
    drive.wait(1.2)
    assert judge.score("carrot", True).score == 0


def test_placing_needs_release_and_rest_on_the_plate() -> None:
    judge, drive = trial(PLATE, ("carrot", 0.33, -0.08), ("plate", 0.30, 0.08))
    drive.grasp("carrot")
    drive.by(0.0, 0.0, 0.10)
    drive.to(0.30, 0.08, 0.10)
    drive.to(0.30, 0.08, 0.022)
    drive.wait(2.0)
    assert judge.score(None, False).score == 1, "still held"
    drive.gripper(True)
    drive.by(0.0, 0.0, 0.08)
    drive.wait(1.2)
    score = judge.score(None, False)
    assert score.success and score.score == 2
    assert list(score.flags) == ["contact_carrot", "grasped_carrot", "placed_carrot"]


def test_putting_it_beside_the_plate_is_not_placing() -> None:
    judge, drive = trial(PLATE, ("carrot", 0.33, -0.08), ("plate", 0.30, 0.10))
    drive.put("carrot", (0.30, 0.0), 0.012)
    drive.wait(1.5)
    assert judge.score(None, False).score == 1


def test_the_long_task_climbs_both_ladders() -> None:
    judge, drive = trial(LONG, *LONG_XY)

    def scores() -> tuple[int, int, int]:
        return judge.score(None, False).score, judge.score(PLAN, True).score, judge.score("no idea", True).score

    assert scores() == (0, 1, 0)
    drive.grasp("eggplant")
    assert scores() == (1, 2, 2)
    drive.by(0.0, 0.0, 0.10)
    drive.to(0.285, 0.12, 0.11)
    drive.to(0.285, 0.12, 0.026)
    drive.gripper(True)
    drive.by(0.0, 0.0, 0.08)
    drive.wait(1.2)
    assert scores() == (2, 3, 3)
    drive.to(0.33, 0.03, 0.10)
    assert scores() == (3, 3, 3)
    drive.grasp("fish")
    assert scores() == (4, 4, 4)
    drive.by(0.0, 0.0, 0.06)
    drive.wait(1.2)
    assert scores() == (5, 5, 5)
    assert judge.score(None, False).success


def test_the_fish_counts_only_after_the_eggplant_lies_in_the_pan() -> None:
    judge, drive = trial(LONG, *LONG_XY)
    drive.grasp("fish")
    drive.by(0.0, 0.0, 0.06)
    drive.wait(1.2)
    score = judge.score(PLAN, True)
    assert (score.planning_score, score.non_planning_score, score.success) == (1, 0, False)


@pytest.mark.parametrize("suite", [LANGUAGE, SUITES["pick_carrot_es"], SUITES["pick_carrot_zh"]])
def test_contact_alone_needs_the_right_plan_of_a_planner(suite: Suite) -> None:
    judge, drive = trial(suite, ("carrot", 0.30, 0.0), ("banana", 0.30, 0.12), ("eggplant", 0.30, -0.12))
    drive.grasp("carrot")
    assert judge.score("move to the banana", True).score == 0
    assert judge.score("move to the Gajar", True).score == 1
    assert judge.score(None, True).score == 0
    assert judge.score("move to the banana", False).score == 1
    assert judge.score("move to the banana", True, plan_override=True).score == 1
    assert judge.score("carrot", True, plan_override=False).score == 0
    drive.by(0.0, 0.0, 0.06)
    drive.wait(1.2)
    assert judge.score("move to the banana", True).score == 2, "a lift is full score, whatever was planned"


def test_the_plan_is_not_asked_for_in_distribution() -> None:
    judge, drive = trial(PICK, ("carrot", 0.30, 0.0))
    drive.grasp("carrot")
    score = judge.score("no idea", True)
    assert score.score == 1 and score.plan_credit is None


def test_repeating_the_instruction_is_no_plan() -> None:
    judge, _ = trial(LONG, *LONG_XY)
    instruction = LONG.instruction(0)
    assert judge.score(instruction, True).score == 0
    assert judge.score(f"{instruction}\nmove somewhere", True).score == 0
    assert judge.score(f"{instruction}\nMove to Eggplant\nMove to Pan\nLift Fish", True).score == 1


def test_the_item_above_the_card_is_the_one_that_counts() -> None:
    spec = PICTURE.scene(1_000_000)
    item = spec.extra["item"]
    other = next(thing.name for thing in spec.objects if thing.name != item)
    world = World(spec)
    judge = Judge(world, PICTURE)
    drive = Drive(world, judge.observe)
    drive.grasp(other)
    assert judge.score(f"move to the {item}", True).score == 0
    drive.gripper(True)
    drive.by(0.0, 0.0, 0.10)
    drive.grasp(item)
    assert judge.score(f"move to the {item}", True).score == 1
    assert judge.score(f"move to the {other}", True).score == 0


def test_a_scene_without_the_object_can_only_fail() -> None:
    world = World(scene(("eggplant", 0.30, 0.0)))
    for suite in SUITES.values():
        judge = Judge(world, suite)
        judge.observe()
        score = judge.score("carrot", False)
        assert score.score == 0 and not score.success


def test_recorded_stages_can_be_scored_again() -> None:
    flags = {"contact": True, "lifted": False}
    assert score_of(LANGUAGE, flags, False, True).score == 0
    assert score_of(LANGUAGE, flags, True, True).score == 1
    assert score_of(LANGUAGE, flags, None, False).score == 1


def test_observing_is_cheap() -> None:
    world = World(LONG.scene(0))
    judge = Judge(world, LONG)
    drive = Drive(world, judge.observe)
    drive.grasp("eggplant")
    began_s = time.process_time()
    for _ in range(1000):
        judge.observe()
    assert time.process_time() - began_s < 1.0, "a trial has thousands of observations"


def test_a_whole_task_is_done_when_its_goal_holds_and_not_before() -> None:
    goal = PLATE.goal(PLATE.scene(0))
    _, drive = trial(PLATE, ("carrot", 0.30, 0.0), ("plate", 0.30, 0.12))
    assert not task_done(drive.world, goal).success, "the carrot is low, but not on the plate"
    drive.grasp("carrot")
    drive.by(0.0, 0.0, 0.06)
    assert task_done(drive.world, PICK.goal(PICK.scene(0))).success and not task_done(drive.world, goal).success
    drive.by(0.0, 0.12, 0.0)
    drive.by(0.0, 0.0, -0.05)
    assert not task_done(drive.world, goal).success, "not released"
    drive.gripper(True)
    drive.wait(1.0)
    drive.by(0.0, 0.0, 0.06)
    drive.wait(1.0)
    assert task_done(drive.world, goal).success
    assert not task_done(World(scene(("carrot", 0.30, 0.0))), goal).success, "no plate in the scene"
