"""The audit's checks: what an annotation says against what the log shows. Each finding names the step, the check, why.

A grave finding makes the label wrong for training and puts its episode into quarantine; the others are for a person
to read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm2vla_schema.directions import NAMES
from vlm2vla_schema.limits import PUNCTUATION
from vlm2vla_training.annotation.base import AnnotatedStep
from vlm2vla_training.episodes.base import Episode

# Below this summed motion an axis counts as still (the paper's 2.5 cm of appendix B.2): any word, or none, is right.
DEAD_BAND_M = 0.025
# A gripper event may lie so many rows outside the step that tells it: an annotator sees the fingers move later.
_EVENT_SLACK_ROWS = 1
_EPSILON_M = 1e-9

_GRASP = re.compile(r"\b(?:grasp|grab|grip|take hold|close the gripper|closes? (?:the )?(?:gripper|fingers))\b", re.I)
_RELEASE = re.compile(r"\b(?:release|let go|drop|opens? (?:the )?(?:gripper|fingers))\b", re.I)
_TELLS_CLOSING = re.compile(r"\b(?:clos(?:e|es|ing)|grasp\w*|grab\w*|grip(?:s|ping)?|hold)\b", re.I)
_TELLS_OPENING = re.compile(r"\b(?:open(?:s|ing)?|releas\w*|let go|drop\w*)\b", re.I)
# "stays open" tells a state, not an event.
_STATE = re.compile(r"\b(?:stays?|remains?|keeps?|kept|still|is|while)\s+(?:the\s+gripper\s+)?(?:open|closed)\b", re.I)


@dataclass(frozen=True)
class Finding:
    """One disagreement: the step's index (None for the episode), the check, whether it is grave, and the words."""

    step: int | None
    check: str
    grave: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the `audit` field."""
        return dict(vars(self))


def find(episode: Episode, steps: Sequence[AnnotatedStep]) -> list[Finding]:
    """Run every check; when the ranges do not partition the episode the others have no rows to look at."""
    broken = partition_findings(episode, steps)
    if broken:
        return broken
    findings: list[Finding] = []
    for index, step in enumerate(steps):
        rows = _rows(episode, step)
        findings += log_findings(index, step, rows)
        if step.cut:
            continue  # its words are known to be about other rows too
        findings += direction_findings(index, step, rows)
        findings += text_findings(index, step)
    return findings + gripper_findings(episode, steps)


def partition_findings(episode: Episode, steps: Sequence[AnnotatedStep]) -> list[Finding]:
    """Every logged row must lie in exactly one step, in order."""
    if not steps:
        return [Finding(None, "partition", True, "the annotation has no steps")]
    findings: list[Finding] = []
    expected = episode.first_step
    for index, step in enumerate(steps):
        if step.first != expected or step.last < step.first:
            detail = f"rows {step.first} to {step.last}; expected a range that begins at {expected}"
            findings.append(Finding(index, "partition", True, detail))
        expected = max(step.last + 1, expected)
    end = episode.first_step + len(episode)
    if expected != end:
        findings.append(Finding(None, "partition", True, f"the steps end before row {expected}; the log before {end}"))
    return findings


def log_findings(index: int, step: AnnotatedStep, rows: NDArray[np.float64]) -> list[Finding]:
    """The step's action rows must be the log's."""
    if step.actions == rows[:, [0, 1, 2, 6]].tolist():
        return []
    return [Finding(index, "actions", True, "the step's action rows differ from the log's")]


def direction_findings(index: int, step: AnnotatedStep, rows: NDArray[np.float64]) -> list[Finding]:
    """Words must not name the opposite of a motion beyond the dead band (grave), and should name such a motion.

    The left/right axis has a check name of its own: a mirrored camera or a wrong sign shows there.
    """
    findings: list[Finding] = []
    said = said_directions(step.main_movements)
    for axis, (positive, negative) in enumerate(NAMES):
        moved = float(rows[:, axis].sum())
        if abs(moved) <= DEAD_BAND_M + _EPSILON_M:
            continue
        right, wrong = (positive, negative) if moved > 0 else (negative, positive)
        check = "left_right" if axis == 1 else "direction"
        centimetres = f"the log moves {abs(moved) * 100:.1f} cm {right}"
        if right in said:
            continue
        if wrong in said:
            findings.append(Finding(index, check, True, f"the words say {wrong}; {centimetres}"))
        else:
            findings.append(Finding(index, check, False, f"the words do not say {right}; {centimetres}"))
    return findings


def said_directions(text: str) -> set[str]:
    """Return which of the six direction words a text uses; "upward" and "downwards" count as up and down."""
    return set(re.findall(r"\b(forward|backward|left|right|up|down)(?:ward)?s?\b", text.lower()))


def text_findings(index: int, step: AnnotatedStep) -> list[Finding]:
    """A plan has words and no digits (section 3.1); a description is a subtask's name of 1..80 characters, which
    begins with a word: `curate` could not write another into a list of subtasks.
    """
    findings: list[Finding] = []
    if not step.main_movements.strip():
        findings.append(Finding(index, "text", True, "main_movements is empty"))
    if any(letter.isdigit() for letter in step.main_movements):
        findings.append(Finding(index, "text", False, "main_movements holds digits"))
    if not 1 <= len(step.step_description.strip()) <= 80:
        length = len(step.step_description.strip())
        findings.append(Finding(index, "text", True, f"step_description has {length} characters; expected 1..80"))
    elif step.step_description.strip().startswith(tuple(PUNCTUATION)):
        findings.append(Finding(index, "text", True, "step_description begins with punctuation; expected words"))
    return findings


def gripper_findings(episode: Episode, steps: Sequence[AnnotatedStep]) -> list[Finding]:
    """Every grasp step needs a closing and every release step an opening; every event must be told by its step."""
    findings: list[Finding] = []
    events = gripper_events(episode)
    for index, step in enumerate(steps):
        for pattern, name, closing in ((_GRASP, "closing", True), (_RELEASE, "opening", False)):
            near = [row for row, closes in events if closes == closing and _near(row, step)]
            if not step.cut and pattern.search(step.step_description) and not near:
                detail = f"'{step.step_description}' without a {name} in the log"
                findings.append(Finding(index, "gripper", True, detail))
    for row, closes in events:
        name, pattern = ("closing", _TELLS_CLOSING) if closes else ("opening", _TELLS_OPENING)
        if not any(_near(row, step) and _tells(step, pattern) for step in steps):
            inside = next(i for i, step in enumerate(steps) if step.first <= row <= step.last)
            if steps[inside].cut:
                continue
            detail = f"the gripper's {name} at row {row} is not told in '{steps[inside].step_description}'"
            findings.append(Finding(inside, "gripper", True, detail))
    return findings


def gripper_events(episode: Episode) -> list[tuple[int, bool]]:
    """Return (original step number, True for a closing) of every change of the gripper's command."""
    gripper = episode.actions[:, 6]
    changes = np.flatnonzero(np.diff(gripper)) + 1
    return [(episode.first_step + int(row), bool(gripper[row] < gripper[row - 1])) for row in changes]


