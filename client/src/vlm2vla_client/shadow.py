"""Shadow mode (`--shadow`): the twin moves a chunk before the arm does, and says what the arm would touch.

The safety filter knows the end effector and the finger tips. The twin has the whole arm: hand, wrist and forearm
against the counter, the wall and the forbidden boxes of this bench, row after row. Fingers on the counter or the wall
are D.2's contact and allowed; anything else that touches, or comes within ``CLEARANCE_M``, is forbidden. What it cannot
know: where real objects lie, what the gripper holds, and anything on the bench that ``limits.toml`` does not name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from vlm2vla_client.errors import ConfigurationError
from vlm2vla_client.executor_types import Outcome
from vlm2vla_client.safety import Limits, Reason, RobotState, SafetyContext

#: The twin's links are primitives and a real arm sags: nearer than this counts as touching.
CLEARANCE_M: Final = 0.010
BLIND: Final = "real objects, and what the gripper holds, are not in the twin"


@dataclass(frozen=True)
class Touch:
    """One link that meets one thing: in which row first, and how near it came (below zero: pressed in), metres."""

    link: str
    thing: str
    row: int
    gap_m: float
    forbidden: bool

    def __str__(self) -> str:
        """For people, such as ``gripper link 4 mm from the wall (row 2)``."""
        near = f"{1000 * self.gap_m:.0f} mm from" if self.gap_m > 0.001 else "on"
        return f"{self.link.replace('_', ' ')} {near} the {self.thing.replace('_', ' ')} (row {self.row})"


@dataclass(frozen=True)
class Forecast:
    """How a chunk went in the twin.

    Attributes:
        outcome, reason, reasons: as the executor would report them of the arm.
        rows: how many rows were begun, of ``asked``.
        changes: rows that the filter changed or refused, and why, such as ``row 1 clip: counter_reached``.
        end_m: where the end effector came to rest [3].
        touches: what the arm met, the forbidden first.
    """

    outcome: Outcome
    reason: str
    reasons: tuple[Reason, ...]
    rows: int
    asked: int
    changes: tuple[str, ...]
    end_m: tuple[float, ...]
    touches: tuple[Touch, ...]

    @property
    def forbidden(self) -> bool:
        """Whether the arm should not do this: a forbidden contact, or motion that something blocked."""
        return self.outcome is Outcome.NOT_ARRIVED or any(touch.forbidden for touch in self.touches)

    def lines(self) -> list[str]:
        """What an operator is told; the last line says what it cannot know."""
        told = [f"forbidden: {touch}" for touch in self.touches if touch.forbidden]
        told += [f"expected: {touch}" for touch in self.touches if not touch.forbidden]
        went = f"{self.rows} of {self.asked} rows" if self.rows < self.asked else f"all {self.asked} rows"
        return [*told, *self.changes, f"{went}, {self.reason or 'completed'}", BLIND]


class Shadow(Protocol):
    """Whoever can say beforehand how a chunk will go."""

    def rehearse(self, rows: Sequence[Sequence[float]], context: SafetyContext, state: RobotState) -> Forecast:
        """Moves the rows from a measured state, somewhere else than on the arm. Blocks for well under a second.

        Raises:
            ClientError: it could not be rehearsed; the chunk must not move then.
        """
        ...


def open_shadow(limits: Limits, speed: float) -> Shadow:
    """The twin with this bench's counter, wall and forbidden boxes.

    Raises:
        ConfigurationError: the simulator is not installed; names the extra.
    """
    try:
        from vlm2vla_client.shadow_twin import TwinShadow
    except ImportError as error:
        raise ConfigurationError(f"--shadow needs the simulator: pip install 'vlm2vla-client[sim]' ({error})") from None
    return TwinShadow(limits, speed)
