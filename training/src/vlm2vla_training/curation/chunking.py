"""Merging 5 Hz log rows into waypoint rows of a few centimetres (paper, appendix B.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from vlm2vla_training.errors import DataError

Mode = Literal["paper", "flush"]

# Sums of decimal fractions carry float noise near 1e-17; without the tolerance 0.02 + 0.03 could count as over 0.05.
_TOLERANCE_M = 1e-9
_DECIMALS = 3


def chunk_actions(
    actions: Sequence[Sequence[float]],
    single_dim_m: float = 0.025,
    absolute_m: float = 0.05,
    mode: Mode = "paper",
) -> list[list[float]]:
    """Merge consecutive log rows into rows of larger magnitude.

    Before a row is added the running chunk is flushed when an axis would change sign (zero is neutral), the gripper
    changes, or any |sum| would exceed `absolute_m`. A single logged row above `absolute_m` stays alone. This reading
    reproduces the printed example of appendix B.2.

    Args:
        actions: log rows, metres: [dx, dy, dz, gripper] or Bridge's [dx, dy, dz, droll, dpitch, dyaw, gripper];
            rotations are left out, gripper is 0 or 1.
        single_dim_m: only in mode "flush": a chunk is closed as soon as one |sum| reaches this many metres.
        absolute_m: largest |sum| of one axis of a merged row, metres.
        mode: "paper" (the printed example) or "flush".

    Returns:
        Rows [dx_m, dy_m, dz_m, gripper], rounded to 3 decimals after summing, never -0.0.

    Raises:
        DataError: a row of another width, a value that is not finite, or a gripper other than 0 or 1.
    """
    chunks: list[list[float]] = []
    sums: list[float] | None = None
    for index, action in enumerate(actions):
        row = _four_dims(action, index)
        if sums is not None and _must_flush(sums, row, absolute_m):
            chunks.append(_rounded(sums))
            sums = None
        sums = row if sums is None else [*(a + b for a, b in zip(sums[:3], row[:3], strict=True)), row[3]]
        if mode == "flush" and max(abs(value) for value in sums[:3]) >= single_dim_m - _TOLERANCE_M:
            chunks.append(_rounded(sums))
            sums = None
    if sums is not None:
        chunks.append(_rounded(sums))
    return chunks


def _four_dims(action: Sequence[float], index: int) -> list[float]:
    if len(action) not in (4, 7):
        raise DataError(f"log row {index} has {len(action)} values; expected 4 or 7")
    row = [float(action[0]), float(action[1]), float(action[2]), float(action[-1])]
    if not all(math.isfinite(value) for value in row):
        raise DataError(f"log row {index} holds a value that is not finite")
    if row[3] not in (0.0, 1.0):
        raise DataError(f"log row {index} has gripper {row[3]}; expected 0 or 1 (ingest makes it binary)")
    return row


def _must_flush(sums: list[float], row: list[float], absolute_m: float) -> bool:
    if sums[3] != row[3]:
        return True
    pairs = zip(sums[:3], row[:3], strict=True)
    return any(a < 0.0 < b or b < 0.0 < a or abs(a + b) > absolute_m + _TOLERANCE_M for a, b in pairs)


def _rounded(sums: list[float]) -> list[float]:
    # Adding 0.0 turns -0.0 into 0.0.
    return [round(value, _DECIMALS) + 0.0 for value in sums]
