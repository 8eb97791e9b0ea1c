"""What every reader of other people's logs does alike: the known traps are handled, counted and reported."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.errors import DataError

ActionSource = Literal["commanded", "reached"]
# summary.json names so many episodes; all are counted.
_NAMED = 1000


@dataclass(frozen=True)
class IntakeOptions:
    """What `ingest` may choose.

    Attributes:
        keep_unlabelled: keep episodes without an instruction; their instruction is "".
        actions: "commanded" as logged (the paper's), or "reached": differences of the logged end-effector poses.
        camera: name of the fixed camera in the source; None takes the format's own default.
    """

    keep_unlabelled: bool = False
    actions: ActionSource = "commanded"
    camera: str | None = None


class LeftOut(NamedTuple):
    """An episode, or the place of one, that was left out, and why."""

    episode_key: str
    reason: str
    detail: str = ""


class Taken(NamedTuple):
    """What became of one episode of a source.

    Attributes:
        episode: None when it was left out.
        left_out: why it was.
        traps: known traps of the data that were met in it.
        gap_mm: how far its commanded motion lies from the reached one, the median step; None for a single step.
    """

    episode: Episode | None
    left_out: LeftOut | None = None
    traps: tuple[str, ...] = ()
    gap_mm: float | None = None


@dataclass
class IntakeReport:
    """What a reader met; goes into summary.json whole.

    Attributes:
        records: episodes met in the source, kept or not.
        left_out: why episodes were left out, and how many.
        traps: known traps of the data that were handled or only counted, and in how many episodes.
        named: the first 1000 episodes left out, each with its reason.
        damage: unreadable places: file, record, offset, what.
    """

    records: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    traps: Counter[str] = field(default_factory=Counter)
    named: list[dict[str, Any]] = field(default_factory=list)
    damage: list[dict[str, Any]] = field(default_factory=list)
    _gaps_mm: list[float] = field(default_factory=list)

    def leave_out(self, key: str, reason: str, detail: str = "") -> None:
        """Count one episode as left out and name it."""
        self.left_out[reason] += 1
        if len(self.named) < _NAMED:
            self.named.append({"episode_key": key, "reason": reason, **({"detail": detail} if detail else {})})

    def add(self, taken: Taken) -> None:
        """Note what became of one episode."""
        for trap in taken.traps:
            self.traps[trap] += 1
        if taken.left_out is not None:
            self.leave_out(*taken.left_out)
        if taken.gap_mm is not None:
            self._gaps_mm.append(taken.gap_mm)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; the gap is the median over episodes of each one's median step."""
        gap = round(float(np.median(self._gaps_mm)), 2) if self._gaps_mm else None
        return {
            "records": self.records,
            "left_out": dict(sorted(self.left_out.items())),
            "left_out_total": self.left_out.total(),
            "traps": dict(sorted(self.traps.items())),
            "named": self.named,
            "damage": self.damage,
            "commanded_reached_gap_mm": gap,
        }


class RawEpisode(NamedTuple):
    """An episode as a source logged it, before the traps that all sources share: fields as in `Episode`.

    The gripper is not yet binary. Actions and states are any kind of float and are copied; the `Episode` keeps the
    images and the facts. `traps` are those of the source that were met in it.
    """

    key: str
    instruction: str
    source: str
    images: list[bytes]
    actions: NDArray[np.floating]
    states: NDArray[np.floating]
    first_step: int
    facts: dict[str, Any]
    traps: tuple[str, ...] = ()


def rows_of(values: NDArray[np.float32] | list[Any], width: int, what: str) -> NDArray[np.float64]:
    """Shape flat or nested numbers as [T, width].

    Raises:
        DataError: the number of values is not a multiple of `width`, or they are not numbers.
    """
    try:
        flat = np.asarray(values, dtype=np.float64)
        return flat.reshape(-1, width)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what}: {np.size(values)} values; expected rows of {width} numbers") from error
