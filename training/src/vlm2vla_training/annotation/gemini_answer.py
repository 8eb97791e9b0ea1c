"""What an answer of Gemini's is worth as an annotation: steps with rows of the log, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from vlm2vla_schema.embodiments import WIDOWX, Embodiment
from vlm2vla_schema.errors import validation_details
from vlm2vla_schema.gemini import GeminiAnswer
from vlm2vla_training.annotation.base import AnnotatedStep, step_from_log
from vlm2vla_training.annotation.copies import align, copy_findings
from vlm2vla_training.annotation.findings import Finding, find
from vlm2vla_training.episodes.base import Episode

# B.1's answers mark words with the log's signs: "backward (-dx)", "stays open (1)". A plan is words only (3.1).
_MARKS = re.compile(r"\s*\((?:[+-]?d[xyz]|[01])\)|\s[+-]d[xyz]\b")


class _Step(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    step_description: str
    reasoning: str
    main_movements: str


class _RangedStep(_Step):
    first: int
    last: int


class _CopiedStep(_Step):
    actions: list[list[float]]


_RANGED = TypeAdapter(list[_RangedStep])
_COPIED = TypeAdapter(list[_CopiedStep])


@dataclass(frozen=True)
class Reading:
    """An answer, read.

    Attributes:
        steps: with rows from the log, whatever the answer copied; empty when there is no answer.
        copies: all copied rows one after another; None when none were asked for or none came.
        problems: what is wrong with the answer itself; the audit adds what is wrong with the words.
        again: asking a second time may help.
    """

    steps: list[AnnotatedStep] = field(default_factory=list)
    copies: list[list[float]] | None = None
    problems: list[Finding] = field(default_factory=list)
    again: bool = True

    def grave(self, episode: Episode) -> list[Finding]:
        """Why this annotation cannot be used, the audit's findings included."""
        found = [*self.problems, *(find(episode, self.steps) if self.steps else [])]
        return [finding for finding in found if finding.grave]


def read_annotation(
    episode: Episode, answer: GeminiAnswer, version: str, embodiment: Embodiment = WIDOWX
) -> Reading:
    """Read an answer to the prompt of `version` about rows of `embodiment`. What is wrong becomes a finding."""
    if answer.outcome != "text":
        # A prompt that was refused stays the same when it is sent again; an answer that was stopped may come out else.
        refused = answer.outcome == "blocked" and answer.finish_reason is None
        return Reading(problems=[_no_answer(answer.message)], again=not refused)
    try:
        if version == "b1-paper":
            return _from_copies(episode, _COPIED.validate_json(answer.text or ""), embodiment)
        steps = [_cleaned(_claimed(episode, step)) for step in _RANGED.validate_json(answer.text or "")]
    except ValidationError as error:
        problems = validation_details(error)["problems"][:3]
        said = "; ".join(f"{item['field'] or 'the whole'}: {item['problem']}" for item in problems)
        return Reading(problems=[_no_answer(f"not the JSON that was asked for ({said})")])
    return Reading(steps) if steps else Reading(problems=[_no_answer("an empty list of steps")])


def _no_answer(detail: str) -> Finding:
    return Finding(None, "answer", True, detail)


def _claimed(episode: Episode, step: _RangedStep) -> AnnotatedStep:
    """The step with the range that it claims, be it wrong: the audit says so. Rows beyond the log are not there."""
    begin = min(max(step.first - episode.first_step, 0), len(episode))
    end = min(max(step.last + 1 - episode.first_step, begin), len(episode))
    rows = step_from_log(episode, step.step_description, step.reasoning, step.main_movements, begin, end)
    return replace(rows, first=step.first, last=step.last)


def _from_copies(episode: Episode, steps: Sequence[_CopiedStep], embodiment: Embodiment) -> Reading:
    if not steps:
        return Reading(problems=[_no_answer("an empty list of steps")])
    alignment = align([step.actions for step in steps], episode.actions[:, embodiment.columns])
    placed = [
        _cleaned(step_from_log(episode, step.step_description, step.reasoning, step.main_movements, begin, end))
        for step, (begin, end) in zip(steps, alignment.ranges, strict=True)
    ]
    problems = copy_findings(alignment, [step.step_description for step in steps], len(episode))
    return Reading(placed, [row for step in steps for row in step.actions], problems)


def _cleaned(step: AnnotatedStep) -> AnnotatedStep:
    return replace(
        step,
        step_description=" ".join(step.step_description.split()),
        reasoning=_words(step.reasoning),
        main_movements=_words(step.main_movements),
    )


def _words(text: str) -> str:
    return " ".join(_MARKS.sub("", text).split())
