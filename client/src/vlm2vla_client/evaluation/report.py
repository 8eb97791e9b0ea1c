"""Reports as single HTML pages: one evaluation, or several side by side. Everything that a model wrote is escaped."""

from __future__ import annotations

import html
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from vlm2vla_client.evaluation import plots
from vlm2vla_client.evaluation.statistics import Interval, PairedDifference, paired_difference
from vlm2vla_client.evaluation.summary import LANGUAGE_GROUP, SuiteSummary, Summary
from vlm2vla_client.evaluation.trials import Trial
from vlm2vla_twin.tasks import SUITES

REPORT = "report.html"


def write_report(folder: Path, summary: Summary, trials: Sequence[Trial]) -> Path:
    """Writes ``report.html`` for one evaluation and returns its path."""
    parts = [
        f"<h1>{_text(summary.model)} on {len(summary.suites)} suite{'s' if len(summary.suites) > 1 else ''}</h1>",
        f'<p class="soft">{_text(_about(summary))}</p>',
        _facts(summary),
        "<h2>Success</h2>",
        _figure(plots.success_bars({summary.model: summary.suites}), "Full score by physics; whiskers: Wilson, 95 %."),
        _suite_table(summary.suites),
        "<h2>Where trials ended</h2>",
        _figure(plots.outcome_bars(summary.suites), "Failures by the first stage that physics never saw."),
        _latency(summary, trials),
        "<h2>Trials</h2>",
        _trial_table(trials),
    ]
    return _page(folder / REPORT, f"Evaluation of {summary.model}", parts)


@dataclass(frozen=True)
class Run:
    """One evaluation in a comparison."""

    label: str
    summary: Summary
    trials: Sequence[Trial]


def write_comparison(path: Path, runs: Sequence[Run]) -> Path:
    """Writes a page with several evaluations side by side; differences seed by seed, from the first run."""
    parts = [
        f"<h1>{len(runs)} evaluations</h1>",
        _figure(
            plots.success_bars({run.label: run.summary.suites for run in runs}),
            "Full score by physics; whiskers: Wilson, 95 %.",
        ),
        "<h2>Success rates</h2>",
        _rates_table(runs),
        f"<h2>Differences from {_text(runs[0].label)}</h2>",
        '<p class="soft">On the seeds that both ran. Interval: Newcombe, 95 %. p: McNemar, exact, two-sided.</p>',
        _difference_table(runs),
        "<h2>Runs</h2>",
        *(f"<h3>{_text(run.label)}</h3><p class='soft'>{_text(_about(run.summary))}</p>" for run in runs),
    ]
    return _page(path, "Comparison of evaluations", parts)


def differences(first: Sequence[Trial], other: Sequence[Trial]) -> dict[str, PairedDifference]:
    """``other`` minus ``first``, suite by suite, on the seeds that both ran (task texts included in the pairing)."""
    mine = {(trial.suite, trial.seed, trial.task, trial.mode): trial.success for trial in first}
    theirs = {(trial.suite, trial.seed, trial.task, trial.mode): trial.success for trial in other}
    found = {}
    for name in SUITES:
        shared = sorted(key for key in mine.keys() & theirs.keys() if key[0] == name)
        if shared:
            found[name] = paired_difference([theirs[key] for key in shared], [mine[key] for key in shared])
    return found


# --- parts of a page --------------------------------------------------------------------------------------------------


def _about(summary: Summary) -> str:
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
    items = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _suite_table(suites: Mapping[str, SuiteSummary]) -> str:
    rows = []
    for name, suite in suites.items():
        plans = f"{suite.plans_right}/{suite.plans_judged}" if suite.plans_judged else "-"
        rows.append([
            suite.label, f"{suite.successes}/{suite.trials}", _percent(suite.success_rate), _span(suite.wilson_95),
            f"{suite.mean_score:.2f} of {suite.max_score}", plans, f"{suite.mean_cycles:.1f}",
            f"{suite.verified_without_success} / {suite.success_without_verified}",
            "all languages" if name == LANGUAGE_GROUP else "; ".join(suite.tasks),
        ])  # fmt: skip
    head = ["suite", "successes", "rate", "95 %", "mean score", "plans right", "cycles",
            "verified, no success / success, not verified", "task"]  # fmt: skip
    return _table(head, rows)


