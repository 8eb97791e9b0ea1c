from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from twin_drive import Drive, scene

from vlm2vla_twin.camera import Camera
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import FINGER_CLOSED_M, FINGER_OPEN_M, CardSpec, SceneSpec, vary
from vlm2vla_twin.truth import Truth, observe, project, subtask_done

ASIDE_M = (0.18, 0.19, 0.20)
"""Where the arm hides nothing of what stands to its right."""


def truth_of(objects: dict[str, tuple[float, float, float]], cards: dict[str, tuple[float, float, float]]) -> Truth:
    return Truth((0.3, 0.0, 0.15), 1.0, None, objects, cards, {})


@pytest.mark.parametrize("seed", range(4))
def test_the_projection_points_at_what_the_camera_sees(seed: int) -> None:
    spots = np.random.default_rng(seed).uniform((-0.02, -0.02), (0.02, 0.02), (3, 2))
    plain = scene(
        ("carrot", 0.24 + spots[0, 0], -0.05 + spots[0, 1]),
        ("fish", 0.34 + spots[1, 0], -0.12 + spots[1, 1]),
        ("plate", 0.36 + spots[2, 0], 0.06 + spots[2, 1]),
        seed=seed,
    )
    spec = replace(plain, cards=(CardSpec("cat", (0.22, -0.14)),), start_position_m=ASIDE_M)
    world = World(vary(spec, np.random.default_rng(seed)))
    camera = Camera(world)
    height, width = camera.segmentation().shape
    ids = camera.segmentation()
    truth = observe(world)
    assert set(truth.pixels) == {"gripper", "carrot", "fish", "plate", "card cat"}
    for name in ("carrot", "fish", "plate", "card cat"):
        u, v = truth.pixels[name]
        shown = int(ids[int(v * height), int(u * width)])
        assert world.model.geom(shown).name.startswith(name.replace(" ", "_")), f"{name} at {u:.3f}, {v:.3f}"


def test_left_and_far_are_left_and_up_in_the_picture() -> None:
    world = World(SceneSpec(seed=0), settle_s=0.0)
    u, v = project(world, (0.30, 0.0, 0.0))
    assert project(world, (0.30, 0.05, 0.0))[0] < u
    assert project(world, (0.40, 0.0, 0.0))[1] < v
    assert project(world, (0.30, 0.0, 0.05))[1] < v


def test_observing_changes_nothing_and_goes_through_json() -> None:
    world = World(replace(scene(("carrot", 0.30, 0.05)), cards=(CardSpec("tree", (0.25, 0.1)),)))
    before = world.state()
    truth = observe(world)
    assert np.array_equal(world.state(), before)
    assert Truth.from_dict(json.loads(json.dumps(truth.as_dict()))) == truth
    assert truth.objects["carrot"][:2] == pytest.approx((0.30, 0.05), abs=1e-3)
    assert truth.cards == {"tree": (0.25, 0.1, 0.0)}
    assert truth.held is None and truth.gripper_fraction > 0.95


def test_offsets_lead_from_the_gripper_to_the_thing() -> None:
    truth = truth_of({"carrot": (0.25, 0.10, 0.01)}, {"cat": (0.4, -0.1, 0.0)})
    assert truth.offset("carrot") == pytest.approx((-0.05, 0.10, -0.14))
    assert truth.offset("cat", "carrot") == pytest.approx((0.15, -0.20, -0.01))
    with pytest.raises(KeyError):
        truth.position("fish")


@pytest.mark.parametrize(
    ("objects", "above"),
    [
        ({"carrot": (0.30, 0.00, 0.01)}, "carrot"),
        ({"carrot": (0.18, 0.00, 0.01)}, None),
        ({"carrot": (0.30, 0.06, 0.01)}, None),
        ({"carrot": (0.36, 0.00, 0.01)}, None),
        ({"plate": (0.30, 0.00, 0.00)}, None),
        ({"carrot": (0.33, 0.03, 0.01), "fish": (0.295, 0.01, 0.01)}, "fish"),
        ({}, None),
    ],
)
def test_above_a_card_is_a_little_further_along_x(
    objects: dict[str, tuple[float, float, float]], above: str | None
) -> None:
    assert truth_of(objects, {"star": (0.24, 0.0, 0.0)}).above_card("star") == above


@pytest.mark.parametrize(
    ("offset_m", "gripper_m", "done"),
    [
        ((0.0, 0.0, 0.07), FINGER_OPEN_M, True),
        ((0.007, -0.007, 0.07), FINGER_OPEN_M, True),
        ((0.02, 0.0, 0.07), FINGER_OPEN_M, False),
        ((0.0, -0.013, 0.07), FINGER_OPEN_M, False),
        ((0.0, 0.0, 0.14), FINGER_OPEN_M, False),
        ((0.0, 0.0, 0.07), FINGER_CLOSED_M, False),
    ],
)
def test_a_move_is_done_open_and_close_above(
    offset_m: tuple[float, float, float], gripper_m: float, done: bool
) -> None:
    world = World(scene(("carrot", 0.30, 0.05)))
    before = observe(world)
    assert not subtask_done(world, before, "Move to Carrot", "Grasp Carrot").success
    world.set_arm(np.array([0.30, 0.05, 0.0]) + offset_m, gripper_m=gripper_m)
    verdict = subtask_done(world, before, "Move to Carrot", "Grasp Carrot")
    assert verdict.success is done and verdict.confidence == "High" and verdict.reasoning


@pytest.mark.parametrize("subtask", ["Move to Fish", "Retract", "", "Move Carrot to Pan"])
def test_what_is_not_in_the_scene_is_never_done(subtask: str) -> None:
    world = World(scene(("carrot", 0.30, 0.05)))
    assert not subtask_done(world, observe(world), subtask, None).success


def done(world: World, *subtasks: str) -> list[bool]:
    return [subtask_done(world, observe(world), subtask, None).success for subtask in subtasks]


def test_every_subtask_of_a_placement_becomes_true_in_its_turn() -> None:
    world = World(scene(("carrot", 0.30, 0.0), ("plate", 0.30, 0.14)))
    drive = Drive(world)
    names = ("Grasp Carrot", "Lift Carrot", "Move Carrot to Yellow Plate", "Release Carrot")
    assert done(world, *names) == [False, False, False, True]
    drive.grasp("carrot")
    assert observe(world).held is None, "pressed, but not lifted"
    assert done(world, *names) == [True, False, False, False]
    drive.by(0.0, 0.0, 0.10)
    assert observe(world).held == "carrot"
    assert done(world, *names, "Lower Carrot to Yellow Plate") == [True, True, False, False, False]
    drive.to(0.30, 0.14, float(drive.target_m[2]))
    assert done(world, *names) == [True, True, True, False]
    drive.to(0.30, 0.14, 0.018)
    assert done(world, "Lower Carrot to Yellow Plate", "Release Carrot") == [True, False]
    drive.gripper(True)
    drive.by(0.0, 0.0, 0.05)
    assert done(world, "Release Carrot", "Grasp Carrot") == [True, False]
    assert observe(world).held is None
