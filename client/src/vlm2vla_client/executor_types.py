"""What the executor takes and gives back: monitors, start facts, outcomes. Import them from ``executor``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vlm2vla_client.safety_types import Decision, Reason

FloatArray = NDArray[np.float64]


class Monitor(Protocol):
    """Watches what must hold while the arm moves: server liveness, camera, operator, driver."""

    def fault(self) -> str | None:
        """What went wrong, or None. Polled at least every 0.1 s of motion; must return at once."""
        ...


class NoMonitor:
    """Nothing to watch: for motion that nobody else's machine decides, such as homing the twin."""

    def fault(self) -> str | None:
        """Never a fault."""
        return None


class Monitors:
    """Several monitors as one; the first that reports a fault is heard."""

    def __init__(self, *monitors: Monitor) -> None:
        self._monitors = monitors

    def fault(self) -> str | None:
        """The first fault, or None."""
        return next((fault for monitor in self._monitors if (fault := monitor.fault()) is not None), None)


class Outcome(StrEnum):
    """How a chunk ended. Only COMPLETED and ENDED_EARLY leave the arm where a row put it; the others hold it."""

    COMPLETED = "completed"
    ENDED_EARLY = "ended_early"
    REFUSED = "refused"
    NOT_ARRIVED = "not_arrived"
    NOT_STARTED = "not_started"
    FAULT = "fault"


@dataclass(frozen=True, eq=False)
class MotionStart:
    """What the motion-start rule compares with the present.

    ``newest_frame_s``: stamp of the newest frame; ``captured_position_m`` [3]: where the end effector was measured when
    the frame that the chunk was computed from was captured.
    """

    newest_frame_s: float
    captured_position_m: FloatArray


@dataclass(frozen=True)
class RowResult:
    """One row: as received, the filter's decision, how many substeps ran, and whether the arm got there."""

    index: int
    row: list[float]
    decision: Decision
    substeps: int
    arrived: bool


@dataclass(frozen=True)
class ChunkResult:
    """What became of a chunk; ``reason`` is for people, ``reasons`` are the filter's that ended it."""

    outcome: Outcome
    rows: tuple[RowResult, ...]
    reason: str = ""
    reasons: tuple[Reason, ...] = ()

    @property
    def moved(self) -> bool:
        """Whether the arm was commanded at all."""
        return any(row.substeps for row in self.rows)
