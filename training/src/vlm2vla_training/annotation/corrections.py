"""Human corrections on top of other annotations: where an operator's words were followed and verified, they win.

A correction covers the rows of one verified cycle. Steps outside stay as they are, steps inside disappear, and what is
left of a step that lies partly inside is marked `cut`: its words are about rows that it no longer has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from vlm2vla_training.annotation.audit import audit_steps
from vlm2vla_training.annotation.base import AnnotatedEpisode, AnnotatedStep, Annotator, step_from_log
from vlm2vla_training.annotation.findings import Finding, find
from vlm2vla_training.curation.motion import motion_sentence
from vlm2vla_training.episodes.base import Episode
from vlm2vla_training.errors import DataError

NAME = "corrections-1"


class CorrectionsAnnotator:
    """Lays the corrections of each episode (the fact that `ingest` of recordings stores) on another annotation.

    Args:
        base: gives the annotation underneath.
        base_name: who made it, for the new one's name.
    """

    def __init__(self, base: Callable[[Episode], AnnotatedEpisode], base_name: str) -> None:
        """Keep the base; nothing is read yet."""
        self._base = base
        self.name = f"{base_name}+{NAME}"

    def annotate(self, episode: Episode) -> AnnotatedEpisode:
        """Annotate one episode; `audit.corrections` tells what became of each correction.

        Raises:
            TrainingError: there is no annotation to lay them on, or a correction does not fit the log.
        """
        under = self._base(episode)
        corrections: list[dict[str, Any]] = episode.facts.get("corrections", [])
        steps = under.steps
        for correction in corrections:
            if correction["problem"] is None:
                steps = laid_on(steps, _step(episode, correction))
        audit = under.audit if steps is under.steps else _audit(episode, under, steps)
        return AnnotatedEpisode(
            episode.key, episode.instruction, self.name, steps, {**audit, "corrections": corrections}
        )


class OnAnnotated:
    """A base for `CorrectionsAnnotator` that was written before."""

    def __init__(self, annotated: dict[str, AnnotatedEpisode]) -> None:
        """Keep annotations by episode key."""
        self._annotated = annotated
        self.name = "+".join(sorted({episode.annotator for episode in annotated.values()})) or "nothing"

    def __call__(self, episode: Episode) -> AnnotatedEpisode:
        """Return the annotation of an episode.

        Raises:
            DataError: it has none.
        """
        try:
            return self._annotated[episode.key]
        except KeyError:
            raise DataError(f"episode {episode.key} has no annotation to lay corrections on") from None


def on_annotator(annotator: Annotator) -> CorrectionsAnnotator:
    """Lay corrections on what `annotator` says."""
    return CorrectionsAnnotator(annotator.annotate, annotator.name)


def laid_on(steps: list[AnnotatedStep], human: AnnotatedStep) -> list[AnnotatedStep]:
    """Put a step over others; every row stays in exactly one step, in order."""
    result: list[AnnotatedStep] = []
    for step in steps:
        if step.last < human.first or step.first > human.last:
            result.append(step)
            continue
        if step.first < human.first:
            result.append(_part(step, step.first, human.first - 1))
        if step.last > human.last:
            result.append(_part(step, human.last + 1, step.last))
    return sorted([*result, human], key=lambda step: step.first)


def _audit(episode: Episode, under: AnnotatedEpisode, steps: list[AnnotatedStep]) -> dict[str, Any]:
    """Judge the new steps. What only the annotator below could find, such as wrong copies, goes on to count."""
    again = [finding.to_json() for finding in find(episode, under.steps)]
    kept = [
        Finding(None, str(one["check"]), bool(one["grave"]), str(one["detail"]))
        for one in under.audit.get("findings", [])
        if one not in again
    ]
    copies = {"copy_error_rate": under.audit.get("copy_error_rate")}
    return {**under.audit, **audit_steps(episode, steps, problems=kept), **copies}


def _part(step: AnnotatedStep, first: int, last: int) -> AnnotatedStep:
    rows = step.actions[first - step.first : last + 1 - step.first]
    return replace(step, first=first, last=last, actions=rows, cut=True)


def _step(episode: Episode, correction: dict[str, Any]) -> AnnotatedStep:
    begin, end = int(correction["first"]), int(correction["last"]) + 1
    if not 0 <= begin < end <= len(episode):
        raise DataError(f"episode {episode.key}: a correction of rows {begin} to {end - 1}; it has {len(episode)}")
    # A policy without the plan stage has no plan to follow; its rows are then told in the annotators' own words.
    before = float(episode.actions[begin - 1, 6]) if begin else None
    plan = correction["motion_plan"] or motion_sentence(np.asarray(episode.actions[begin:end]).tolist(), before)
    step = step_from_log(episode, str(correction["subtask"]), str(plan), str(plan), begin, end)
    return replace(step, author="human")