def copy_error_rate(copies: Sequence[Sequence[float]], rows: NDArray[np.float64], tolerance_m: float = 5e-4) -> float:
    """Compare action rows that an annotator copied with the log's, by position.

    Args:
        copies: rows [dx, dy, dz, gripper] or 7-D in the annotator's answer, all steps one after another.
        rows: [T, 7] of the log.
        tolerance_m: prompts print three decimals; half of the last one is not an error.

    Returns:
        The share of positions (of the longer list) where a row is missing, surplus or differs; 0.0 for two empty lists.
    """
    longest = max(len(copies), len(rows))
    wrong = abs(len(copies) - len(rows))
    for copy, row in zip(copies, rows, strict=False):
        wanted = row if len(copy) == 7 else row[[0, 1, 2, 6]]
        wrong += len(copy) != len(wanted) or not np.allclose(copy, wanted, rtol=0.0, atol=tolerance_m + _EPSILON_M)
    return round(wrong / longest, 4) if longest else 0.0


def _tells(step: AnnotatedStep, pattern: re.Pattern[str]) -> bool:
    return bool(pattern.search(_STATE.sub("", f"{step.step_description}. {step.main_movements}")))


def _near(row: int, step: AnnotatedStep) -> bool:
    return step.first - _EVENT_SLACK_ROWS <= row <= step.last + _EVENT_SLACK_ROWS


def _rows(episode: Episode, step: AnnotatedStep) -> NDArray[np.float64]:
    return episode.actions[step.first - episode.first_step : step.last - episode.first_step + 1]
