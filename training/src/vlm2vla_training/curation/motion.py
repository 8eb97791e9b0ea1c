"""Motion plans: the summed motion of a step as directional words with words of degree (paper section 3.1).

The sentence is a pure function of the logged actions and holds no digits, so the same motion always reads the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm2vla_schema.directions import NAMES, direction_words, join_words

# An up-and-down inside one phase is told in two parts when both exceed this.
_REVERSAL_M = 0.025
_EPSILON_M = 1e-9


@dataclass(frozen=True)
class Phase:
    """Rows between two gripper changes: what the gripper does before them, then their summed motion [3] in metres."""

    gripper_change: str | None
    sums_m: tuple[float, float, float]


def directions(sums_m: Sequence[float], threshold_m: float = 0.025) -> list[str]:
    """Name the axes whose |sum| exceeds `threshold_m`, for example ["backward", "right", "down"] (B.2, auxiliary set).

    Args:
        sums_m: dx, dy, dz in metres.
        threshold_m: 2.5 cm in the paper.
    """
    words: list[str] = []
    for value, (positive, negative) in zip(sums_m, NAMES, strict=True):
        if abs(value) > threshold_m + _EPSILON_M:
            words.append(positive if value > 0 else negative)
    return words


def degree_words(sums_m: Sequence[float]) -> str:
    """Say a summed motion, for example "far forward, slightly left and down"; empty below 1 cm on every axis."""
    # Rounding to 0.1 mm keeps float noise of the sum from choosing the word at a bound.
    words = direction_words([round(value, 4) for value in sums_m])
    return join_words(words) if words else ""


def motion_sentence(actions: Sequence[Sequence[float]], gripper_before: float | None = None) -> str:
    """Tell the motion of one step in one sentence without digits.

    Args:
        actions: rows of width 4 or 7, metres, gripper last (1 open, 0 closed).
        gripper_before: gripper of the row before the step; None at the start of an episode.

    Returns:
        For example "Move far forward, slightly left and down, gripper stays open." or
        "Move down, then close the gripper.".
    """
    clauses: list[str] = []
    changed = False
    for phase in _phases(actions, gripper_before):
        if phase.gripper_change is not None:
            clauses.append(phase.gripper_change)
            changed = True
        words = degree_words(phase.sums_m)
        if words:
            clauses.append("move " + words)
    state = "open" if len(actions) and actions[-1][-1] >= 0.5 else "closed"
    if not clauses:
        return f"Hold still, gripper stays {state}."
    sentence = ", then ".join(clauses)
    if not changed:
        sentence += f", gripper stays {state}"
    return sentence[0].upper() + sentence[1:] + "."


def summed(actions: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Sum dx, dy, dz over rows, metres."""
    return (
        sum(float(row[0]) for row in actions),
        sum(float(row[1]) for row in actions),
        sum(float(row[2]) for row in actions),
    )


def _phases(actions: Sequence[Sequence[float]], gripper_before: float | None) -> list[Phase]:
    phases: list[Phase] = []
    start = 0
    previous = gripper_before
    change: str | None = None
    for index in range(len(actions) + 1):
        gripper = float(actions[index][-1]) if index < len(actions) else None
        if gripper is not None and (previous is None or gripper == previous):
            previous = gripper
            continue
        if index > start or change is not None:
            phases += _split_reversal(change, actions[start:index])
        if gripper is not None:
            change = "open the gripper" if gripper >= 0.5 else "close the gripper"
            start, previous = index, gripper
    return phases


def _split_reversal(change: str | None, rows: Sequence[Sequence[float]]) -> list[Phase]:
    heights = [0.0]
    for row in rows:
        heights.append(heights[-1] + float(row[2]))
    for turn in (heights.index(max(heights)), heights.index(min(heights))):
        first, second = heights[turn], heights[-1] - heights[turn]
        if abs(first) > _REVERSAL_M and abs(second) > _REVERSAL_M:
            return [Phase(change, summed(rows[:turn])), Phase(None, summed(rows[turn:]))]
    return [Phase(change, summed(rows))]
