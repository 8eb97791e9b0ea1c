"""Action rows that an annotator copied (B.1) -> the row ranges of the log that they stand for.

The copy is evidence of where a step begins and ends, never a source of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vlm2vla_training.annotation.findings import Finding

# A copy with more wrong rows than this share is not worth aligning: the annotator was not looking at this log.
MAX_WRONG = 0.10
_THOUSANDTHS = 1000

Copies = Sequence[Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Alignment:
    """Where copied steps lie in a log of T rows.

    Attributes:
        ranges: [begin, end) of each step, counted from the log's first row; together they cover 0..T.
        wrong: rows missing in the copy, surplus in it, or different.
        unsure: steps whose beginning no exactly copied row fixes.
    """

    ranges: list[tuple[int, int]]
    wrong: int
    unsure: list[int]


def align(copies: Copies, rows: NDArray[np.float64]) -> Alignment:
    """Lay copied rows over the log.

    Args:
        copies: for each step its rows, such as [dx_m, dy_m, dz_m, gripper]; rows of another width match nothing.
        rows: [T, W] of the log. Both are compared to three decimals (millimetres, milliradians), as the log was shown.
    """
    mine = [_whole(row) for step in copies for row in step]
    theirs = [_whole(row) for row in rows]
    place: dict[int, int] = {}
    wrong = 0
    codes = SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes()
    for tag, begin, end, log_begin, log_end in codes:
        if tag == "equal":
            place.update(zip(range(begin, end), range(log_begin, log_end), strict=True))
        else:
            wrong += max(end - begin, log_end - log_begin)
    bounds, unsure, start = [0], [], 0
    for step, rows_of_step in enumerate(copies[:-1], start=1):
        start += len(rows_of_step)
        candidates = {place[start]} if start in place else set()
        candidates |= {place[start - 1] + 1} if start - 1 in place else set()
        if len(candidates) != 1:  # nothing near is exact, or rows are missing just here: of which step is not said
            unsure.append(step)
        bounds.append(min(candidates, default=_between(start, codes)))
    bounds.append(len(rows))
    return Alignment(list(pairwise(bounds)), wrong, unsure)


def copy_findings(alignment: Alignment, steps: Sequence[str], rows: int) -> list[Finding]:
    """Say what is wrong with a copy: grave when a step cannot be placed, or over `MAX_WRONG` of the rows are wrong."""
    findings = [
        Finding(step, "copies", True, f"the copied rows around the beginning of '{steps[step]}' are not in the log")
        for step in alignment.unsure
    ]
    if alignment.wrong:
        detail = f"{alignment.wrong} copied rows are missing, surplus or differ from the {rows} rows of the log"
        findings.append(Finding(None, "copies", alignment.wrong > MAX_WRONG * rows, detail))
    return findings


def _whole(row: Sequence[float] | NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(round(float(value) * _THOUSANDTHS) for value in row)


def _between(place: int, codes: Sequence[tuple[str, int, int, int, int]]) -> int:
    """A position inside a stretch that differs: as far into the log's part as into the copy's."""
    for _, begin, end, log_begin, log_end in codes:
        if begin <= place < end:
            return log_begin + round((place - begin) * (log_end - log_begin) / (end - begin))
    return codes[-1][4] if codes else 0
