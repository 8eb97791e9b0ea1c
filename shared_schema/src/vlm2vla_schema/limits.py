"""The limits that parser and grammar share (docs/protocol.md); changing one here changes both."""

from __future__ import annotations

import math
import string

ROW_WIDTH = 4
MAX_ROWS = 32
MAX_ROW_TRANSLATION_M = 0.10
DECIMALS = 3
"""Decimals of canonical action text: millimetres (appendix B.2)."""

MAX_SUBTASKS = 20
MAX_SUBTASK_CHARS = 80
PUNCTUATION = string.punctuation
"""No subtask consists of these alone, and none in canonical text begins with one: a model that takes the comma between
two strings for a string writes `', '`, and an arm would be asked to do that."""
MAX_MOTION_PLAN_CHARS = 1500
MAX_REASONING_CHARS = 500
CONFIDENCES: tuple[str, ...] = ("High", "Medium", "Low")


def check_row_limits(max_row_translation_m: float, max_rows: int) -> None:
    """Raise ValueError for limits that no parser or grammar can be built from."""
    if not math.isfinite(max_row_translation_m) or max_row_translation_m <= 0:
        raise ValueError(f"max_row_translation_m must be finite and above 0, got {max_row_translation_m}")
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
