"""What every reader of other people's logs does alike: the known traps are handled, counted and reported."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.episodes.base import Episode, all_finite, reached_next
from vlm2vla_training.errors import DataError

ActionSource = Literal["commanded", "reached"]
NO_INSTRUCTION = "no instruction"
# summary.json names so many episodes; all are counted.
_NAMED = 1000
_SETTLED_AT = 256
_PICTURES = (b"\xff\xd8", b"\x89PNG")


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
    _unsettled: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=list)

    def leave_out(self, key: str, reason: str, detail: str = "") -> None:
        """Count one episode as left out and name it."""
        self.left_out[reason] += 1
        if len(self.named) < _NAMED:
            self.named.append({"episode_key": key, "reason": reason, **({"detail": detail} if detail else {})})

    def add(self, other: IntakeReport) -> None:
        """Take in what another report counted behind this one."""
        self.records += other.records
        if other.left_out:
            self.left_out.update(other.left_out)
            self.named += other.named[: _NAMED - len(self.named)]
        if other.traps:
            self.traps.update(other.traps)
        self.damage += other.damage
        self._gaps_mm += other._gaps_mm
        self._unsettled += other._unsettled

    def gap(self, actions: NDArray[np.float64], states: NDArray[np.float64]) -> None:
        """Note how far the commanded motion of one episode lies from the reached one."""
        if len(actions) > 1:
            self._unsettled.append((actions, states))
            if len(self._unsettled) >= _SETTLED_AT:
                self.settle()

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON values, for a report elsewhere to be made of."""
        self.settle()
        return {name: value for name, value in vars(self).items() if name != "_unsettled"}

    def settle(self) -> None:
        """Work out the gaps of the episodes noted, many at once: for a single one numpy's calls take the time."""
        if not self._unsettled:
            return
        actions = np.concatenate([one for one, _ in self._unsettled])
        states = np.concatenate([one for _, one in self._unsettled])
        apart = states[1:, :3] - states[:-1, :3] - actions[:-1, :3]
        gaps = np.sqrt(np.einsum("ij,ij->i", apart, apart)).tolist()
        begin = 0
        for one, _ in self._unsettled:
            end = begin + len(one)
            self._gaps_mm.append(round(median(gaps[begin : end - 1]) * 1000, 3))
            begin = end
        self._unsettled.clear()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; the gap is the median over episodes of each one's median step."""
        self.settle()
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


@dataclass(frozen=True)
class RawEpisode:
    """An episode as a source logged it, before the traps: fields as in `Episode`, gripper not yet binary.

    What it holds is nobody else's: the `Episode` keeps it.
    """

    key: str
    instruction: str
    source: str
    images: list[bytes]
    actions: NDArray[np.float64]
    states: NDArray[np.float64]
    first_step: int
    facts: dict[str, Any]


def take_in(raw: RawEpisode, options: IntakeOptions, report: IntakeReport) -> Episode | None:
    """Handle the traps that all sources share; None when the episode is left out (counted and named).

    - no instruction: left out, unless `keep_unlabelled`.
    - an all-zero last row, gripper included, was appended by a builder and would teach a phantom close: dropped.
    - a first row of zeros is kept, as the paper does; chunking absorbs it. Counted.
    - the gripper becomes binary: above 0.95 open, below 0.05 closed, between: the value reached next.
    """
    instruction = raw.instruction.strip()
    if not instruction and not options.keep_unlabelled:
        report.leave_out(raw.key, NO_INSTRUCTION)
        return None
    trouble = _trouble(raw)
    if trouble:
        report.leave_out(raw.key, *trouble)
        return None
    facts = raw.facts
    rows: list[list[float]] = raw.actions.tolist()  # few and short: quicker than numpy
    if not any(rows[-1]):
        rows.pop()
        report.traps["zero_last_row_dropped"] += 1
        facts["zero_last_row_dropped"] = True
    if not rows:
        report.leave_out(raw.key, "no row left")
        return None
    length = len(rows)
    actions, states = raw.actions[:length], raw.states[:length]
    if not any(rows[0][:6]):
        report.traps["first_action_zero"] += 1
        facts["first_action_zero"] = True
    logged = [row[6] for row in rows]
    gripper = reached_next(logged)
    if gripper != logged:
        actions[:, 6] = gripper
        if any(0.05 <= value <= 0.95 for value in logged):
            report.traps["gripper_between"] += 1
    report.gap(actions, states)
    if options.actions == "reached":
        actions = reached_actions(actions, raw.states)
    facts["actions"] = options.actions
    images = raw.images if len(raw.images) == length else raw.images[:length]
    return Episode(raw.key, instruction, raw.source, images, actions, states, raw.first_step, facts)


def reached_actions(actions: NDArray[np.float64], states: NDArray[np.float64]) -> NDArray[np.float64]:
    """Replace commanded motions by what the arm did: differences of successive poses, gripper as commanded.

    Args:
        actions: [T, 7] commanded.
        states: [at least T, 7]; the state behind the last action is used when it was logged.

    Returns:
        [T, 7]; a last row without a following state stays as commanded. Angles are differences wrapped to +-pi.
    """
    result = actions.copy()
    moved = np.diff(states[: len(actions) + 1, :6], axis=0)
    moved[:, 3:] = (moved[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    result[: len(moved), :6] = moved
    return result


def _trouble(raw: RawEpisode) -> tuple[str, str] | None:
    """Reason and detail when lengths, widths or values of an episode do not fit."""
    steps = len(raw.actions)
    if raw.actions.shape != (steps, 7) or raw.states.shape[1:] != (7,) or not steps:
        return "wrong shape", f"actions {raw.actions.shape}, states {raw.states.shape}; expected [T, 7] each"
    if len(raw.states) not in (steps, steps + 1) or len(raw.images) != steps:
        return "lengths differ", f"{steps} actions, {len(raw.states)} states, {len(raw.images)} images"
    if not all_finite(raw.actions, raw.states[:steps]) or not np.isfinite(raw.states[-1]).all():
        return "not finite", "an action or state is infinite or not a number"
    for image in raw.images:
        if not image.startswith(_PICTURES):
            return "not an image", "a frame is neither JPEG nor PNG"
    return None


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
