"""What an operator who is asked before every chunk (`--confirm`) is shown, and may answer: yes, no, or in words.

Editing words is the point of a policy that speaks: the rows are generated anew from the operator's subtask or motion
plan, pass the same filter, and the edit is recorded as a correction that `curate` can learn from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm2vla_client.progress import printable, row_text
from vlm2vla_client.shadow import Forecast
from vlm2vla_schema.errors import ParseError
from vlm2vla_schema.parsing import parse_motion_plan

MAX_SUBTASK_CHARS = 2000
FORBIDDEN = "  the twin met something that the arm must not touch; only the whole word `yes` moves all the same\n"
QUESTION = "  move? [y]es, [n]o and plan anew, other words for the [s]ubtask{plan}, [q]uit: "


@dataclass(frozen=True)
class Proposal:
    """A chunk that has not moved yet. rows: [n][dx_m, dy_m, dz_m, gripper]; motion_plan: None without that stage.

    forecast: how it went in the twin; None without ``--shadow``.
    """

    subtask: str
    motion_plan: str | None
    rows: Sequence[Sequence[float]]
    forecast: Forecast | None = None


@dataclass(frozen=True)
class Edit:
    """The operator's words instead of the policy's.

    motion_plan: the rows are written for it; None has the policy make its own for ``subtask``.
    """

    subtask: str
    motion_plan: str | None = None


Confirm = Callable[[Proposal], bool | Edit]
"""True moves, False drops the chunk and plans anew, an Edit asks for rows that follow it."""


def confirm_on_terminal(proposal: Proposal) -> bool | Edit:
    """Shows the chunk and asks; anything but a clear answer is no, an end of input or ``q`` ends the episode.

    Where the twin met something forbidden, ``y`` is not clear enough.
    """
    _say(f"  subtask  {printable(proposal.subtask)}\n  plan     {printable(proposal.motion_plan or '-')}\n")
    here = [0.0, 0.0, 0.0]
    for index, row in enumerate(proposal.rows):
        here = [at + step for at, step in zip(here, row[:3], strict=True)]
        _say(f"  row {index:<5}{row_text(row)}   then at {row_text([*here, row[-1]])} from here\n")
    forbidden = proposal.forecast is not None and proposal.forecast.forbidden
    for line in proposal.forecast.lines() if proposal.forecast is not None else ():
        _say(f"  shadow   {printable(line)}\n")
    _say(FORBIDDEN if forbidden else "")
    plans = proposal.motion_plan is not None  # without that stage (-NR) there is no plan to follow
    answer = _line(QUESTION.format(plan=" or the [p]lan" if plans else "")).lower()
    if answer in ("q", "quit"):
        raise KeyboardInterrupt
    if answer in ("s", "subtask"):
        subtask = _line("  subtask: ")
        plan = _line("  motion plan (Enter: the policy's own): ") if plans and subtask else ""
        return _edited(proposal, subtask, plan or None)
    if plans and answer in ("p", "plan"):
        return _edited(proposal, proposal.subtask, _line("  motion plan: "))
    return answer == "yes" or (answer == "y" and not forbidden)


def _edited(proposal: Proposal, subtask: str, plan: str | None) -> bool | Edit:
    """The operator's words, when they are some: empty or overlong ones drop the chunk."""
    try:
        if not subtask or len(subtask) > MAX_SUBTASK_CHARS:
            raise ValueError(f"a subtask has 1..{MAX_SUBTASK_CHARS} characters")
        return Edit(subtask, None if plan is None else parse_motion_plan(plan))
    except (ParseError, ValueError) as problem:
        _say(f"  not used: {problem}\n")
        return False


def _line(question: str) -> str:
    _say(question)
    line = sys.stdin.readline()
    if not line:
        raise KeyboardInterrupt
    return line.strip()


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)
