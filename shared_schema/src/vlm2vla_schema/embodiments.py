"""Embodiment cards: which axes a robot's log has, their units, and the words for their signs (appendix B.1).

B.1's prompt is "specific to the WidowX 250S robot embodiment, focusing solely on translational degrees of freedom":
that is the first card. The second adds rotation. What a policy is trained to write stays four numbers a row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One number of a logged row.

    Attributes:
        name: "x"; in a row it is called "dx".
        column: its place in a dataset's action [dx_m, dy_m, dz_m, droll_rad, dpitch_rad, dyaw_rad, gripper].
        signs: a sentence about what positive and negative mean.
        words: for a positive and a negative motion. Those of a rotation are none of the six directions, which the audit
            reads as translations.
    """

    name: str
    column: int
    signs: str
    words: tuple[str, str]


@dataclass(frozen=True)
class Embodiment:
    """A robot as prompts describe it; the gripper (1 open, 0 closed) always comes last."""

    name: str
    axes: tuple[Axis, ...]
    units: str

    @property
    def columns(self) -> list[int]:
        """Places in a dataset's action, the gripper's included."""
        return [*(axis.column for axis in self.axes), 6]

    def places(self) -> dict[str, str]:
        """What the prompts insert."""
        words = [word for axis in self.axes for word in axis.words]
        return {
            "degrees": str(len(self.axes) + 1),
            "axes": ",".join([*(axis.name for axis in self.axes), "gripper"]),
            "signs": " ".join(axis.signs for axis in self.axes),
            "row": ", ".join([*(f"d{axis.name}" for axis in self.axes), "gripper"]),
            "words": ", ".join(words[:-1]) + " and " + words[-1],
        }


_TRANSLATION = (
    Axis(
        "x", 0, "Positive x points forward (negative x points backward) with respect robot's end-effector.",
        ("forward", "backward"),
    ),
    Axis(
        "y", 1, "Positive y points left (negative y points right) with respect to the robot's end effector.",
        ("left", "right"),
    ),
    Axis(
        "z", 2, "Positive z points up (negative z points down) with respect to the robot's end-effector.",
        ("up", "down"),
    ),
)  # fmt: skip
# Right-handed about x forward, y left, z up.
_ROTATION = (
    Axis(
        "roll", 3, "Positive roll turns clockwise about x, seen from behind the robot (negative roll the other way).",
        ("rolling clockwise", "rolling counterclockwise"),
    ),
    Axis(
        "pitch", 4, "Positive pitch turns about y so that what points along x dips (negative pitch makes it rear).",
        ("dipping", "rearing"),
    ),
    Axis(
        "yaw", 5, "Positive yaw turns counterclockwise about z, seen from above (negative yaw clockwise).",
        ("turning counterclockwise", "turning clockwise"),
    ),
)  # fmt: skip

WIDOWX = Embodiment("widowx", _TRANSLATION, "metres")
WIDOWX_ROTATION = Embodiment("widowx-rotation", _TRANSLATION + _ROTATION, "metres and radians")
EMBODIMENTS: dict[str, Embodiment] = {card.name: card for card in (WIDOWX, WIDOWX_ROTATION)}
