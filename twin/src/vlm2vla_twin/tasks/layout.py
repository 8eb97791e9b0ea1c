"""Where things may stand: footprints that never overlap, inside the camera's view and the arm's reach.

All lengths are metres on the counter's plane in the base frame (+x forward, +y left).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm2vla_twin.scene import CAMERA_FOVY_DEG, CAMERA_POSITION_M, CAMERA_XYAXES, COUNTER_Z_M, KINDS

X_RANGE_M = (0.20, 0.38)
Y_RANGE_M = (-0.15, 0.15)
VIEW_MARGIN = 0.08
"""Share of the picture left free at each edge: 5 mm and 1 degree of camera jitter move a point by at most 0.055."""

ABOVE_M = (0.060, 0.085)
"""How much further along +x than a card's centre the item "above" it stands: a few centimetres beyond its edge."""

_ARRANGEMENTS = 300
_DRAWS = 40
_GAP_OBJECTS_M = 0.028  # a finger and its pad must fit between two things that can be grasped
_GAP_M = 0.012
_GAP_CARD_M = 0.006  # nothing collides with a card; it must only stay uncovered

# Discs (x, y, radius) in an object's own frame, which cover its shape as scene.py builds it.
_DISCS: dict[str, tuple[tuple[float, float, float], ...]] = {
    "carrot": ((-0.010, 0.0, 0.014), (0.010, 0.0, 0.014), (0.028, 0.0, 0.009)),
    "eggplant": ((-0.009, 0.0, 0.016), (0.009, 0.0, 0.016), (0.022, 0.0, 0.011)),
    "banana": ((-0.026, -0.006, 0.012), (-0.013, -0.001, 0.012), (0.0, 0.004, 0.012), (0.013, -0.001, 0.012),
               (0.026, -0.006, 0.012)),
    "fish": ((-0.010, 0.0, 0.014), (0.010, 0.0, 0.014), (-0.032, 0.0, 0.016)),
    "plate": ((0.0, 0.0, 0.062),),
    "pan": ((0.0, 0.0, 0.080), (0.085, 0.0, 0.012), (0.105, 0.0, 0.012), (0.125, 0.0, 0.012), (0.145, 0.0, 0.012)),
    "card": tuple((x, y, 0.0142) for x in (-0.02, 0.0, 0.02) for y in (-0.02, 0.0, 0.02)),
}  # fmt: skip


class NoRoomError(ValueError):
    """No arrangement without overlaps was found: the ranges asked for are too tight."""


@dataclass(frozen=True)
class Piece:
    """One thing on the counter: an object by its kind, or ``card:NAME``."""

    name: str
    x_m: float
    y_m: float
    yaw_rad: float = 0.0

    @property
    def kind(self) -> str:
        """The key of its footprint."""
        return "card" if self.name.startswith("card:") else self.name

    def discs(self) -> NDArray[np.float64]:
        """Its footprint as discs, shape [n, 3]: x, y, radius in the base frame."""
        local = np.asarray(_DISCS[self.kind])
        c, s = np.cos(self.yaw_rad), np.sin(self.yaw_rad)
        x, y = local[:, 0], local[:, 1]
        return np.stack([self.x_m + c * x - s * y, self.y_m + s * x + c * y, local[:, 2]], axis=1)


def gap_m(one: Piece, other: Piece) -> float:
    """The free distance between two footprints; negative where they overlap."""
    a, b = one.discs()[:, None, :], other.discs()[None, :, :]
    return float((np.hypot(a[..., 0] - b[..., 0], a[..., 1] - b[..., 1]) - a[..., 2] - b[..., 2]).min())


def wanted_gap_m(one: Piece, other: Piece) -> float:
    """The free distance that a start condition leaves between two things."""
    if "card" in (one.kind, other.kind):
        return _GAP_CARD_M
    return _GAP_OBJECTS_M if KINDS[one.kind].graspable and KINDS[other.kind].graspable else _GAP_M


