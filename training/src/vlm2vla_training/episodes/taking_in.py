"""The traps that all sources of other people's logs share, for many episodes at once.

numpy takes a microsecond or more for a call, however short the rows: joined, the episodes of a shard cost a third.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from statistics import median

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.episodes.base import Episode, all_finite
from vlm2vla_training.episodes.intake import IntakeOptions, IntakeReport, LeftOut, RawEpisode, Taken

_PICTURES = (b"\xff\xd8", b"\x89PNG")
_BETWEEN = "gripper_between"
_TRAPS = ("zero_last_row_dropped", "first_action_zero", _BETWEEN)
_NOT_FINITE = "not finite", "an action or state is infinite or not a number"


class _Rows:
    """The steps of several episodes one after another.

    Attributes:
        actions: [N, 7].
        states: [N, 7]; a state behind the last action is not among them.
        begins: where each episode begins.
        ends: where it ends.
    """

    def __init__(self, raws: Sequence[RawEpisode]) -> None:
        """Join episodes that fit."""
        lengths = np.array([len(raw.actions) for raw in raws])
        self.actions = np.concatenate([raw.actions for raw in raws], dtype=np.float64)
        self.states = np.concatenate([raw.states[: len(raw.actions)] for raw in raws], dtype=np.float64)
        self.ends: NDArray[np.int64] = np.cumsum(lengths)
        self.begins: NDArray[np.int64] = self.ends - lengths


def take_in(raw: RawEpisode, options: IntakeOptions, report: IntakeReport) -> Episode | None:
    """Do what `take_in_all` does for a single episode, and report it."""
    taken = take_in_all([raw], options)[0]
    report.add(taken)
    return taken.episode


def take_in_all(raws: Sequence[RawEpisode], options: IntakeOptions) -> list[Taken]:
    """Handle the traps that all sources share; an episode that cannot be used is left out.

    - no instruction: left out, unless `keep_unlabelled`.
    - an all-zero last row, gripper included, was appended by a builder and would teach a phantom close: dropped.
    - a first row of zeros is kept, as the paper does; chunking absorbs it. Counted.
    - the gripper becomes binary: above 0.95 open, below 0.05 closed, between: the value reached next.

    Returns:
        What became of each, in order. The arrays of the episodes are parts of common ones.
    """
    troubles = [_misfit(raw, options) for raw in raws]
    fitting = [raw for raw, trouble in zip(raws, troubles, strict=True) if trouble is None]
    made = _made(fitting, options)
    if len(fitting) == len(raws):
        return made
    left = iter(made)
    return [
        next(left) if trouble is None else Taken(None, LeftOut(raw.key, *trouble), raw.traps)
        for raw, trouble in zip(raws, troubles, strict=True)
    ]


def reached_actions(actions: NDArray[np.float64], states: NDArray[np.floating]) -> NDArray[np.float64]:
    """Replace commanded motions by what the arm did: differences of successive poses, gripper as commanded.

    Args:
        actions: [T, 7] commanded.
        states: [at least T, 7]; the state behind the last action is used when it was logged.

    Returns:
        [T, 7]; a last row without a following state stays as commanded. Angles are differences wrapped to +-pi.
    """
    result = actions.copy()
    moved = np.diff(states[: len(actions) + 1, :6].astype(np.float64), axis=0)
    moved[:, 3:] = (moved[:, 3:] + np.pi) % (2 * np.pi) - np.pi
    result[: len(moved), :6] = moved
    return result


def _misfit(raw: RawEpisode, options: IntakeOptions) -> tuple[str, str] | None:
    """Reason and detail when an episode has no instruction, or its lengths and widths do not fit."""
    steps = len(raw.actions)
    if not options.keep_unlabelled and not raw.instruction.strip():
        return "no instruction", ""
    if raw.actions.shape != (steps, 7) or raw.states.shape[1:] != (7,) or not steps:
        return "wrong shape", f"actions {raw.actions.shape}, states {raw.states.shape}; expected [T, 7] each"
    if len(raw.states) not in (steps, steps + 1) or len(raw.images) != steps:
        return "lengths differ", f"{steps} actions, {len(raw.states)} states, {len(raw.images)} images"
    if len(raw.states) > steps and not np.isfinite(raw.states[steps]).all():
        return _NOT_FINITE
    return None


def _made(raws: Sequence[RawEpisode], options: IntakeOptions) -> list[Taken]:
    """What becomes of episodes that fit."""
    if not raws:
        return []
    rows = _Rows(raws)
    if not all_finite(rows.actions, rows.states):
        return [_made_alone(raw, options) for raw in raws]
    padded = np.logical_not(rows.actions[rows.ends - 1].any(axis=1))
    behind = rows.ends - padded
    unmoved = np.logical_not(rows.actions[rows.begins, :6].any(axis=1)) & (behind > rows.begins)
    between = _make_binary(rows, behind)
    met = padded | unmoved | between
    numbers = zip(rows.begins.tolist(), behind.tolist(), met.tolist(), strict=True)
    gaps = _gaps(rows)
    made: list[Taken] = []
    for place, (raw, (begin, end, any_met)) in enumerate(zip(raws, numbers, strict=True)):
        traps = tuple(compress(_TRAPS, (padded[place], unmoved[place], between[place]))) if any_met else ()
        gap_mm = round(median(gaps[begin : end - 1]) * 1000, 3) if end - begin > 1 else None
        made.append(_taken(raw, rows.actions[begin:end], rows.states[begin:end], traps, gap_mm, options))
    return made


def _made_alone(raw: RawEpisode, options: IntakeOptions) -> Taken:
    """What becomes of an episode that may hold what spoils everything worked out with it."""
    if all(np.isfinite(values).all() for values in (raw.actions, raw.states)):
        return _made([raw], options)[0]
    return Taken(None, LeftOut(raw.key, *_NOT_FINITE), raw.traps)


def _taken(
    raw: RawEpisode,
    actions: NDArray[np.float64],
    states: NDArray[np.float64],
    traps: tuple[str, ...],
    gap_mm: float | None,
    options: IntakeOptions,
) -> Taken:
    """What becomes of one episode with the rows that are left of it."""
    key, instruction, source, images, _, logged_states, first_step, facts, met = raw
    for image in images:
        if not image.startswith(_PICTURES):
            return Taken(None, LeftOut(key, "not an image", "a frame is neither JPEG nor PNG"), met)
    length = len(actions)
    if not length:
        return Taken(None, LeftOut(key, "no row left"), met + traps)
    for trap in traps:
        if trap != _BETWEEN:
            facts[trap] = True
    if options.actions == "reached":
        actions = reached_actions(actions, logged_states)
    facts["actions"] = options.actions
    if len(images) != length:
        images = images[:length]
    episode = Episode(key, instruction.strip(), source, images, actions, states, first_step, facts)
    return Taken(episode, None, met + traps if traps else met, gap_mm)


def _make_binary(rows: _Rows, behind: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Make the gripper binary up to the rows before `behind`; tells in which episodes a value lay between."""
    logged = rows.actions[:, 6]
    between: NDArray[np.bool_] = (logged >= 0.05) & (logged <= 0.95)
    episodes = np.logical_or.reduceat(between, rows.begins)
    if episodes.any():
        decided = ~between
        decided[behind - 1] = True
        following = np.where(decided, np.arange(len(logged)), len(logged) - 1)
        logged = logged[np.minimum.accumulate(following[::-1])[::-1]]
    rows.actions[:, 6] = logged > 0.5
    return episodes


def _gaps(rows: _Rows) -> list[float]:
    """How far each commanded motion lies from the reached one, in m; what follows an episode's last row is nobody's."""
    apart = rows.states[1:, :3] - rows.states[:-1, :3] - rows.actions[:-1, :3]
    gaps: list[float] = np.sqrt(np.einsum("ij,ij->i", apart, apart)).tolist()
    return gaps
