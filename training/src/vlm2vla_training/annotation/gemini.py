"""The annotator of the paper (section 3.2, appendix B.1): Gemini says the words, the log gives the numbers.

An answer that cannot be used is asked for once more, naming what is wrong with it; after that the episode goes into
quarantine with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from vlm2vla_schema.gemini import GeminiAnswer
from vlm2vla_schema.prompts import annotation_repair_prompt
from vlm2vla_training.annotation.audit import audit_steps
from vlm2vla_training.annotation.base import AnnotatedEpisode
from vlm2vla_training.annotation.findings import Finding
from vlm2vla_training.annotation.gemini_answer import Reading, read_annotation
from vlm2vla_training.annotation.gemini_request import Question, RequestSettings, image_size, question_about
from vlm2vla_training.episodes.base import Episode


class Asks(Protocol):
    """Whoever carries questions to Gemini; see GeminiCalls.ask."""

    def ask(self, question: Question, sizes: Sequence[tuple[int, int]], repair: tuple[str, str] | None) -> GeminiAnswer:
        """Return an answer; blocks."""
        ...


class GeminiAnnotator:
    """Annotator by Gemini; an Annotator. Safe to use from several threads when `calls` is."""

    def __init__(self, settings: RequestSettings, calls: Asks) -> None:
        """Remember what to ask and through whom."""
        self._settings = settings
        self._calls = calls
        self.name = annotator_name(settings)

    def annotate(self, episode: Episode) -> AnnotatedEpisode:
        """Annotate an episode read with its images; blocks on one request, or two.

        Raises:
            TrainingError: no answer was to be had; see GeminiCalls.ask.
        """
        question = question_about(episode, self._settings)
        sizes = [image_size(data) for _, data in question.frames]
        answer = self._calls.ask(question, sizes, None)
        reading = read_annotation(episode, answer, self._settings.version, self._settings.card())
        first = reading.grave(episode)
        rounds = 1
        if first and reading.again:
            said = (answer.text or "") if answer.outcome == "text" else ""
            answer = self._calls.ask(question, sizes, (said, annotation_repair_prompt([_line(one) for one in first])))
            reading = read_annotation(episode, answer, self._settings.version, self._settings.card())
            rounds = 2
        return AnnotatedEpisode(
            episode.key, episode.instruction, self.name, reading.steps, self._audit(episode, question, reading, rounds)
        )

    def _audit(self, episode: Episode, question: Question, reading: Reading, rounds: int) -> dict[str, Any]:
        asked = {"content": question.content, "rounds": rounds, "frames": len(question.frames), **vars(self._settings)}
        return {**audit_steps(episode, reading.steps, reading.copies, reading.problems), "asked": asked}


def annotator_name(settings: RequestSettings) -> str:
    """The name that annotations carry: model and prompt version."""
    return f"{settings.model} {settings.version}"


def _line(finding: Finding) -> str:
    return finding.detail if finding.step is None else f"step {finding.step + 1}: {finding.detail}"
