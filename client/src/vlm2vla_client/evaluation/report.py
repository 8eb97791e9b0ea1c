"""The report of one evaluation as a single HTML page. Everything that a model wrote is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlm2vla_client.evaluation import page, plots
from vlm2vla_client.evaluation.summary import LANGUAGE_GROUP, SuiteSummary, Summary
from vlm2vla_client.evaluation.trials import Trial

REPORT = "report.html"
SUCCESS_CAPTION = "Full score by physics; whiskers: Wilson, 95 %."


def write_report(folder: Path, summary: Summary, trials: Sequence[Trial]) -> Path:
    """Writes ``report.html`` for one evaluation and returns its path."""
    parts = [
        f"<h1>{page.text(summary.model)} on {len(summary.suites)} suite{'s' if len(summary.suites) > 1 else ''}</h1>",
        page.note(about(summary)),
        _facts(summary),
        "<h2>Success</h2>",
        page.figure(plots.success_bars({summary.model: summary.suites}), SUCCESS_CAPTION),
        _suite_table(summary.suites),
        "<h2>Where trials ended</h2>",
        page.figure(plots.outcome_bars(summary.suites), "Failures by the first stage that physics never saw."),
        _latency(summary, trials),
        "<h2>Trials</h2>",
        _trial_table(trials),
    ]
    return page.page(folder / REPORT, f"Evaluation of {summary.model}", parts)


# --- parts of a page --------------------------------------------------------------------------------------------------


def about(summary: Summary) -> str:
    """Everything that a published number must name, in a line."""
    seeds = sorted({seed for suite in summary.suites.values() for seed in suite.seeds})
    span = f"{seeds[0]}..{seeds[-1]}" if seeds else "none"
    return (
        f"policy {summary.policy}, model {summary.model}, verifier {summary.verifier}, mode {summary.mode}, "
        f"{summary.trials} trials, seeds {span} ({', '.join(summary.splits)}), "
        f"commit {', '.join(commit[:12] for commit in summary.commits) or 'unknown'}"
    )


def _facts(summary: Summary) -> str:
    server = summary.server
    facts = {
        "trials": str(summary.trials),
        "policy": summary.policy,
        "model": summary.model,
        "model hash": str(server.get("hash") or server.get("base_hash") or "-")[:16],
        "verifier": summary.verifier,
        "seeds": ", ".join(summary.splits),
        "engine": str(server.get("engine", "-")),
        "cycles sampled again": str(summary.retried_cycles),
        "trials restarted": str(summary.restarted_trials),
        "rows refused": ", ".join(f"{name} {count}" for name, count in summary.refusals.items()) or "none",
        "plans judged by hand": str(summary.overrides),
        "processor": str(summary.machine.get("processor", "-")),
    }
    return page.facts(facts)


def _suite_table(suites: Mapping[str, SuiteSummary]) -> str:
    rows = []
    for name, suite in suites.items():
        rows.append([
            suite.label, f"{suite.successes}/{suite.trials}", page.percent(suite.success_rate),
            page.span(suite.wilson_95), f"{suite.mean_score:.2f} of {suite.max_score}", plans_of(suite),
            f"{suite.mean_cycles:.1f}",
            f"{suite.verified_without_success} / {suite.success_without_verified}",
            "all languages" if name == LANGUAGE_GROUP else "; ".join(suite.tasks),
        ])  # fmt: skip
    head = ["suite", "successes", "rate", "95 %", "mean score", "plans right", "cycles",
            "verified, no success / success, not verified", "task"]  # fmt: skip
    return page.table(head, rows)


def plans_of(suite: SuiteSummary) -> str:
    """How many plans were right (D.3); where a person's verdicts changed the count, the keywords' beside it."""
    if not suite.plans_judged:
        return "-"
    found = f"{suite.plans_right}/{suite.plans_judged}"
    by_keywords = suite.plans_right_by_keywords
    return found if by_keywords == suite.plans_right else f"{found} (keywords alone {by_keywords})"


def _latency(summary: Summary, trials: Sequence[Trial]) -> str:
    if summary.cycle_s is None:
        return ""
    seconds = [value for trial in trials for value in trial.cycle_seconds]
    rows = [[name, page.seconds(getattr(summary.cycle_s, key)), page.seconds(getattr(summary.verify_s, key, None))]
            for name, key in (("Median", "median"), ("Mean (Average)", "mean"), ("Standard Deviation", "std"),
                              ("First quartile", "q1"), ("Third quartile", "q3"), ("Minimum", "minimum"),
                              ("Maximum", "maximum"))]  # fmt: skip
    rows.append(["N", str(summary.cycle_s.n), str(summary.verify_s.n if summary.verify_s else 0)])
    return (
        "<h2>Latency</h2>"
        + page.figure(
            plots.latency_histogram(seconds, summary.cycle_s), "Motion plan and rows, wall time, retries included."
        )
        + page.table(["statistic", "inference cycle [s]", "verdict [s]"], rows)
    )


def _trial_table(trials: Sequence[Trial]) -> str:
    rows = [
        [
            trial.suite, str(trial.seed), trial.task, f"{trial.score}/{trial.max_score}",
            "success" if trial.success else (trial.failure or "").replace("_", " "), trial.outcome, str(trial.cycles),
            f"{trial.seconds:.1f}", " · ".join(trial.subtasks)[:300],
        ]
        for trial in sorted(trials, key=lambda trial: trial.key)  # trials at once end in any order
    ]  # fmt: skip
    head = ["suite", "seed", "task", "score", "physics", "loop", "cycles", "seconds", "subtasks"]
    return f"<details><summary>{len(trials)} trials</summary>{page.table(head, rows)}</details>"