def in_view(x_m: float, y_m: float, margin: float = VIEW_MARGIN) -> bool:
    """Whether a point of the counter falls inside the nominal picture, ``margin`` away from its edges."""
    right, up = np.asarray(CAMERA_XYAXES[:3]), np.asarray(CAMERA_XYAXES[3:])
    offset = np.array([x_m, y_m, COUNTER_Z_M]) - np.asarray(CAMERA_POSITION_M)
    depth = -float(np.cross(right, up) @ offset)
    if depth <= 0.0:
        return False
    half = np.tan(np.deg2rad(CAMERA_FOVY_DEG) / 2)
    u = 0.5 + float(right @ offset) / depth / half * (480 / 640) / 2
    v = 0.5 - float(up @ offset) / depth / half / 2
    return bool(margin <= u <= 1 - margin and margin <= v <= 1 - margin)


Draw = Callable[[np.random.Generator], list[Piece]]
"""Draws one thing, or a few that belong together."""


def arrange(rng: np.random.Generator, draws: list[Draw]) -> tuple[Piece, ...]:
    """Draws all things until none overlap and all are in view; the same generator gives the same arrangement.

    Raises:
        NoRoomError: after 300 arrangements of up to 40 draws a thing.
    """
    for _ in range(_ARRANGEMENTS):
        placed: list[Piece] = []
        for draw in draws:
            for _ in range(_DRAWS):
                pieces = draw(rng)
                if all(_fits(piece, placed) for piece in pieces) and _apart(pieces):
                    placed += pieces
                    break
            else:
                break
        else:
            return tuple(placed)
    raise NoRoomError(f"{len(draws)} things do not fit: {_ARRANGEMENTS} arrangements overlapped or left the picture")


def _fits(piece: Piece, placed: list[Piece]) -> bool:
    return in_view(piece.x_m, piece.y_m) and all(gap_m(piece, other) >= wanted_gap_m(piece, other) for other in placed)


def _apart(pieces: list[Piece]) -> bool:
    return all(
        gap_m(one, other) >= wanted_gap_m(one, other)
        for index, one in enumerate(pieces)
        for other in pieces[index + 1 :]
    )


def anywhere(name: str, x_m: tuple[float, float] = X_RANGE_M, y_m: tuple[float, float] = Y_RANGE_M) -> Draw:
    """A thing uniform in a rectangle, turned any way."""

    def draw(rng: np.random.Generator) -> list[Piece]:
        return [Piece(name, float(rng.uniform(*x_m)), float(rng.uniform(*y_m)), _yaw(rng))]

    return draw


def fixed(piece: Piece) -> Draw:
    """A thing that stands where it stands."""
    return lambda rng: [piece]


def by_gripper(name: str, condition: str, gripper_xy_m: tuple[float, float]) -> Draw:
    """A thing in one of the three start conditions of appendix D.1.

    ``under`` the gripper (within 1 cm), in ``front`` of it (2 cm or more further along +x, within 2 cm sideways), or in
    front and to the ``side`` of it (4 cm or more to the left or right).
    """
    x, y = gripper_xy_m

    def draw(rng: np.random.Generator) -> list[Piece]:
        if condition == "under":
            return [Piece(name, x + float(rng.uniform(-0.01, 0.01)), y + float(rng.uniform(-0.01, 0.01)), _yaw(rng))]
        ahead = float(rng.uniform(x + 0.02, X_RANGE_M[1]))
        if condition == "front":
            return [Piece(name, ahead, y + float(rng.uniform(-0.02, 0.02)), _yaw(rng))]
        sideways = float(
            rng.uniform(y + 0.04, Y_RANGE_M[1]) if rng.random() < 0.5 else rng.uniform(Y_RANGE_M[0], y - 0.04)
        )
        return [Piece(name, ahead, sideways, _yaw(rng))]

    return draw


def card_with_item(card: str, item: str, x_m: tuple[float, float], y_m: tuple[float, float]) -> Draw:
    """A picture card with an item standing a few centimetres above it, away from the robot."""

    def draw(rng: np.random.Generator) -> list[Piece]:
        x, y = float(rng.uniform(*x_m)), float(rng.uniform(*y_m))
        above = Piece(item, x + float(rng.uniform(*ABOVE_M)), y + float(rng.uniform(-0.01, 0.01)), _yaw(rng))
        return [Piece(f"card:{card}", x, y), above]

    return draw


def _yaw(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.0, 2 * np.pi))
