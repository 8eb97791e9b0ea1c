"""The report of a full evaluation: several policies on several suites, in the figures and tables of the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm2vla_client.evaluation import page, plots
from vlm2vla_client.evaluation.report import about, plans_of
from vlm2vla_client.evaluation.statistics import (
    PairedDifference,
    SequentialTest,
    UnpairedDifference,
    paired_difference,
    sequential,
    unpaired_difference,
)
from vlm2vla_client.evaluation.summary import SuiteSummary, Summary
from vlm2vla_client.evaluation.trials import Trial
from vlm2vla_twin.tasks import SUITES

PAPER_TABLE_3_S = {"median": 6.1, "mean": 10.5, "std": 14.3, "q1": 5.0, "q3": 6.7, "minimum": 3.8, "maximum": 48.8}
"""Appendix D.6, Gemma-3-12B on an A100, 30 trials."""
_STATISTICS = {
    "median": "Median", "mean": "Mean (Average)", "std": "Standard Deviation", "q1": "First quartile",
    "q3": "Third quartile", "minimum": "Minimum", "maximum": "Maximum",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One policy's evaluation."""

    label: str
    summary: Summary
    trials: Sequence[Trial]


def write_comparison(
    path: Path,
    runs: Sequence[Run],
    starts: Mapping[str, tuple[str, str]],
    judged_by: str,
    *,
    any_time: bool = False,
) -> Path:
    """Writes one page about several evaluations; differences are from the first run.

    Args:
        starts: suite -> a picture of one of its starts (``data:`` URL) and its caption.
        judged_by: who saw success: ``physics``, or ``a person`` on a real bench.
        any_time: with the sequential test, for evaluations that go on until they tell.
    """
    suites = {run.label: run.summary.suites for run in runs}
    plans = {label: found for label, found in suites.items() if any(suite.plans_judged for suite in found.values())}
    count = sum(name in SUITES for name in _names(runs))
    parts = [
        f"<h1>{_number(len(runs), 'policy', 'policies')} on {_number(count, 'suite', 'suites')}</h1>",
        _tasks(starts),
        "<h2>Success</h2>",
        page.figure(
            plots.success_bars(suites), f"Full score, seen by {judged_by}; whiskers: Wilson, 95 % (as Figs. 5 and 8)."
        ),
        _by_suite(runs, _success_cell),
        "<h2>Scores</h2>",
        page.note("Mean score by the rubrics of D.1, with and without credit for the plan."),
        _by_suite(runs, _score_cell, lambda run: "planning" if _plans(run) else "no planning"),
        *_planning(runs, plans),
        "<h2>Where trials ended</h2>",
        *(page.figure(plots.outcome_bars(found), f"{label}: failures by the first stage not seen.")
          for label, found in suites.items()),
        _stages(runs),
        *_differences(runs),
        *(_sequential(runs) if any_time else ()),
        *_latency(runs),
        "<h2>Runs</h2>",
        *(f"<h3>{page.text(run.label)}</h3>{page.note(about(run.summary))}" for run in runs),
    ]  # fmt: skip
    return page.page(path, "Evaluation", parts)


def differences(first: Sequence[Trial], other: Sequence[Trial]) -> dict[str, PairedDifference]:
    """``other`` minus ``first``, suite by suite, on the seeds that both ran (task texts included in the pairing)."""
    return {name: paired_difference(*pairs) for name in SUITES if (pairs := _shared(name, first, other))[0]}


def unpaired_differences(first: Sequence[Trial], other: Sequence[Trial]) -> dict[str, UnpairedDifference]:
    """``other`` minus ``first`` on the suites that both ran, as if no seed had been shared."""
    found = {}
    for name in SUITES:
        mine = [trial.success for trial in first if trial.suite == name]
        theirs = [trial.success for trial in other if trial.suite == name]
        if mine and theirs:
            found[name] = unpaired_difference((sum(theirs), sum(mine)), (len(theirs), len(mine)))
    return found


def sequential_tests(first: Sequence[Trial], other: Sequence[Trial]) -> dict[str, SequentialTest]:
    """``other`` against ``first``, suite by suite: on the seeds that both ran, else the n-th trial with the n-th."""
    found = {}
    for name in SUITES:
        theirs, mine = _shared(name, first, other)
        if not mine:
            theirs, mine = (
                [trial.success for trial in sorted(some, key=lambda trial: trial.seed) if trial.suite == name]
                for some in (other, first)
            )
            both = min(len(theirs), len(mine))
            theirs, mine = theirs[:both], mine[:both]
        if mine:
            found[name] = sequential(theirs, mine)
    return found


def _shared(name: str, first: Sequence[Trial], other: Sequence[Trial]) -> tuple[list[bool], list[bool]]:
    """Success of ``other`` and of ``first`` on the trials of a suite that both ran, by seed."""
    mine, theirs = (
        {(trial.seed, trial.task, trial.mode): trial.success for trial in some if trial.suite == name}
        for some in (first, other)
    )
    keys = sorted(mine.keys() & theirs.keys())
    return [theirs[key] for key in keys], [mine[key] for key in keys]


# --- parts of the page ------------------------------------------------------------------------------------------------


def _number(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.summary.suites))


def _label(runs: Sequence[Run], name: str) -> str:
    return next(run.summary.suites[name].label for run in runs if name in run.summary.suites)


def _plans(run: Run) -> bool:
    return any(trial.planning for trial in run.trials)


def _tasks(starts: Mapping[str, tuple[str, str]]) -> str:
    if not starts:
        return ""
    pictures = "".join(
        f'<figure><img alt="{page.text(caption)}" src="{url}"><figcaption>{page.text(caption)}</figcaption></figure>'
        for url, caption in starts.values()
    )
    style = "grid-template-columns:repeat(auto-fill,minmax(180px,1fr))"
    return f'<h2>The tasks</h2><div class="pictures" style="{style}">{pictures}</div>'


