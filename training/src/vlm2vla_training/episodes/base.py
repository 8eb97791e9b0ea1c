"""What an episode is, whatever it was recorded with (D_rob of paper section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.errors import DataError


@dataclass(frozen=True)
class Episode:
    """One robot trajectory: observation t was seen before action t.

    Attributes:
        key: unique in a dataset, for example "twin/pick_carrot/17".
        instruction: the task in words.
        source: "twin", "recordings", "bridge", ...
        images: T encoded images (JPEG or PNG bytes) of the fixed camera; empty when read without images.
        actions: [T, 7], base frame: dx_m, dy_m, dz_m, droll_rad, dpitch_rad, dyaw_rad, gripper (1 open, 0 closed).
        states: [T, 7], x_m, y_m, z_m, roll_rad, pitch_rad, yaw_rad of the end effector, gripper opening 0..1.
        first_step: original number of the first row; kept through every later stage.
        facts: further per-episode facts, JSON values only.
    """

    key: str
    instruction: str
    source: str
    images: list[bytes]
    actions: NDArray[np.float64]
    states: NDArray[np.float64]
    first_step: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check shapes.

        Raises:
            DataError: lengths or widths do not fit together, or a value is not finite.
        """
        steps = len(self.actions)
        if self.actions.shape != (steps, 7) or self.states.shape != (steps, 7):
            raise DataError(
                f"episode {self.key}: actions {self.actions.shape} and states {self.states.shape}; expected [T, 7] each"
            )
        if self.images and len(self.images) != steps:
            raise DataError(f"episode {self.key}: {len(self.images)} images for {steps} actions; expected one a step")
        if not all_finite(self.actions, self.states):
            raise DataError(f"episode {self.key}: an action or state is not finite")

    def __len__(self) -> int:
        """Return the number of steps T."""
        return len(self.actions)


class EpisodeSource(Protocol):
    """Something that episodes can be read from; reading streams and blocks on disk."""

    def count(self) -> int:
        """Return how many episodes are expected, for the progress line; 0 when that is not known before reading."""
        ...

    def episodes(self, skip: frozenset[str] = frozenset()) -> Iterator[Episode]:
        """Yield the episodes whose key is not in `skip`.

        Raises:
            DataError: the data on disk is not what the format says.
        """
        ...


def all_finite(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Tell whether no value of two arrays of one shape is infinite or not a number; one call, as every episode asks."""
    # What is not finite makes every product and sum it is in such; huge values may too, and are looked at one by one.
    return math.isfinite(np.vdot(one, other)) or bool(np.isfinite(one).all() and np.isfinite(other).all())


def binary_gripper(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Make a logged gripper signal binary: above 0.95 open, below 0.05 closed, between: the value reached next.

    Args:
        values: [T], 0..1.

    Returns:
        [T] of 0.0 or 1.0. A tail that never reaches either end counts as open above 0.5.
    """
    return np.array(reached_next(values.tolist()))


def reached_next(values: list[float]) -> list[float]:
    """What `binary_gripper` does, for a list."""
    following = 1.0 if not values or values[-1] > 0.5 else 0.0
    result: list[float] = []
    for value in reversed(values):
        if value > 0.95:
            following = 1.0
        elif value < 0.05:
            following = 0.0
        result.append(following)
    result.reverse()
    return result
