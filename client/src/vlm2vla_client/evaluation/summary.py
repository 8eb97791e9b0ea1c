"""From trials to figures: success with its interval, scores, failures, latency; written as ``summary.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlm2vla_client.evaluation.options import LANGUAGES, split_of
from vlm2vla_client.evaluation.statistics import Distribution, Interval, clopper_pearson, describe, wilson
from vlm2vla_client.evaluation.trial import failure_of
from vlm2vla_client.evaluation.trials import Override, Trial, read_overrides, read_trials
from vlm2vla_client.machine import about_machine
from vlm2vla_client.recorder import write_json_atomic
from vlm2vla_twin.tasks import SUITES, score_of

SUMMARY = "summary.json"
FORMAT = 1
LANGUAGE_GROUP = "pick_carrot_languages"


@dataclass(frozen=True)
class SuiteSummary:
    """One bar of Fig. 5 and what stands behind it.

    Attributes:
        wilson_95, clopper_pearson_95: intervals of the success rate.
        mean_score: by the rubric of the policy (planning or not), out of ``max_score``.
        plans_right: trials whose text named what D.3 asks for, of ``plans_judged`` (0 where D.1 does not ask, or for
            a policy that writes no plans); with a person's verdicts in place of the keywords where there are any.
        plans_right_by_keywords, mean_score_by_keywords: the same without a person's verdicts.
        plan_and_success: the planning / execution split: ``right_success``, ``right_failure``, ``wrong_success``,
            ``wrong_failure``.
        stages: in how many trials each stage was reached.
        verified_without_success: the verifier called it done, physics did not; and the other way round.
    """

    label: str
    tasks: list[str]
    trials: int
    successes: int
    success_rate: float
    wilson_95: Interval
    clopper_pearson_95: Interval
    mean_score: float
    max_score: int
    mean_planning_score: float
    mean_non_planning_score: float
    plans_right: int
    plans_judged: int
    plans_right_by_keywords: int
    mean_score_by_keywords: float
    plan_and_success: dict[str, int]
    failures: dict[str, int]
    stages: dict[str, int]
    verified_without_success: int
    success_without_verified: int
    mean_cycles: float
    seeds: list[int]


@dataclass(frozen=True)
class Summary:
    """Everything that a published number must name: seeds, trials, interval, verifier, model and commit.

    Attributes:
        cycle_s: wall time of one inference cycle, as in Table 3; ``verify_s`` that of one verdict.
        retried_cycles: cycles in which an answer had to be sampled again.
        refusals: rows that the safety filter refused, by reason.
        splits: training, development or test, by the seeds.
    """

    format: int
    policy: str
    model: str
    verifier: str
    mode: str
    splits: list[str]
    trials: int
    suites: dict[str, SuiteSummary]
    cycle_s: Distribution | None
    verify_s: Distribution | None
    retried_cycles: int
    restarted_trials: int
    refusals: dict[str, int]
    overrides: int
    commits: list[str]
    server: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


def overridden(trials: Sequence[Trial], overrides: Mapping[tuple[str, int], Override]) -> list[Trial]:
    """The trials with a person's verdicts on plans in place of the keywords, scored again."""
    return [_scored_again(trial, overrides[trial.key]) if trial.key in overrides else trial for trial in trials]


def _scored_again(trial: Trial, override: Override) -> Trial:
    suite = SUITES[trial.suite]
    credit = override.plan_credit if suite.plan_counts else None
    score = score_of(suite, trial.flags, credit, trial.planning)
    return replace(
        trial,
        score=score.score,
        planning_score=score.planning_score,
        plan_credit=credit,
        success=score.success,
        failure=failure_of(score.success, trial.flags, trial.outcome),
    )


