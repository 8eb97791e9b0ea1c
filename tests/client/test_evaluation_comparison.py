"""Several policies on one page: what is compared with what, by which test, and that words of a model stay words."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import beta
from test_evaluation import SEED, made_up

from vlm2vla_client.evaluation.comparison import Run, sequential_tests, unpaired_differences, write_comparison
from vlm2vla_client.evaluation.options import PAPER_TRIALS, trials_of
from vlm2vla_client.evaluation.plots import latency_boxes
from vlm2vla_client.evaluation.starts import starts_of
from vlm2vla_client.evaluation.statistics import barnard, mcnemar, sequential, unpaired_difference
from vlm2vla_client.evaluation.summary import LANGUAGE_GROUP, overridden, summarise
from vlm2vla_client.evaluation.trials import Override, Trial


def trials(*, first: int = SEED, n: int = 6, good: int = 3, planning: bool = True) -> list[Trial]:
    """Three suites; the first ``good`` seeds of each succeed."""
    return [
        made_up(suite, first + number, number < good, planning=planning)
        for suite in ("pick_carrot_es", "pick_carrot_zh", "pick_above_picture")
        for number in range(n)
    ]


def run(label: str, some: list[Trial]) -> Run:
    return Run(label, summarise(some, {}), some)


def by_definition(successes: tuple[int, int], n: tuple[int, int]) -> float:
    """Barnard's p: the largest chance, over the common rate, of a table as far from equality as the one seen."""

    def statistic(one: int, two: int) -> float:
        pooled = (one + two) / sum(n)
        spread = pooled * (1 - pooled) * (1 / n[0] + 1 / n[1])
        return abs(one / n[0] - two / n[1]) / math.sqrt(spread) if spread else 0.0

    seen = statistic(*successes)
    far = [(i, j) for i in range(n[0] + 1) for j in range(n[1] + 1) if statistic(i, j) >= seen - 1e-9]

    def chance(p: float) -> float:
        return math.fsum(
            math.comb(n[0], i) * math.comb(n[1], j) * p ** (i + j) * (1 - p) ** (sum(n) - i - j) for i, j in far
        )

    return max(chance(step / 2000) for step in range(1, 2000))


def test_barnard_as_published() -> None:
    # Mehta and Senchaudhuri (2003), conditional versus unconditional exact tests: 0.034 one-sided, both sides equal.
    assert barnard((7, 12), (15, 15)) == pytest.approx(2 * 0.0341, abs=5e-4)


@pytest.mark.parametrize(("successes", "n"), [((3, 9), (10, 12)), ((0, 4), (8, 8)), ((5, 5), (9, 7))])
def test_barnard_by_its_definition(successes: tuple[int, int], n: tuple[int, int]) -> None:
    assert barnard(successes, n) == pytest.approx(by_definition(successes, n), abs=2e-3)


def test_barnard_says_nothing_of_two_equal_extremes() -> None:
    assert barnard((0, 0), (10, 30)) == 1.0 and barnard((10, 30), (10, 30)) == 1.0


def test_two_rates_that_share_no_seed() -> None:
    # Newcombe (1998), Statistics in Medicine 17:873, table II (a), method 10: 56/70 against 48/80.
    found = unpaired_difference((56, 48), (70, 80))
    assert found.difference == pytest.approx(0.2)
    assert (found.interval.low, found.interval.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    with pytest.raises(ValueError, match="both sides"):
        unpaired_difference((0, 0), (0, 4))


def test_trials_are_paired_where_they_share_seeds_and_else_not(tmp_path: Path) -> None:
    first = run("ours", trials(good=6))
    same, other = run("same seeds", trials(good=0)), run("other seeds", trials(first=SEED + 100, good=0))
    page = write_comparison(tmp_path / "a.html", [first, same, other], {}, "physics").read_text(encoding="utf-8")
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    paired = [row for row in rows if "same seeds" in row and "McNemar" in row]
    unpaired = [row for row in rows if "other seeds" in row and "Barnard" in row]
    assert len(paired) == len(unpaired) == 3
    assert all("-100.0 points" in row for row in [*paired, *unpaired])
    assert "6 shared" in paired[0] and "6 and 6" in unpaired[0]
    assert set(unpaired_differences(first.trials, other.trials)) == {
        "pick_carrot_es", "pick_carrot_zh", "pick_above_picture",
    }  # fmt: skip


def chance_of_ever_reaching_5_percent(p_of: Callable[[int, int], float], coins: int) -> float:
    """Exactly, over all ways in which fair coins may fall, when ``p_of`` is looked at after each."""
    going, reached = {(0, 0): 1.0}, 0.0
    for _ in range(coins):
        then: dict[tuple[int, int], float] = {}
        for (heads, tails), weight in going.items():
            for to in ((heads + 1, tails), (heads, tails + 1)):
                if p_of(*to) <= 0.05:
                    reached += weight / 2
                else:
                    then[to] = then.get(to, 0.0) + weight / 2
        going = then
    return reached


def test_looking_after_every_trial_is_allowed_to_the_sequential_test_and_not_to_mcnemars() -> None:
    now = cache(lambda one, two: 0.5 ** (one + two) / beta(one + 1, two + 1))
    assert 0.01 < chance_of_ever_reaching_5_percent(now, 120) < 0.05
    assert chance_of_ever_reaching_5_percent(cache(mcnemar), 120) > 0.08


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60))
def test_the_sequential_p_by_its_definition(pairs: list[tuple[bool, bool]]) -> None:
    found = sequential([one for one, _ in pairs], [two for _, two in pairs])
    smallest, one, two, reached = 1.0, 0, 0, None
    for number, (first, second) in enumerate(pairs, start=1):
        one, two = one + (first > second), two + (second > first)
        smallest = min(smallest, 0.5 ** (one + two) / beta(one + 1, two + 1))
        reached = number if reached is None and smallest <= 0.05 else reached
    assert found.p_value == pytest.approx(smallest)
    assert (found.n, found.only_first, found.only_second, found.decided_after) == (len(pairs), one, two, reached)


