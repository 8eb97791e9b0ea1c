"""Intervals for shares of right answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 4000


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of right/n; (0, 1) for n = 0."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    found = binomtest(right, n).proportion_ci(0.95, "wilson")
    return 0.0 if right == 0 else float(found.low), 1.0 if right == n else float(found.high)


def ratio_interval(base: Sequence[bool], tuned: Sequence[bool]) -> tuple[float, float] | None:
    """The 95 % bootstrap interval (percentiles) of right(tuned)/right(base) over questions that both were asked.

    Returns:
        None when the base was right too rarely for every resample to have a ratio.
    """
    pairs = np.array([base, tuned], dtype=np.float64)
    random = np.random.default_rng(0)
    places = random.integers(0, pairs.shape[1], (_RESAMPLES, pairs.shape[1]))
    below, above = pairs[0][places].sum(axis=1), pairs[1][places].sum(axis=1)
    if not np.all(below > 0):
        return None
    low, high = np.quantile(above / below, (0.025, 0.975))
    return float(low), float(high)
