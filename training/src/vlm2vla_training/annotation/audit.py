"""Checks of an annotation against the log it describes; the result goes into the `audit` field."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm2vla_training.annotation.base import AnnotatedStep
from vlm2vla_training.episodes.base import Episode


def audit_steps(episode: Episode, steps: list[AnnotatedStep]) -> dict[str, Any]:
    """Compare steps with the log.

    Returns:
        covered: every logged row lies in exactly one step, in order; actions_match: the copied rows equal the log;
        begins_with_move: the first step starts with "Move to"; first_action_zero: the log's first motion is exactly
        zero (the paper keeps such rows, chunking absorbs them); commanded_reached_gap_mm: median distance between the
        commanded step and the one that the states show.
    """
    expected = episode.first_step
    covered = bool(steps)
    actions_match = True
    for step in steps:
        covered = covered and step.first == expected and step.last >= step.first
        expected = step.last + 1
        rows = episode.actions[step.first - episode.first_step : step.last - episode.first_step + 1]
        actions_match = actions_match and step.actions == rows[:, [0, 1, 2, 6]].tolist()
    covered = covered and expected == episode.first_step + len(episode)
    return {
        "covered": covered,
        "actions_match": actions_match,
        "begins_with_move": bool(steps) and steps[0].step_description.startswith("Move to"),
        "first_action_zero": bool(len(episode)) and not episode.actions[0, :6].any(),
        "commanded_reached_gap_mm": _gap_mm(episode),
    }


def _gap_mm(episode: Episode) -> float | None:
    if len(episode) < 2:
        return None
    reached = np.diff(episode.states[:, :3], axis=0)
    gaps = np.linalg.norm(reached - episode.actions[:-1, :3], axis=1)
    return round(float(np.median(gaps)) * 1000, 2)
