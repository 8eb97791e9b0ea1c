"""What the simulator knows about one moment, as plain data: for training data and for scoring, never for a policy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlm2vla_schema.types import Verdict
from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import CARDS, COUNTER_Z_M, KINDS
from vlm2vla_twin.skills import Skill, parse_subtask, title

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Truth:
    """One moment of a scene.

    Positions are metres in the base frame; ``pixels`` are (u, v) as fractions of the picture's width and height,
    which the squash to the model's square leaves unchanged.
    """

    gripper_m: Point
    gripper_fraction: float
    held: str | None
    objects: dict[str, Point]
    cards: dict[str, Point]
    pixels: dict[str, tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Truth:
        """The inverse of :meth:`as_dict`."""
        return cls(
            tuple(data["gripper_m"]),
            float(data["gripper_fraction"]),
            data["held"],
            {name: tuple(value) for name, value in data["objects"].items()},
            {name: tuple(value) for name, value in data["cards"].items()},
            {name: tuple(value) for name, value in data["pixels"].items()},
        )

    def position(self, name: str) -> Point:
        """Where an object, a card or the gripper is; ``KeyError`` if the scene has no such thing."""
        if name == "gripper":
            return self.gripper_m
        return self.objects[name] if name in self.objects else self.cards[name]

    def offset(self, name: str, origin: str = "gripper") -> Point:
        """Displacement [dx, dy, dz] in metres from ``origin`` to ``name``."""
        a, b = self.position(origin), self.position(name)
        return (b[0] - a[0], b[1] - a[1], b[2] - a[2])

    def above_card(self, card: str, reach_m: float = 0.10) -> str | None:
        """The object standing a few centimetres further along +x than the card, if one does."""
        x, y, _ = self.cards[card]
        near = [
            (abs(position[1] - y) + abs(position[0] - x - 0.06), name)
            for name, position in self.objects.items()
            if KINDS[name].graspable and 0.02 < position[0] - x < reach_m and abs(position[1] - y) < 0.045
        ]
        return min(near)[1] if near else None


def observe(world: World) -> Truth:
    """The truth of this moment; reads the simulator, changes nothing."""
    held = next((name for name in world.object_names() if KINDS[name].graspable and is_held(world, name)), None)
    gripper = world.ee_pose().position_m
    things: dict[str, Point] = {name: _point(world.object_pose(name)[0]) for name in world.object_names()}
    shown = {card.name for card in world.spec.cards}
    cards: dict[str, Point] = {name: _point((*world.card_xy(name), COUNTER_Z_M)) for name in CARDS if name in shown}
    everything = {"gripper": _point(gripper), **things, **{f"card {name}": xyz for name, xyz in cards.items()}}
    return Truth(
        gripper_m=_point(gripper),
        gripper_fraction=world.gripper_fraction(),
        held=held,
        objects=things,
        cards=cards,
        pixels={name: project(world, position) for name, position in everything.items()},
    )


def is_held(world: World, name: str, clear_m: float = 0.004) -> bool:
    """Whether both pads press on the object and it hangs clear of where it would rest."""
    return world.grasped(name) and bool(world.object_pose(name)[0][2] > COUNTER_Z_M + KINDS[name].rest_z_m + clear_m)


def project(world: World, position_m: Point) -> tuple[float, float]:
    """Where a point of the base frame falls in the picture, as fractions of its width and height."""
    matrix = np.array(world.data.cam_xmat[0]).reshape(3, 3)
    x, y, z = matrix.T @ (np.asarray(position_m) - np.array(world.data.cam_xpos[0]))
    half = np.tan(np.deg2rad(float(world.model.cam_fovy[0])) / 2)
    return (float(0.5 + x / -z / half * (480 / 640) / 2), float(0.5 - y / -z / half / 2))


def _point(values: Any) -> Point:
    return (float(values[0]), float(values[1]), float(values[2]))


# How near counts as there, for the simulator's verifier.
ALIGNED_M = 0.011
HOVER_RANGE_M = (0.035, 0.105)
LIFTED_M = 0.05
OVER_TARGET_M = 0.035
LOWERED_M = 0.020


def subtask_done(world: World, before: Truth, subtask: str, next_subtask: str | None) -> Verdict:
    """The simulator's own verdict on a subtask, by D.5's rule that a precondition must hold for the next one.

    Args:
        world: as it stands after the chunk.
        before: the truth when the chunk's picture was taken.
        subtask, next_subtask: l_i and l_{i+1}, in any wording that names a known thing and verb.

    Returns:
        A verdict of high confidence; a subtask that cannot be read is a failure.
    """
    skill = parse_subtask(subtask)
    if skill is None or skill.object not in world.object_names():
        return Verdict(False, "High", "The subtask names nothing in this scene.")
    problem = _problem(world, before, skill)
    return Verdict(problem is None, "High", problem or f"'{title(skill)}' is done.")


def _problem(world: World, before: Truth, skill: Skill) -> str | None:
    """What is missing for the skill to count as done; None when nothing is."""
    gripper, centre = world.ee_pose().position_m, world.object_pose(skill.object)[0]
    if skill.kind == "move":
        if world.gripper_fraction() < 0.8:
            return "The gripper is not open."
        if np.hypot(*(gripper[:2] - centre[:2])) > ALIGNED_M:
            return f"The gripper is not centered above the {skill.object}."
        return None if HOVER_RANGE_M[0] <= gripper[2] <= HOVER_RANGE_M[1] else "The gripper is at the wrong height."
    if skill.kind == "grasp":
        return None if world.grasped(skill.object) else f"The {skill.object} is not in the gripper."
    if skill.kind == "lift":
        high = centre[2] >= COUNTER_Z_M + KINDS[skill.object].rest_z_m + LIFTED_M
        return None if world.grasped(skill.object) and high else f"The {skill.object} is not lifted."
    if skill.kind == "carry" and skill.target in world.object_names():
        over = np.hypot(*(centre[:2] - world.object_pose(skill.target)[0][:2])) <= OVER_TARGET_M
        return None if world.grasped(skill.object) and over else f"The {skill.object} is not over the {skill.target}."
    if skill.kind == "lower":
        low = centre[2] <= COUNTER_Z_M + KINDS[skill.object].rest_z_m + LOWERED_M
        return None if low else f"The {skill.object} is still high above what it should rest on."
    if skill.kind == "release":
        return None if not world.touching(skill.object) else f"The gripper still touches the {skill.object}."
    return "The subtask's place is not in this scene."