def test_sequential_trials_are_taken_by_seed_whatever_ended_first(tmp_path: Path) -> None:
    first, other = trials(n=20, good=20), trials(n=20, good=0)
    assert {found.decided_after for found in sequential_tests(first, other).values()} == {8}
    elsewhere = trials(first=SEED + 100, n=12, good=10)[::-1]
    for found in sequential_tests(first[::-1], elsewhere).values():
        assert (found.n, found.only_first, found.only_second, found.decided_after) == (12, 0, 2, None)
    runs = [run("ours", first), run("other", other)]
    path = tmp_path / "a.html"
    assert "after 8 pairs" in write_comparison(path, runs, {}, "physics", any_time=True).read_text(encoding="utf-8")
    assert "p at any time" not in write_comparison(path, runs, {}, "physics").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="as many trials"):
        sequential([True], [])


def test_the_page_is_one_file_with_pictures_and_obeys_nobody(tmp_path: Path) -> None:
    hostile = "</td><script>alert(1)</script>\x1b[2J"
    runs = [run("ours", trials()), run(hostile, trials(good=1, planning=False))]
    starts = starts_of(runs[0].trials)
    page = write_comparison(tmp_path / "a.html", runs, starts, "physics").read_text(encoding="utf-8")
    assert "<script" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    assert page.count("data:image/jpeg;base64,") == 3, "a start of each task"
    # success, plans, planning against execution, where trials ended (one a policy), latency
    assert page.count("data:image/svg+xml;base64,") == 6
    assert "6.1" in page and "48.8" in page, "the paper's Table 3 stands beside ours"
    assert "2 policies on 3 suites" in page


def test_a_policy_without_plans_is_not_judged_by_them() -> None:
    summary = run("reactive", trials(planning=False)).summary
    assert all(suite.plans_judged == 0 and suite.plan_and_success == {} for suite in summary.suites.values())


def test_plans_and_deeds_are_told_apart() -> None:
    some = [
        made_up(seed=SEED + number, success=done, plan_credit=right)
        for number, (right, done) in enumerate([(True, True), (True, False), (True, False), (False, True)])
    ]
    suite = summarise(some, {}).suites["pick_carrot_es"]
    assert suite.plan_and_success == {"right_success": 1, "right_failure": 2, "wrong_success": 1}


def test_both_figures_are_kept_when_a_person_corrects_the_keywords(tmp_path: Path) -> None:
    measured = trials(good=0)
    overrides = {("pick_carrot_es", SEED): Override("pick_carrot_es", SEED, True, "a reader", "'la naranja'")}
    scored = overridden(measured, overrides)
    summary = summarise(scored, {}, 1, measured)
    for name in ("pick_carrot_es", LANGUAGE_GROUP):
        suite = summary.suites[name]
        assert (suite.plans_right, suite.plans_right_by_keywords) == (1, 0)
        assert suite.mean_score > suite.mean_score_by_keywords == 0.0
    path = write_comparison(tmp_path / "a.html", [Run("ours", summary, scored)], {}, "physics")
    assert "1/6 (keywords alone 0)" in path.read_text(encoding="utf-8")


def test_the_papers_numbers_of_trials() -> None:
    assert trials_of("paper") == PAPER_TRIALS == 30 and trials_of("7") == 7
    with pytest.raises(ValueError):
        trials_of("many")


def test_cycles_too_short_for_the_clock_are_drawn_all_the_same() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latency_boxes({"expert": [0.0, 0.0], "random": [0.0]}).startswith("data:image/svg+xml")
