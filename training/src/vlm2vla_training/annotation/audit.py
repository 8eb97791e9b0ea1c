"""Checks of an annotation against the log it describes; the result goes into the `audit` field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm2vla_training.annotation.base import AnnotatedStep
from vlm2vla_training.annotation.findings import Finding, copy_error_rate, find
from vlm2vla_training.episodes.base import Episode

# These cannot be accepted by a person either: no answer, rows without a step, or numbers that are not the log's.
HARD_CHECKS = frozenset({"answer", "partition", "actions"})


def audit_steps(
    episode: Episode,
    steps: list[AnnotatedStep],
    copies: Sequence[Sequence[float]] | None = None,
    problems: Sequence[Finding] = (),
) -> dict[str, Any]:
    """Compare steps with the log.

    Args:
        episode: the log.
        steps: the annotation of it.
        copies: action rows that the annotator itself wrote, when it was asked for them.
        problems: findings about the answer that the steps were read from.

    Returns:
        covered: every logged row lies in exactly one step, in order; actions_match: the copied rows equal the log;
        begins_with_move: the first step starts with "Move to"; first_action_zero: the log's first motion is exactly
        zero (the paper keeps such rows, chunking absorbs them); commanded_reached_gap_mm: median distance between the
        commanded step and the one that the states show; copy_error_rate: see findings.copy_error_rate, None without
        copies; findings: see findings.find; quarantine: why the episode must not be trained on, or None.
    """
    findings = [*problems, *(find(episode, steps) if steps or not problems else [])]
    failed = {finding.check for finding in findings}
    return {
        "covered": bool(steps) and "partition" not in failed,
        "actions_match": not failed & HARD_CHECKS,
        "begins_with_move": bool(steps) and steps[0].step_description.startswith("Move to"),
        "first_action_zero": bool(len(episode)) and not episode.actions[0, :6].any(),
        "commanded_reached_gap_mm": _gap_mm(episode),
        "copy_error_rate": None if copies is None else copy_error_rate(copies, episode.actions),
        "findings": [finding.to_json() for finding in findings],
        "quarantine": quarantine_reason(findings),
    }


def quarantine_reason(findings: Sequence[Finding]) -> str | None:
    """Say why an episode must not be trained on as it is: its grave findings in words; None when there is none."""
    grave = [finding for finding in findings if finding.grave]
    if not grave:
        return None
    return "; ".join(
        f"{finding.check}: {finding.detail}" + ("" if finding.step is None else f" (step {finding.step})")
        for finding in grave
    )


def _gap_mm(episode: Episode) -> float | None:
    if len(episode) < 2:
        return None
    reached = np.diff(episode.states[:, :3], axis=0)
    gaps = np.linalg.norm(reached - episode.actions[:-1, :3], axis=1)
    return round(float(np.median(gaps)) * 1000, 2)
