"""What became of an operator's edited words in a recording: the rows that followed them, if these were verified.

A `correction` event says what the person wrote. Its words are carried by a later cycle of the same subtask that asked
with the person's subtask and, when the motion plan was edited too, ran under exactly that plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlm2vla_training.errors import DataError

REPLACED = "edited again before it was done"
NOT_VERIFIED = "no cycle with its words was verified as done"
UNCHECKED = "no verifier looked (verifier none)"
STILL = "verified, but no row was executed"
UNSEEN = "a row moved without a picture"
NOT_ARRIVED = "the arm did not arrive where the last row put it"
_NO_VERIFIER = "none"


@dataclass
class _Cycle:
    """One inference cycle while its events are read. begin: number of the first of its executed rows."""

    number: Any
    subtask: str
    begin: int
    plan: str | None = None
    outcome: str = ""
    unseen: bool = False


@dataclass
class _Words:
    """The person's words. motion_plan: None when the policy was to write its own for the new subtask."""

    cycle: Any
    place: Any
    subtask: str
    motion_plan: str | None
    problem: str = NOT_VERIFIED

    def carried_by(self, cycle: _Cycle) -> bool:
        return cycle.subtask == self.subtask and self.motion_plan in (None, cycle.plan)


class CorrectionReader:
    """Follows the events of one recording, in order; `found` has one entry a correction once `close` was called.

    Entries are JSON values: `cycle` of the edit, `subtask`, `motion_plan` (the one its rows followed), `first` and
    `last` of those rows, inclusive, and `problem`: None, or why it is no example (then without a range).
    """

    def __init__(self) -> None:
        """Begin before the first event."""
        self.found: list[dict[str, Any]] = []
        self._steps = 0
        self._cycle: _Cycle | None = None
        self._open: _Words | None = None

    def event(self, event: dict[str, Any]) -> None:
        """Take the next event.

        Raises:
            DataError: a correction without its words.
        """
        kind, cycle = event.get("event"), self._cycle
        if kind == "request" and event.get("stage") == "cycle":
            self._cycle = _Cycle(event.get("cycle"), str(event.get("subtask")), self._steps)
        elif kind == "step":
            self._steps += 1
        elif kind == "correction":
            self._edited(event)
        elif cycle is not None and kind == "plan":
            cycle.plan = str(event.get("motion_plan"))
        elif cycle is not None and kind == "step_unseen":
            cycle.unseen = True
        elif cycle is not None and kind == "chunk":
            cycle.outcome = str(event.get("outcome"))
        elif cycle is not None and kind == "verdict":
            self._judged(cycle, event)

    def close(self) -> None:
        """Settle what is still open at the end of the recording."""
        if self._open is not None:
            self._settle(self._open, self._open.problem)

    def _edited(self, event: dict[str, Any]) -> None:
        subtask, plan = (event.get(name, {}) for name in ("subtask", "motion_plan"))
        try:
            words = _Words(event.get("cycle"), event.get("subtask_index"), str(subtask["to"]), plan["to"])
        except (KeyError, TypeError) as error:
            raise DataError(f"event {event.get('seq')}: a correction without its words ({error!r})") from error
        if self._open is not None:
            self._settle(self._open, REPLACED if self._open.place == words.place else self._open.problem)
        self._open = words

    def _judged(self, cycle: _Cycle, verdict: dict[str, Any]) -> None:
        words = self._open
        if words is None or verdict.get("subtask_index") != words.place or not words.carried_by(cycle):
            return
        words.problem = _problem(cycle, verdict, self._steps)
        if verdict.get("success") is not True:
            return  # the same words may be tried again
        if words.problem == "":
            rows = {"first": cycle.begin, "last": self._steps - 1}
            words.motion_plan = cycle.plan
            self._settle(words, None, rows)
        else:
            self._settle(words, words.problem)

    def _settle(self, words: _Words, problem: str | None, rows: dict[str, int] | None = None) -> None:
        entry = {"cycle": words.cycle, "subtask": words.subtask, "motion_plan": words.motion_plan, "problem": problem}
        self.found.append({**entry, **(rows or {})})
        self._open = None


def _problem(cycle: _Cycle, verdict: dict[str, Any], steps: int) -> str:
    """Why a judged cycle is no example; "" for none."""
    if verdict.get("success") is not True:
        return NOT_VERIFIED
    if verdict.get("verifier") == _NO_VERIFIER:
        return UNCHECKED
    if cycle.unseen:
        return UNSEEN
    if steps == cycle.begin:
        return STILL
    return NOT_ARRIVED if cycle.outcome == "not_arrived" else ""
