"""The few statistics that small numbers of trials need; what scipy has is scipy's.

Intervals are two-sided; counts of successes are binomial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A closed interval [low, high]."""

    low: float
    high: float


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval of a success rate, 95 %; [0, 1] when nothing was tried.

    Raises:
        ValueError: not 0 <= successes <= n.
    """
    return _interval(successes, n, "wilson")


def clopper_pearson(successes: int, n: int) -> Interval:
    """The exact interval of Clopper and Pearson, 95 %; arguments and errors as ``wilson``."""
    return _interval(successes, n, "exact")


def _interval(successes: int, n: int, method: str) -> Interval:
    from scipy.stats import binomtest

    _check(successes, n)
    if n == 0:
        return Interval(0.0, 1.0)
    found = binomtest(successes, n).proportion_ci(0.95, method)
    # Rounding may leave a hair beyond the rates that no interval can exclude.
    return Interval(0.0 if successes == 0 else float(found.low), 1.0 if successes == n else float(found.high))


@dataclass(frozen=True)
class PairedDifference:
    """Success of ``first`` minus success of ``second`` on the same seeds.

    Attributes:
        only_first, only_second: seeds where just one of the two succeeded.
        p_value: McNemar's exact test, two-sided: how surprising the discordant seeds are if neither is better.
    """

    n: int
    only_first: int
    only_second: int
    difference: float
    interval: Interval
    p_value: float


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> PairedDifference:
    """Compares two policies trial by trial; interval by Newcombe (1998, method 10), 95 %.

    Raises:
        ValueError: the sequences differ in length.
    """
    n = len(first)
    if len(second) != n:
        raise ValueError(f"expected as many trials on both sides, received {n} and {len(second)}")
    both = sum(1 for a, b in zip(first, second, strict=True) if a and b)
    only_first = sum(1 for a, b in zip(first, second, strict=True) if a and not b)
    only_second = sum(1 for a, b in zip(first, second, strict=True) if b and not a)
    if n == 0:
        return PairedDifference(0, 0, 0, 0.0, Interval(-1.0, 1.0), 1.0)
    neither = n - both - only_first - only_second
    one, two = both + only_first, both + only_second
    p1, p2, w1, w2 = one / n, two / n, wilson(one, n), wilson(two, n)
    phi = _phi(both, only_first, only_second, neither)
    down = _distance(p1 - w1.low, w2.high - p2, phi)
    up = _distance(w1.high - p1, p2 - w2.low, phi)
    difference = (only_first - only_second) / n
    interval = Interval(max(-1.0, difference - down), min(1.0, difference + up))
    return PairedDifference(n, only_first, only_second, difference, interval, mcnemar(only_first, only_second))


@dataclass(frozen=True)
class SequentialTest:
    """What trials say that are looked at one by one, by somebody who may stop at any of them.

    Attributes:
        n: pairs of trials.
        only_first, only_second: pairs in which just one of the two succeeded.
        p_value: valid however often it was looked at: if neither policy is better it ever falls to a level with at
            most that level's chance. It never rises again.
        decided_after: pairs after which it was first at most 0.05; None while it is not.
    """

    n: int
    only_first: int
    only_second: int
    p_value: float
    decided_after: int | None


def sequential(first: Sequence[bool], second: Sequence[bool]) -> SequentialTest:
    """Tests whether one of two policies succeeds more often, after every pair of trials in their given order.

    As in Wald's test of two rates (1947, Sequential Analysis, chapter 6) only pairs count in which one succeeded and
    the other did not: if neither is better, each is a fair coin. What they say is the likelihood ratio against that
    coin of one whose bias may be anything, uniformly (a mixture as Robbins, 1970, has it): a martingale, whose inverse
    is a p-value at every time by Ville's inequality. Two-sided. Pairs need not share a seed; their order must not
    depend on how trials ended.

    Raises:
        ValueError: the sequences differ in length.
    """
    from scipy.special import betaln

    if len(first) != len(second):
        raise ValueError(f"expected as many trials on both sides, received {len(first)} and {len(second)}")
    p_value, decided_after, only_first, only_second = 1.0, None, 0, 0
    for number, (one, two) in enumerate(zip(first, second, strict=True), start=1):
        only_first, only_second = only_first + (one and not two), only_second + (two and not one)
        coin = (only_first + only_second) * math.log(2.0)
        p_value = min(p_value, math.exp(-coin - float(betaln(only_first + 1, only_second + 1))))
        if decided_after is None and p_value <= 0.05:
            decided_after = number
    return SequentialTest(len(first), only_first, only_second, p_value, decided_after)


@dataclass(frozen=True)
class UnpairedDifference:
    """Success rate of ``first`` minus that of ``second``, on trials that have nothing to do with one another.

    Attributes:
        interval: Newcombe (1998, Statistics in Medicine 17:873, method 10), 95 %.
        p_value: Barnard's exact test, two-sided.
    """

    n_first: int
    n_second: int
    difference: float
    interval: Interval
    p_value: float


def unpaired_difference(successes: tuple[int, int], trials: tuple[int, int]) -> UnpairedDifference:
    """Compares two success rates that share no seeds; (first, second) each.

    Raises:
        ValueError: not 0 <= successes <= trials, or a side without trials.
    """
    (one, two), (n1, n2) = successes, trials
    if n1 == 0 or n2 == 0:
        raise ValueError("expected trials on both sides")
    p1, p2, w1, w2 = one / n1, two / n2, wilson(one, n1), wilson(two, n2)
    down, up = math.hypot(p1 - w1.low, w2.high - p2), math.hypot(w1.high - p1, p2 - w2.low)
    difference = p1 - p2
    interval = Interval(max(-1.0, difference - down), min(1.0, difference + up))
    return UnpairedDifference(n1, n2, difference, interval, barnard(successes, trials))


def barnard(successes: tuple[int, int], trials: tuple[int, int]) -> float:
    """The two-sided p-value of Barnard's exact test (pooled score statistic); 1 when all or none succeeded."""
    from scipy.stats import barnard_exact

    (one, two), (n1, n2) = successes, trials
    if one + two in (0, n1 + n2):
        return 1.0
    found = barnard_exact([[one, two], [n1 - one, n2 - two]], alternative="two-sided", pooled=True, n=64)
    return min(1.0, float(found.pvalue))


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of McNemar's test; 1 when no seed tells the two apart."""
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return 1.0 if discordant == 0 else float(binomtest(only_first, discordant).pvalue)


def _phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    n = both + only_first + only_second + neither
    squared = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if squared == 0:
        return 0.0
    determinant = float(both * neither - only_first * only_second)
    if determinant > 0:
        determinant = max(determinant - n / 2, 0.0)
    return determinant / math.sqrt(squared)


def _distance(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


@dataclass(frozen=True)
class Distribution:
    """The summary statistics of Table 3; the standard deviation is the sample's (n - 1)."""

    n: int
    median: float
    mean: float
    std: float
    q1: float
    q3: float
    minimum: float
    maximum: float


def describe(values: Sequence[float]) -> Distribution | None:
    """The statistics of some measurements; None when there are none. Quartiles interpolate linearly."""
    if not values:
        return None
    ordered, n = sorted(values), len(values)
    mean = math.fsum(ordered) / n
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in ordered) / (n - 1)) if n > 1 else 0.0
    return Distribution(
        n, quantile(ordered, 0.5), mean, std, quantile(ordered, 0.25), quantile(ordered, 0.75), ordered[0], ordered[-1]
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of values in ascending order, interpolated linearly."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _check(successes: int, n: int) -> None:
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, received {successes} of {n}")
