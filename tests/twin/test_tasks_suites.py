"""Start conditions of every suite: legible from the seed, apart, in view, reachable."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vlm2vla_twin import kinematics
from vlm2vla_twin.physics import HOME_GUESS_RAD, World
from vlm2vla_twin.scene import CARDS, KINDS, START_POSITION_M, SceneSpec
from vlm2vla_twin.tasks import SUITES, Goal, decomposed, kitchen_scene, match_task, mentions
from vlm2vla_twin.tasks.layout import NoRoomError, Piece, anywhere, arrange, gap_m, wanted_gap_m
from vlm2vla_twin.truth import project

SEEDS = range(1_000_000, 1_000_020)
NAMES = list(SUITES)


def pieces(spec: SceneSpec) -> list[Piece]:
    cards = [Piece(f"card:{card.name}", *card.xy_m) for card in spec.cards]
    return [Piece(item.name, *item.position_m[:2], item.yaw_rad) for item in spec.objects] + cards


def check_scene(spec: SceneSpec) -> None:
    things = pieces(spec)
    for index, one in enumerate(things):
        for other in things[index + 1 :]:
            assert gap_m(one, other) >= wanted_gap_m(one, other), f"{one} and {other} are too near"
    world = World(spec, settle_s=0.0)
    for thing in things:
        u, v = project(world, (thing.x_m, thing.y_m, 0.01))
        assert 0.02 < u < 0.98 and 0.02 < v < 0.98, f"{thing} leaves the picture of seed {spec.seed}"
        for height_m in (0.010, 0.08, 0.15) if thing.kind != "card" else ():
            point = np.array([thing.x_m, thing.y_m, height_m])
            joints = kinematics.inverse(point, kinematics.DOWN, HOME_GUESS_RAD)
            assert joints is not None, f"{thing} is out of reach at {height_m} m"
    before = {name: world.object_pose(name)[0] for name in world.object_names()}
    world.step(1.0)
    for name, position in before.items():
        assert float(np.linalg.norm(world.object_pose(name)[0] - position)) < 0.001, f"{name} was not at rest"


@pytest.mark.parametrize("name", NAMES)
def test_every_test_seed_builds_apart_in_view_and_in_reach(name: str) -> None:
    for seed in SEEDS:
        spec = SUITES[name].scene(seed)
        check_scene(spec)
        goal = SUITES[name].goal(spec)
        wanted = {part for part in (goal.lift, goal.place, goal.target) if part is not None}
        assert wanted and wanted <= {item.name for item in spec.objects}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["varied", "paper"])
def test_hundreds_of_seeds_build(name: str, mode: str) -> None:
    for seed in range(500_000, 500_200):
        spec = SUITES[name].scene(seed, mode)
        assert spec == SUITES[name].scene(seed, mode), "a scene is a function of its seed"
        things = pieces(spec)
        assert all(
            gap_m(one, other) >= wanted_gap_m(one, other) for i, one in enumerate(things) for other in things[i + 1 :]
        )


@pytest.mark.parametrize("name", NAMES)
def test_scenes_vary_and_stay_within_the_ranges(name: str) -> None:
    specs = [SUITES[name].scene(seed) for seed in SEEDS]
    assert len({spec.objects[0].position_m for spec in specs}) == len(specs)
    for spec in specs:
        assert 0.7 <= spec.light <= 1.3
        assert max(map(abs, spec.camera_offset_m)) <= 0.005
        assert max(map(abs, spec.camera_rotation_rad)) <= np.deg2rad(1.0)
        assert max(abs(a - b) for a, b in zip(spec.start_position_m, START_POSITION_M, strict=True)) <= 0.01
        for item in spec.objects:
            if item.name == "carrot":
                assert 0.20 <= item.position_m[0] <= 0.38
                assert -0.15 <= item.position_m[1] <= 0.15


@pytest.mark.parametrize(("name", "conditions"), [("pick_carrot", 3), ("pick_carrot_hi", 3), ("carrot_on_plate", 2)])
def test_the_carrot_is_under_in_front_of_or_beside_the_gripper_in_equal_parts(name: str, conditions: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(1_000_000, 1_000_030):
        spec = SUITES[name].scene(seed)
        dx, dy = (a - b for a, b in zip(spec.object("carrot").position_m[:2], spec.start_position_m[:2], strict=True))
        if abs(dx) <= 0.01 and abs(dy) <= 0.01:
            seen["under"] += 1
        elif dx >= 0.02 and abs(dy) <= 0.02:
            seen["front"] += 1
        else:
            assert dx >= 0.02 and abs(dy) >= 0.04
            seen["side"] += 1
    assert sorted(seen.values()) == [30 // conditions] * conditions
    assert ("under" in seen) == (conditions == 3)


@pytest.mark.parametrize("name", NAMES)
def test_paper_mode_keeps_what_the_paper_kept(name: str) -> None:
    specs = [SUITES[name].scene(seed, "paper") for seed in SEEDS]
    assert {spec.start_position_m for spec in specs} == {START_POSITION_M}
    if name == "eggplant_pan_fish":
        poses = {tuple((item.name, item.position_m, item.yaw_rad) for item in spec.objects) for spec in specs}
        assert len(poses) == 1
        check_scene(specs[0])
    with pytest.raises(ValueError, match="mode"):
        SUITES[name].scene(0, "other")


def test_the_long_task_stands_as_in_the_paper() -> None:
    for spec in [SUITES["eggplant_pan_fish"].scene(seed) for seed in SEEDS]:
        fish, eggplant = spec.object("fish").position_m, spec.object("eggplant").position_m
        assert fish[0] > spec.start_position_m[0] and fish[1] < spec.start_position_m[1], "in front and to the right"
        assert eggplant[1] < fish[1] - 0.05, "the eggplant is to the right of the fish"


def test_the_three_languages_share_their_scenes_and_have_distractors() -> None:
    for seed in SEEDS:
        spec = SUITES["pick_carrot_es"].scene(seed)
        assert spec == SUITES["pick_carrot_zh"].scene(seed) == SUITES["pick_carrot_hi"].scene(seed)
        assert {item.name for item in spec.objects} == {"carrot", "banana", "eggplant"}


def test_the_picture_task_balances_card_side_and_item() -> None:
    suite, seen = SUITES["pick_above_picture"], Counter[tuple[str, str, str]]()
    for seed in SEEDS:
        spec = suite.scene(seed)
        card, side, item = spec.extra["card"], spec.extra["side"], spec.extra["item"]
        seen[(card, side, item)] += 1
        assert suite.instruction(seed) == f"pick up the item above the {card}"
        assert suite.goal(spec) == Goal(lift=item)
        assert suite.keywords(spec) == (item,)
        (x, y), other = (
            next(c.xy_m for c in spec.cards if c.name == card),
            next(c.xy_m for c in spec.cards if c.name != card),
        )
        assert (y > 0) == (side == "left") and (other[1] > 0) != (y > 0)
        above = spec.object(item).position_m
        assert 0.05 < above[0] - x < 0.10 and abs(above[1] - y) <= 0.011
        assert {thing.name for thing in spec.objects} == {"carrot", "eggplant"}
    assert set(seen.values()) == {1}


def test_instructions_are_the_ones_written_down() -> None:
    assert [suite.instruction(1_000_000) for suite in SUITES.values()] == [
        "pick up the carrot",
        "put the carrot on the yellow plate",
        "put the eggplant in the pan, then lift the fish",
        "recoge la zanahoria",
        "拿起胡萝卜",
        "गाजर उठाओ",
        "pick up the item above the rocket",
    ]
    assert [suite.max_score for suite in SUITES.values()] == [2, 2, 5, 2, 2, 2, 2]
    scenarios = [suite.scenario for suite in SUITES.values()]
    assert scenarios == ["in_distribution"] * 2 + ["out_of_distribution"] * 5


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_recognised_by_its_instruction(name: str) -> None:
    for seed in SEEDS:
        text = SUITES[name].instruction(seed)
        found = match_task("  " + text.upper().replace(" ", "   ") + " ")
        assert found is not None and found.name == name
        assert found.instruction(seed) == text


def test_a_card_named_in_the_task_is_in_the_scene_of_any_seed() -> None:
    for card in CARDS:
        suite = match_task(f"pick up the item above the {card}")
        assert suite is not None
        for seed in (0, 1, 2, 3, 4):
            spec = suite.scene(seed)
            assert card in {item.name for item in spec.cards}
            assert suite.goal(spec).lift is not None
            assert suite.instruction(seed) == f"pick up the item above the {card}"


@pytest.mark.parametrize(
    "text", ["", "pick up the carrots", "pick up the item above the dog", "pick up carrot", "carrot"]
)
def test_other_tasks_match_no_suite(text: str) -> None:
    assert match_task(text) is None


@pytest.mark.parametrize("seed", [0, 1, 500_000, 1_000_000])
def test_the_kitchen_holds_everything(seed: int) -> None:
    spec = kitchen_scene(seed)
    assert {item.name for item in spec.objects} == set(KINDS)
    assert len(spec.cards) == 2
    check_scene(spec)
    for card in spec.cards:
        suite = match_task(f"pick up the item above the {card.name}")
        assert suite is not None and suite.goal(spec).lift is not None


def test_no_room_is_said() -> None:
    with pytest.raises(NoRoomError):
        arrange(np.random.default_rng(0), [anywhere("pan", (0.30, 0.31), (0.0, 0.01))] * 2)


@pytest.mark.parametrize(
    ("concept", "text", "expected"),
    [
        ("carrot", "['Move to Carrot', 'Grasp']", True),
        ("carrot", "move to the ORANGE thing", True),
        ("carrot", "Grasp Gajar", True),
        ("carrot", "pick the carrots up", True),
        ("carrot", "move to the eggplant", False),
        ("carrot", "recoge la zanahoria", False),
        ("eggplant", "the purple item", True),
        ("eggplant", "Aubergine", True),
        ("pan", "Lower into Pan", True),
        ("pan", "expand the gripper and plan", False),
        ("fish", "selfish", False),
        ("fish", "Lift Fish!", True),
    ],
)
def test_keywords(concept: str, text: str, expected: bool) -> None:
    assert mentions(concept, text) is expected


def test_a_decomposition_needs_every_keyword_at_once() -> None:
    wanted = ("eggplant", "pan", "fish")
    assert decomposed(wanted, "grasp the eggplant, move to the pan, lift the fish")
    assert not decomposed(wanted, "grasp the eggplant, lift the fish")
    assert not decomposed(wanted, None)