def _by_suite(
    runs: Sequence[Run], cell: Callable[[SuiteSummary], str], more: Callable[[Run], str] = lambda run: ""
) -> str:
    """A table with a line a suite and a column a policy."""
    rows = []
    for name in _names(runs):
        found = [run.summary.suites.get(name) for run in runs]
        rows.append([_label(runs, name), *("-" if suite is None else cell(suite) for suite in found)])
    heads = [f"{run.label} ({more(run)})" if more(run) else run.label for run in runs]
    return page.table(["suite", *heads], rows, words=True)


def _success_cell(suite: SuiteSummary) -> str:
    return (
        f"{page.percent(suite.success_rate)} ({suite.successes}/{suite.trials}; Wilson {page.span(suite.wilson_95)}, "
        f"Clopper-Pearson {page.span(suite.clopper_pearson_95)})"
    )


def _score_cell(suite: SuiteSummary) -> str:
    return (
        f"{suite.mean_planning_score:.2f} with plan, {suite.mean_non_planning_score:.2f} without, of {suite.max_score}"
    )


def _planning(runs: Sequence[Run], plans: Mapping[str, Mapping[str, SuiteSummary]]) -> list[str]:
    if not plans:
        return []
    planners = [run for run in runs if run.label in plans]
    return [
        "<h2>Task decomposition</h2>",
        page.figure(
            plots.plan_bars(plans), "Plans that name object and destination (D.3; as Figs. 6 and 9); Wilson, 95 %."
        ),
        _by_suite(planners, plans_of),
        page.figure(plots.split_bars(plans), "Planning and execution: was the plan right, and was the task done?"),
    ]


def _stages(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        for suite in run.summary.suites.values():
            stages = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in suite.stages.items())
            kinds = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in suite.failures.items())
            rows.append([run.label, suite.label, str(suite.trials), stages, kinds or "none"])
    table = page.table(["policy", "suite", "trials", "stages reached", "failures"], rows, words=True)
    return f"<details><summary>Stages and failures in numbers</summary>{table}</details>"


def _differences(runs: Sequence[Run]) -> list[str]:
    rows = []
    for run in runs[1:]:
        paired = differences(runs[0].trials, run.trials)
        for name, found in paired.items():
            rows.append([
                run.label, SUITES[name].label, f"{found.n} shared", _points(found.difference),
                f"{100 * found.interval.low:+.1f} to {100 * found.interval.high:+.1f}",
                f"{found.only_first} / {found.only_second}", f"{found.p_value:.3f} McNemar",
            ])  # fmt: skip
        for name, other in unpaired_differences(runs[0].trials, run.trials).items():
            if name not in paired:
                rows.append([
                    run.label, SUITES[name].label, f"{other.n_first} and {other.n_second}", _points(other.difference),
                    f"{100 * other.interval.low:+.1f} to {100 * other.interval.high:+.1f}", "-",
                    f"{other.p_value:.3f} Barnard",
                ])  # fmt: skip
    if len(runs) < 2:
        return []
    head = ["policy", "suite", "trials", "difference", "95 %", "only this / only first", "p"]
    return [
        f"<h2>Differences from {page.text(runs[0].label)}</h2>",
        page.note(
            "On the starts that both ran: Newcombe's interval for paired rates, McNemar's exact test. Where none is "
            "shared: Newcombe's interval for two rates, Barnard's exact test. Two-sided; not corrected for how many."
        ),
        page.table(head, rows, words=True) if rows else page.note("No two runs share a suite."),
    ]


def _sequential(runs: Sequence[Run]) -> list[str]:
    rows = []
    for run in runs[1:]:
        for name, found in sequential_tests(runs[0].trials, run.trials).items():
            told = "not yet" if found.decided_after is None else f"after {found.decided_after} pairs"
            counts = f"{found.only_first} / {found.only_second}"
            rows.append([run.label, SUITES[name].label, str(found.n), counts, f"{found.p_value:.3g}", told])
    if not rows:
        return []
    head = ["policy", "suite", "pairs", "only this / only first", "p at any time", "5 % reached"]
    return [
        "<h3>Looked at after every trial</h3>",
        page.note(
            "A sequential test of the same trials, in the order of their seeds: this p, unlike the one above, may be "
            "looked at as often as you like, and trials may stop when it is small or go on while it is not. Two-sided, "
            "not corrected for how many. Where no start is shared, the n-th trial is paired with the n-th."
        ),
        page.table(head, rows, words=True),
    ]


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"


def _latency(runs: Sequence[Run]) -> list[str]:
    timed = [run for run in runs if run.summary.cycle_s is not None]
    if not timed:
        return []
    rows = []
    for key, name in _STATISTICS.items():
        cells = [page.seconds(getattr(run.summary.cycle_s, key)) for run in timed]
        rows.append([name, *cells, f"{PAPER_TABLE_3_S[key]:.1f}"])
    counts = [str(run.summary.cycle_s.n) for run in timed if run.summary.cycle_s is not None]
    rows.append(["cycles", *counts, "30 trials"])
    rows.append(["sampled again", *(str(run.summary.retried_cycles) for run in timed), "about 10 %"])
    seconds = {run.label: [value for trial in run.trials for value in trial.cycle_seconds] for run in timed}
    return [
        "<h2>Latency</h2>",
        page.figure(plots.latency_boxes(seconds), "One inference cycle: motion plan and rows, retries included (D.6)."),
        page.table(["inference cycle [s]", *(run.label for run in timed), "paper, Table 3 (12B, A100)"], rows),
    ]
