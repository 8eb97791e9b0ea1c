"""The twin's scripted demonstrator behind the Policy Protocol: the ceiling that a trained policy is compared with.

It reads the simulator, not the picture. Its texts pass through the same parsers as a model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from vlm2vla_client.errors import AnswerUnusableError
from vlm2vla_client.policies.base import (
    Answered,
    Asked,
    CycleEvent,
    PlanArrived,
    PolicyInfo,
    RowArrived,
    Scenario,
    SubtasksAnswer,
)
from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.parsing import parse_actions, parse_motion_plan, parse_subtasks
from vlm2vla_schema.types import Frame


class Demonstrator(Protocol):
    """Words and rows, as text, for the moment the simulator is in."""

    def subtasks(self, task: str) -> str: ...

    def motion_plan(self, subtask: str) -> str: ...

    def actions(self, subtask: str, motion_plan: str) -> str: ...


class ExpertPolicy:
    """A demonstrator that answers like a model.

    Args:
        demonstrator: of the world that the robot moves in.
    """

    name = "expert"

    def __init__(self, demonstrator: Demonstrator) -> None:
        self._demonstrator = demonstrator

    def info(self) -> PolicyInfo:
        """It acts, but only where there is a simulator to read: no physical arm may follow it."""
        return PolicyInfo(name="expert", trained_to_act=False)

    def subtasks(self, frame: Frame, task: str, scenario: Scenario, asked: Asked) -> SubtasksAnswer:
        """The demonstrator's list."""
        text = self._text(lambda: self._demonstrator.subtasks(task))
        try:
            return SubtasksAnswer(parse_subtasks(text), {"raw_text": text})
        except ParseError as error:
            raise _unusable(error) from None

    def cycle(self, frame: Frame, subtask: str, asked: Asked) -> Iterator[CycleEvent]:
        """The demonstrator's plan and rows; it does what it sees fit, whatever plan an operator gives."""
        try:
            plan = parse_motion_plan(asked.motion_plan or self._text(lambda: self._demonstrator.motion_plan(subtask)))
            yield PlanArrived(plan)
            text = self._text(lambda: self._demonstrator.actions(subtask, plan))
            rows = parse_actions(text).rows
        except ParseError as error:
            raise _unusable(error) from None
        for index, row in enumerate(rows):
            yield RowArrived(index, row, asked.episode_id)
        yield Answered(rows, plan, asked.episode_id, {"raw_text": text, "motion_plan": plan})

    @staticmethod
    def _text(ask: Callable[[], str]) -> str:
        try:
            return ask()
        except (KeyError, ValueError, RuntimeError) as error:
            raise AnswerUnusableError(f"the expert has no answer: {error}", code="no_answer") from error

    def alive(self, timeout_s: float) -> bool:
        """Always there."""
        return True

    def close(self) -> None:
        """Nothing to free."""


def _unusable(error: ParseError) -> AnswerUnusableError:
    return AnswerUnusableError(f"the expert's text does not parse: {error}", code="unparseable_output")
