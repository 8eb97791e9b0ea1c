"""What the operator sees while an episode runs.

On a terminal: colours and a spinner that counts the seconds; elsewhere the same lines as plain text. Words that came
from a model or a task are stripped of control characters before they reach the terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.status import Status
from rich.text import Text

from vlm2vla_schema.types import Verdict

STYLE = {"pass": "green", "clip": "yellow", "refuse": "bold red"}


def printable(text: str) -> str:
    """``text`` on one line, with everything removed that a terminal could obey."""
    return "".join(c if c.isprintable() else " " for c in text).strip()


def row_text(row: Sequence[float]) -> str:
    """A row for people: centimetres with a sign, then the gripper."""
    moves = " ".join(f"{100 * value:+5.1f}" for value in row[:3])
    return f"[{moves}] cm {'open' if row[-1] >= 0.5 else 'close'}"


class Progress(Protocol):
    """Told by the loop what happens; must return quickly and never raise."""

    def started(self, task: str, about: str) -> None: ...

    def waiting(self, what: str) -> None: ...

    def quiet(self) -> None: ...

    def subtasks(self, subtasks: Sequence[str]) -> None: ...

    def cycle(self, number: int, subtask_number: int, subtask_count: int, subtask: str) -> None: ...

    def plan(self, motion_plan: str) -> None: ...

    def row(self, index: int, row: Sequence[float]) -> None: ...

    def decision(self, index: int, row: Sequence[float], verdict: str, reasons: Sequence[str]) -> None: ...

    def forecast(self, lines: Sequence[str], forbidden: bool) -> None: ...

    def verdict(self, verdict: Verdict, verified: bool) -> None: ...

    def note(self, text: str) -> None: ...

    def finished(self, good: bool, text: str) -> None: ...


class SilentProgress:
    """For ``--json`` and tests."""

    def started(self, task: str, about: str) -> None:
        """Nothing."""

    def waiting(self, what: str) -> None:
        """Nothing."""

    def quiet(self) -> None:
        """Nothing."""

    def subtasks(self, subtasks: Sequence[str]) -> None:
        """Nothing."""

    def cycle(self, number: int, subtask_number: int, subtask_count: int, subtask: str) -> None:
        """Nothing."""

    def plan(self, motion_plan: str) -> None:
        """Nothing."""

    def row(self, index: int, row: Sequence[float]) -> None:
        """Nothing."""

    def decision(self, index: int, row: Sequence[float], verdict: str, reasons: Sequence[str]) -> None:
        """Nothing."""

    def forecast(self, lines: Sequence[str], forbidden: bool) -> None:
        """Nothing."""

    def verdict(self, verdict: Verdict, verified: bool) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def finished(self, good: bool, text: str) -> None:
        """Nothing."""


class ConsoleProgress:
    """Lines on standard error, so that ``--json`` and pipes keep standard output for themselves."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._began_s = time.monotonic()

    def _say(self, label: str, text: str, style: str = "") -> None:
        line = Text(f"  {label:<9}", style="dim")
        line.append(printable(text), style=style)
        self._console.print(line)

    def _spin(self, text: str) -> None:
        if not self._console.is_terminal:
            return
        if self._status is None:
            self._status = self._console.status(Text(text, style="cyan"), spinner="dots")
            self._status.start()
        else:
            self._status.update(Text(text, style="cyan"))

    def _stop(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._began_s:.1f} s"

    def started(self, task: str, about: str) -> None:
        """The task, and what drives what."""
        self._console.print(Text(printable(task), style="bold"))
        self._console.print(Text(printable(about), style="dim"))

    def waiting(self, what: str) -> None:
        """A spinner until the next line."""
        self._spin(f"{printable(what)} …")

    def quiet(self) -> None:
        """No spinner: somebody is asked. It would write over the answer, and Rich reads markup in a question's [y]."""
        self._stop()

    def subtasks(self, subtasks: Sequence[str]) -> None:
        """The whole list, once."""
        for number, subtask in enumerate(subtasks, start=1):
            self._say(f"{number} of {len(subtasks)}", subtask)

    def cycle(self, number: int, subtask_number: int, subtask_count: int, subtask: str) -> None:
        """A new cycle begins; the seconds count from here."""
        self._began_s = time.monotonic()
        head = Text(f"\nsubtask {subtask_number} of {subtask_count}  ", style="cyan")
        head.append(printable(subtask), style="bold")
        head.append(f"  cycle {number}", style="dim")
        self._console.print(head)

    def plan(self, motion_plan: str) -> None:
        """The motion plan."""
        self._say("plan", motion_plan, "italic")

    def row(self, index: int, row: Sequence[float]) -> None:
        """A row has arrived; it becomes a line of its own when the filter has decided."""
        self._spin(f"row {index} {row_text(row)}")

    def decision(self, index: int, row: Sequence[float], verdict: str, reasons: Sequence[str]) -> None:
        """What the safety filter said about a row."""
        line = Text(f"  row {index:<5}", style="dim")
        line.append(row_text(row))
        line.append(f"  {verdict}", style=STYLE.get(verdict, ""))
        if reasons:
            line.append(f"  {printable(', '.join(reasons))}", style="dim")
        self._console.print(line)

    def forecast(self, lines: Sequence[str], forbidden: bool) -> None:
        """What the twin met when it moved the chunk first."""
        for line in lines:
            self._say("shadow", line, "bold red" if line.startswith("forbidden") else "yellow" if forbidden else "")

    def verdict(self, verdict: Verdict, verified: bool) -> None:
        """The verifier's word, and the cycle's seconds."""
        self._stop()
        word = ("done" if verdict.success else "not yet") if verified else "executed"
        style = "bold green" if verdict.success and verified else "yellow"
        line = Text("  verdict  ", style="dim")
        line.append(word, style=style)
        line.append(f" ({verdict.confidence}) {printable(verdict.reasoning)}")
        line.append(f"  {self._seconds()}", style="dim")
        self._console.print(line)

    def note(self, text: str) -> None:
        """Something out of the ordinary."""
        self._say("note", text, "yellow")

    def finished(self, good: bool, text: str) -> None:
        """The outcome."""
        self._stop()
        self._console.print(Text(f"\n{printable(text)}", style="bold green" if good else "bold red"))
