"""The seam between the client and an arm. New hardware is one new file that implements :class:`Robot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.safety_types import RobotState

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class RobotCapabilities:
    """What the rest of the client must know about an arm.

    ``physical``: a person can be hurt, so untrained policies and missing calibration are refused.
    ``arrival_tolerance_m``: how near the commanded position counts as arrived.
    """

    name: str
    physical: bool
    arrival_tolerance_m: float


class Robot(Protocol):
    """An arm with a gripper. Every call returns within 50 ms; moves are started here and waited for elsewhere.

    Every method raises :class:`vlm2vla_client.errors.RobotError` when the arm does not answer or refuses.
    """

    @property
    def capabilities(self) -> RobotCapabilities:
        """Facts that do not change while connected."""
        ...

    def connect(self) -> None:
        """Get ready to move without moving. Called once, before anything else."""
        ...

    def state(self) -> RobotState:
        """The measured state, stamped with the clock's time."""
        ...

    def contacts(self) -> frozenset[str]:
        """What the arm touches: a subset of {"counter", "wall"}. On an arm this is inferred from effort."""
        ...

    def command(self, position_m: FloatArray, rotation: FloatArray, duration_s: float) -> None:
        """Start moving the end effector to a pose [3], [3, 3] so that it is there in ``duration_s`` seconds."""
        ...

    def set_gripper(self, open_: bool, deadline_s: float) -> None:
        """Start opening or closing; the fingers are driven for at most ``deadline_s``, then held."""
        ...

    def hold(self, reason: str) -> None:
        """Stop where the arm is: goal := measured joints, torque on, grip kept. Safe to call at any time and twice."""
        ...

    def close(self) -> None:
        """Hold and release the connection; the arm stays powered. Safe to call twice."""
        ...