def summarise_suite(label: str, trials: Sequence[Trial], by_keywords: Sequence[Trial] = ()) -> SuiteSummary:
    """The figures of one suite (or of several that are averaged); needs at least one trial.

    Args:
        by_keywords: the same trials without a person's verdicts, where there are any.
    """
    n, successes = len(trials), sum(trial.success for trial in trials)
    judged = [trial for trial in trials if _judged(trial)]
    plain = by_keywords or trials
    stages: Counter[str] = Counter()
    for trial in trials:
        stages.update({name: int(reached) for name, reached in trial.flags.items()})
    return SuiteSummary(
        label=label,
        tasks=sorted({trial.task for trial in trials}),
        trials=n,
        successes=successes,
        success_rate=successes / n,
        wilson_95=wilson(successes, n),
        clopper_pearson_95=clopper_pearson(successes, n),
        mean_score=sum(trial.score for trial in trials) / n,
        max_score=trials[0].max_score,
        mean_planning_score=sum(trial.planning_score for trial in trials) / n,
        mean_non_planning_score=sum(trial.non_planning_score for trial in trials) / n,
        plans_right=sum(bool(trial.plan_credit) for trial in judged),
        plans_judged=len(judged),
        plans_right_by_keywords=sum(bool(trial.plan_credit) for trial in plain if _judged(trial)),
        mean_score_by_keywords=sum(trial.score for trial in plain) / n,
        plan_and_success=dict(
            Counter(
                f"{'right' if trial.plan_credit else 'wrong'}_{'success' if trial.success else 'failure'}"
                for trial in judged
            )
        ),
        failures=dict(Counter(trial.failure for trial in trials if trial.failure is not None).most_common()),
        stages=dict(stages),
        verified_without_success=sum(trial.verified and not trial.success for trial in trials),
        success_without_verified=sum(trial.success and not trial.verified for trial in trials),
        mean_cycles=sum(trial.cycles for trial in trials) / n,
        seeds=sorted({trial.seed for trial in trials}),
    )


def _judged(trial: Trial) -> bool:
    return trial.planning and trial.plan_credit is not None


def summarise(
    trials: Sequence[Trial], server: Mapping[str, Any], overrides: int = 0, by_keywords: Sequence[Trial] = ()
) -> Summary:
    """The figures of one folder; suites in the order of the paper, the languages also averaged (4.2).

    Args:
        by_keywords: the same trials without a person's verdicts, where there are any.
    """

    def of(label: str, *names: str) -> SuiteSummary:
        mine, plain = ([trial for trial in some if trial.suite in names] for some in (trials, by_keywords))
        return summarise_suite(label, mine, plain)

    present = {trial.suite for trial in trials}
    suites = {name: of(suite.label, name) for name, suite in SUITES.items() if name in present}
    if sum(name in suites for name in LANGUAGES) > 1:
        suites[LANGUAGE_GROUP] = of("Pick Up - T", *LANGUAGES)

    def only(name: str) -> str:
        return ", ".join(sorted({str(getattr(trial, name)) for trial in trials}))

    return Summary(
        format=FORMAT,
        policy=only("policy"),
        model=only("model"),
        verifier=only("verifier"),
        mode=only("mode"),
        splits=sorted({split_of(trial.seed) for trial in trials}),
        trials=len(trials),
        suites=suites,
        cycle_s=describe([value for trial in trials for value in trial.cycle_seconds]),
        verify_s=describe([value for trial in trials for value in trial.verify_seconds]),
        retried_cycles=sum(trial.retried_cycles for trial in trials),
        restarted_trials=sum(trial.retries > 0 for trial in trials),
        refusals=dict(sum((Counter(trial.refusals) for trial in trials), Counter())),
        overrides=overrides,
        commits=sorted({trial.commit for trial in trials if trial.commit is not None}),
        server=dict(server),
        machine=about_machine(),
    )


def write_summary(folder: Path, server: Mapping[str, Any]) -> tuple[Summary, list[Trial]]:
    """Writes what :func:`read_summary` gives to ``summary.json`` and returns it.

    Raises:
        RecordingError: damaged files.
    """
    summary, trials = read_summary(folder, server)
    write_json_atomic(folder / SUMMARY, summary)
    return summary, trials


def read_summary(folder: Path, server: Mapping[str, Any]) -> tuple[Summary, list[Trial]]:
    """The figures of a folder's trials with its overrides, and those trials; writes nothing.

    Raises:
        RecordingError: damaged files.
    """
    overrides = read_overrides(folder)
    measured = read_trials(folder)
    trials = overridden(measured, overrides)
    return summarise(trials, server, len(overrides), measured), trials
