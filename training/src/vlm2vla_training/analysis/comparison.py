"""Predicted rows against logged rows of one step: direction, end point, gripper.

Rows are [dx_m, dy_m, dz_m, gripper] in the robot's base frame, merged as in B.2 on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm2vla_training.annotation.findings import said_directions
from vlm2vla_training.curation.motion import directions, summed

Rows = Sequence[Sequence[float]]
# B.2's threshold: below it an axis has no direction.
THRESHOLD_M = 0.025


def compare(predicted: Rows, logged: Rows, gripper_before: float) -> dict[str, Any]:
    """Facts of one step.

    Args:
        predicted, logged: rows of width 4.
        gripper_before: the gripper's command before the step, 1 open.

    Returns:
        `axes_agree`: of 3, how many have the same direction (positive, negative, below 2.5 cm);
        `end_error_mm`: distance between the end points; `still_error_mm`: the same for rows that do not move;
        `gripper`: "match" (same events in the same order), "missed" (too few), "extra" (too many) or "other";
        `gripper_rows`: for a match, predicted minus logged row number of each event.
    """
    ours, theirs = summed(predicted), summed(logged)
    agree = sum(_sign(a) == _sign(b) for a, b in zip(ours, theirs, strict=True))
    mine, wanted = gripper_events(predicted, gripper_before), gripper_events(logged, gripper_before)
    same = [event for _, event in mine] == [event for _, event in wanted]
    kind = "match" if same else "missed" if len(mine) < len(wanted) else "extra" if len(mine) > len(wanted) else "other"
    return {
        "axes_agree": agree,
        "end_error_mm": round(1000 * float(np.linalg.norm(np.subtract(ours, theirs))), 2),
        "still_error_mm": round(1000 * float(np.linalg.norm(theirs)), 2),
        "gripper": kind,
        "gripper_rows": [a - b for (a, _), (b, _) in zip(mine, wanted, strict=True)] if same else [],
    }


def gripper_events(rows: Rows, before: float) -> list[tuple[int, bool]]:
    """(row number, True for an opening) of every change of the gripper's command."""
    events = []
    for number, row in enumerate(rows):
        if row[3] != before:
            events.append((number, row[3] > before))
        before = row[3]
    return events


def plan_agreement(plan: str, logged: Rows) -> dict[str, int]:
    """Words of a plan against the log: of the axes that move beyond 2.5 cm, how many are named rightly, and how many
    with the opposite word.
    """
    said = said_directions(plan)
    wanted = directions(summed(logged), THRESHOLD_M)
    opposite = {"forward": "backward", "left": "right", "up": "down"}
    opposite |= {value: key for key, value in opposite.items()}
    named = sum(word in said for word in wanted)
    wrong = sum(opposite[word] in said and word not in said for word in wanted)
    return {"axes": len(wanted), "named": named, "opposite": wrong}


def _sign(value_m: float) -> int:
    return 0 if abs(value_m) <= THRESHOLD_M else 1 if value_m > 0 else -1


def aggregate(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures over steps. Rates of what was compared name how many: rows that do not parse have no end point."""
    parsed = [line for line in lines if line["comparison"] is not None]
    compared = [line["comparison"] for line in parsed]
    plans = [line["plan_agreement"] for line in lines if line["plan_agreement"] is not None]
    asked = [line for line in lines if line["plan_parsed"] is not None]
    offsets = [abs(rows) for one in compared for rows in one["gripper_rows"]]
    result: dict[str, Any] = {
        "steps": len(lines),
        "parse_rate": _rate(len(parsed), len(lines)),
        "plan_parse_rate": _rate(sum(bool(line["plan_parsed"]) for line in asked), len(asked)),
        "direction_agreement": _rate(sum(one["axes_agree"] for one in compared), 3 * len(compared)),
        "all_axes_agree": _rate(sum(one["axes_agree"] == 3 for one in compared), len(compared)),
        "end_error_mm": _spread([one["end_error_mm"] for one in compared]),
        "still_error_mm": _spread([one["still_error_mm"] for one in compared]),
        "gripper": {
            kind: sum(one["gripper"] == kind for one in compared) for kind in ("match", "missed", "extra", "other")
        },
        "gripper_events": len(offsets),
        "gripper_rows_off": _spread([float(value) for value in offsets]),
        "plan_axes_named": _rate(sum(one["named"] for one in plans), sum(one["axes"] for one in plans)),
        "plan_axes_opposite": _rate(sum(one["opposite"] for one in plans), sum(one["axes"] for one in plans)),
    }
    return result


def _rate(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, median, 90th percentile and largest; None of nothing."""
    if not values:
        return None
    middle, high = np.quantile(values, [0.5, 0.9])
    found = {"mean": np.mean(values), "median": middle, "p90": high, "max": max(values)}
    return {name: round(float(value), 2) for name, value in found.items()}
