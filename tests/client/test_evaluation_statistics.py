"""Intervals against published values and against the definitions that they invert."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm2vla_client.evaluation.statistics import (
    clopper_pearson,
    describe,
    mcnemar,
    paired_difference,
    quantile,
    wilson,
)

counts = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17:857, table I: the score method without continuity correction
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(successes: int, n: int, low: float, high: float) -> None:
    found = wilson(successes, n)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # the same table: the exact method
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (1, 29, 0.0009, 0.1776),
    ],
)
def test_clopper_pearson_as_published(successes: int, n: int, low: float, high: float) -> None:
    found = clopper_pearson(successes, n)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@given(counts)
def test_intervals_hold_the_rate_and_mirror(count: tuple[int, int]) -> None:
    successes, n = count
    for method in (wilson, clopper_pearson):
        found, mirrored = method(successes, n), method(n - successes, n)
        assert 0.0 <= found.low <= successes / n <= found.high <= 1.0
        assert found.low == pytest.approx(1 - mirrored.high, abs=1e-9)
        assert (found.low == 0.0) == (successes == 0) or method is wilson


@given(counts)
def test_clopper_pearson_leaves_the_tails_it_promises(count: tuple[int, int]) -> None:
    successes, n = count
    found = clopper_pearson(successes, n)

    def at_most(count: int, p: float) -> float:
        return math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count + 1))

    if successes < n:
        assert at_most(successes, found.high) == pytest.approx(0.025, abs=1e-6)
    if successes > 0:
        assert 1 - at_most(successes - 1, found.low) == pytest.approx(0.025, abs=1e-6)


@given(counts)
def test_wilson_solves_the_score_equation(count: tuple[int, int]) -> None:
    successes, n = count
    p, z = successes / n, 1.959963984540054
    for bound in (wilson(successes, n).low, wilson(successes, n).high):
        if 0.0 < bound < 1.0:
            assert abs(p - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


def test_nothing_tried_tells_nothing() -> None:
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)
    assert (clopper_pearson(0, 0).low, clopper_pearson(0, 0).high) == (0.0, 1.0)
    assert describe([]) is None
    for method in (wilson, clopper_pearson):
        with pytest.raises(ValueError, match="successes"):
            method(3, 2)


pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80)


@given(pairs)
def test_paired_difference_is_antisymmetric_and_holds_its_estimate(values: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in values], [b for _, b in values]
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert one.difference == pytest.approx(sum(first) / len(first) - sum(second) / len(second))
    assert one.difference == -other.difference
    assert one.interval.low == pytest.approx(-other.interval.high)
    assert -1.0 <= one.interval.low <= one.difference + 1e-12
    assert one.difference - 1e-12 <= one.interval.high <= 1.0
    assert one.p_value == other.p_value


def test_a_clear_difference_excludes_zero_and_none_includes_it() -> None:
    better = paired_difference([True] * 30, [True] * 12 + [False] * 18)
    assert better.interval.low > 0.2 and better.p_value < 0.001
    assert (better.only_first, better.only_second) == (18, 0)
    same = paired_difference([True, False] * 15, [True, False] * 15)
    assert same.interval.low < 0 < same.interval.high and same.p_value == 1.0
    with pytest.raises(ValueError, match="as many"):
        paired_difference([True], [])
    assert paired_difference([], []).interval.low == -1.0


def test_mcnemar_by_hand() -> None:
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0


def test_table_3_statistics() -> None:
    found = describe([4.0, 1.0, 3.0, 2.0])
    assert found is not None
    assert (found.n, found.median, found.mean, found.minimum, found.maximum) == (4, 2.5, 2.5, 1.0, 4.0)
    assert (found.q1, found.q3) == (1.75, 3.25)
    assert found.std == pytest.approx(math.sqrt(5 / 3))
    single = describe([2.0])
    assert single is not None and single.std == 0.0
    assert quantile([1.0, 2.0], 0.5) == 1.5
