"""The arithmetic of `verify-report`: rates, calibration and thresholds over scored pairs.

A pair is a mapping with `done` (what is true), `sort` (see `verify.Pair`), `margin_nat` = ln p("done") - ln
p("not done"), and `episode_key`. It counts as said to be done when its margin is above the threshold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Pairs: TypeAlias = Sequence[Mapping[str, Any]]
BINS = 10


def figures(pairs: Pairs, margin_nat: float) -> dict[str, Any]:
    """Rates at one threshold; a rate over no pairs is None.

    Returns:
        balanced_accuracy: mean of accepted (of what is done) and rejected (of what is not). false_success: the share of
        what is not done that is said to be. rejected: by sort of negative.
    """
    said = np.array([pair["margin_nat"] > margin_nat for pair in pairs], dtype=bool)
    done = np.array([pair["done"] for pair in pairs], dtype=bool)
    sorts = np.array([pair["sort"] for pair in pairs])
    accepted, false_success = _rate(said[done]), _rate(said[~done])
    balanced = None if accepted is None or false_success is None else round((accepted + 1 - false_success) / 2, 4)
    return {
        "pairs": len(pairs),
        "done": int(done.sum()),
        "balanced_accuracy": balanced,
        "accepted": accepted,
        "false_success": false_success,
        "rejected": {sort: _rate(~said[sorts == sort]) for sort in sorted(set(sorts[~done].tolist()))},
        "negatives": {sort: int((sorts == sort).sum()) for sort in sorted(set(sorts[~done].tolist()))},
    }


def _rate(flags: NDArray[np.bool_]) -> float | None:
    return round(float(flags.mean()), 4) if len(flags) else None


def probabilities(pairs: Pairs) -> NDArray[np.float64]:
    """p("done") of each pair, of the two answers only."""
    margins = np.array([pair["margin_nat"] for pair in pairs], dtype=np.float64)
    found: NDArray[np.float64] = 0.5 * (1 + np.tanh(margins / 2))
    return found


def reliability(pairs: Pairs) -> dict[str, Any]:
    """Whether p("done") is how often it is: bins of equal width, and the expected calibration error, the mean distance
    between the two, weighted by pairs.
    """
    said = probabilities(pairs)
    done = np.array([pair["done"] for pair in pairs], dtype=np.float64)
    place = np.minimum((said * BINS).astype(int), BINS - 1)
    table, error = [], 0.0
    for number in range(BINS):
        inside = place == number
        if not inside.any():
            continue
        mean, share = float(said[inside].mean()), float(done[inside].mean())
        error += abs(mean - share) * float(inside.mean())
        pairs_inside = int(inside.sum())
        table.append({"from": number / BINS, "pairs": pairs_inside, "said": round(mean, 4), "done": round(share, 4)})
    return {"expected_calibration_error": round(error, 4), "table": table}


def halves(pairs: Pairs) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Two halves by episode, which depend on the keys alone: one to choose a threshold on, one to measure it on."""
    keys = sorted({str(pair["episode_key"]) for pair in pairs}, key=lambda key: hashlib.sha256(key.encode()).digest())
    first = set(keys[: len(keys) // 2])
    return [pair for pair in pairs if pair["episode_key"] in first], [
        pair for pair in pairs if pair["episode_key"] not in first
    ]


def at_most(pairs: Pairs, false_success: float) -> float:
    """The least margin, in nat, at which at most this share of what is not done is said to be done."""
    wrong = np.sort([pair["margin_nat"] for pair in pairs if not pair["done"]])[::-1]
    allowed = int(false_success * len(wrong))
    return float(wrong[allowed]) if allowed < len(wrong) else float("-inf")


def curve(pairs: Pairs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False success and accepted share at every threshold, from the strictest on."""
    order = np.argsort([-pair["margin_nat"] for pair in pairs], kind="stable")
    done = np.array([pair["done"] for pair in pairs], dtype=np.float64)[order]
    accepted, wrong = np.cumsum(done) / max(done.sum(), 1), np.cumsum(1 - done) / max((1 - done).sum(), 1)
    return wrong, accepted