def _latency(summary: Summary, trials: Sequence[Trial]) -> str:
    if summary.cycle_s is None:
        return ""
    seconds = [value for trial in trials for value in trial.cycle_seconds]
    rows = [[name, _seconds(getattr(summary.cycle_s, key)), _seconds(getattr(summary.verify_s, key, None))]
            for name, key in (("Median", "median"), ("Mean (Average)", "mean"), ("Standard Deviation", "std"),
                              ("First quartile", "q1"), ("Third quartile", "q3"), ("Minimum", "minimum"),
                              ("Maximum", "maximum"))]  # fmt: skip
    rows.append(["N", str(summary.cycle_s.n), str(summary.verify_s.n if summary.verify_s else 0)])
    return (
        "<h2>Latency</h2>"
        + _figure(
            plots.latency_histogram(seconds, summary.cycle_s), "Motion plan and rows, wall time, retries included."
        )
        + _table(["statistic", "inference cycle [s]", "verdict [s]"], rows)
    )


def _trial_table(trials: Sequence[Trial]) -> str:
    rows = [
        [
            trial.suite, str(trial.seed), trial.task, f"{trial.score}/{trial.max_score}",
            "success" if trial.success else (trial.failure or "").replace("_", " "), trial.outcome, str(trial.cycles),
            f"{trial.seconds:.1f}", " · ".join(trial.subtasks)[:300],
        ]
        for trial in trials
    ]  # fmt: skip
    head = ["suite", "seed", "task", "score", "physics", "loop", "cycles", "seconds", "subtasks"]
    return f"<details><summary>{len(trials)} trials</summary>{_table(head, rows)}</details>"


def _rates_table(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.summary.suites))
    rows = []
    for name in names:
        cells = []
        for run in runs:
            suite = run.summary.suites.get(name)
            cells.append(
                "-"
                if suite is None
                else f"{_percent(suite.success_rate)} ({suite.successes}/{suite.trials}; {_span(suite.wilson_95)})"
            )
        label = next(run.summary.suites[name].label for run in runs if name in run.summary.suites)
        rows.append([label, *cells])
    return _table(["suite", *(run.label for run in runs)], rows)


def _difference_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs[1:]:
        for name, found in differences(runs[0].trials, run.trials).items():
            rows.append([
                run.label, SUITES[name].label, str(found.n), f"{100 * found.difference:+.1f} points",
                f"{100 * found.interval.low:+.1f} to {100 * found.interval.high:+.1f}",
                f"{found.only_first} / {found.only_second}", f"{found.p_value:.3f}",
            ])  # fmt: skip
    if not rows:
        return '<p class="soft">No two runs share a seed.</p>'
    head = ["run", "suite", "shared seeds", "difference", "95 %", "only this / only first", "p"]
    return _table(head, rows)


# --- HTML -------------------------------------------------------------------------------------------------------------


def _page(path: Path, title: str, parts: Iterable[str]) -> Path:
    page = resources.files("vlm2vla_client").joinpath("view.html").read_text(encoding="utf-8")
    body = "\n".join(parts)
    text = string.Template(page).substitute(title=_text(title), body=body)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path


def _figure(url: str, caption: str) -> str:
    return f'<figure class="card"><img style="background:#fff" alt="{_text(caption)}" src="{url}">' \
           f"<figcaption>{_text(caption)}</figcaption></figure>"  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    names = "".join(f"<th>{_text(name)}</th>" for name in head)
    return f'<div style="overflow-x:auto"><table><tr>{names}</tr>{lines}</table></div>'


def _text(value: str) -> str:
    return html.escape("".join(c if c.isprintable() else " " for c in value))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _span(interval: Interval) -> str:
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
