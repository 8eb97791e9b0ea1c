"""What the simulator knows about one moment, as plain data: for training data and for scoring, never for a policy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlm2vla_twin.physics import World
from vlm2vla_twin.scene import CARDS, COUNTER_Z_M, KINDS

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Truth:
    """One moment of a scene.

    Positions are metres in the base frame; ``pixels`` are (u, v) as fractions of the picture's width and height, which the
    squash to the model's square leaves unchanged.
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
    cards: dict[str, Point] = {
        name: (*(float(v) for v in world.card_xy(name)), COUNTER_Z_M)  # type: ignore[misc]
        for name in CARDS
        if any(card.name == name for card in world.spec.cards)
    }
    everything = {"gripper": _point(gripper), **things, **{f"card {name}": xyz for name, xyz in cards.items()}}
    return Truth(
        _point(gripper), world.gripper_fraction(), held, things, cards,
        {name: project(world, position) for name, position in everything.items()},
    )  # fmt: skip


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
